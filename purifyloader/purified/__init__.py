"""Purified datasets and loaders: live, read from a cache, or cached on demand."""
