"""Count in each thread what was done to images, so that whoever reads a sample sees what its dataset did to it.

Looking for purifiers inside datasets, wrappers and functions finds those that one thought of; this finds all that ran.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Notes(threading.local):
    """How often images were purified, or read from a purified cache, and compensated, in this thread."""

    purified = 0
    compensated = 0


NOTES = Notes()


@contextmanager
def noted() -> Iterator[Notes]:
    """Yield the counts of what is done inside, which are complete at its end."""
    done = Notes()
    before = NOTES.purified, NOTES.compensated
    try:
        yield done
    finally:
        done.purified, done.compensated = NOTES.purified - before[0], NOTES.compensated - before[1]
