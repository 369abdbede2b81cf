"""Readers of published poison files: every format as one dataset, checked, and none of its code run."""

from purifyloader.poisons.reading.checks import check
from purifyloader.poisons.reading.formats import read

__all__ = ["check", "read"]
