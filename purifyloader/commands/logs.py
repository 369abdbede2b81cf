"""Show the log of a command on standard error, a line each above its progress bars."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from purifyloader.errors import escaped


class AboveBars(logging.Handler):
    """Writes records where a bar would otherwise overwrite them, or stand on their line."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        try:
            tqdm.write(escaped(self.format(record)), file=sys.stderr)
        except Exception:  # as every handler of `logging` does
            self.handleError(record)


def show(level: int, form: str = "%(message)s") -> None:
    """Show what the library logs from this level on, unless the process has a log of its own."""
    logging.basicConfig(level=level, format=form, handlers=[AboveBars()])


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Show warnings so, meanwhile, in commands that configure no log."""
    before, logging.lastResort = logging.lastResort, AboveBars(logging.WARNING)
    try:
        yield
    finally:
        logging.lastResort = before
