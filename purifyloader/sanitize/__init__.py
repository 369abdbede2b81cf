"""Sanitize a dataset: find the images of a back door with wrong labels, to drop or relabel them. See README.md.

`sanitize` gives a `Verdict`, `load` reads a saved one, `table` and `picture` show it, and `purifyloader sanitize` is
all of it from the command line.
"""

from purifyloader.sanitize.pictures import picture
from purifyloader.sanitize.report import table
from purifyloader.sanitize.session import sanitize
from purifyloader.sanitize.verdict import Verdict, load

__all__ = ["Verdict", "load", "picture", "sanitize", "table"]
