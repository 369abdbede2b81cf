"""Purified images on disk, index for index the source dataset. README.md describes the format."""

from __future__ import annotations

from purifyloader.cache.format import Shard, fingerprint
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.source import SourceHasher
from purifyloader.cache.writer import CacheWriter

__all__ = ["CacheReader", "CacheWriter", "Shard", "SourceHasher", "fingerprint"]
