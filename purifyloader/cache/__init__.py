"""Purified images on disk, index for index the source dataset. README.md describes the format."""

from __future__ import annotations

from purifyloader.cache.format import Layout, Shard, fingerprint
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.writer import CacheWriter
from purifyloader.files.hashes import source_hashes

__all__ = ["CacheReader", "CacheWriter", "Layout", "Shard", "fingerprint", "source_hashes"]
