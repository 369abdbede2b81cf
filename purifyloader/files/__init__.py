"""Files on disk: atomic writes, locks, and hashes of contents, datasets and weights."""
