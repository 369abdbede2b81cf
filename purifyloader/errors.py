"""One exception family. Each message says what was expected, what was got and what to do."""

import re

__all__ = ["CacheError", "CheckpointError", "ConfigError", "InputError", "PurifyError", "TrainingError"]


_LONGEST = 20_000  # characters of a message, which may repeat what a stranger's file says

# What a terminal obeys or shows as another text: controls (C0, DEL, C1), line and paragraph separators, marks and
# overrides of direction, and lone surrogates, which stand for bytes that are no UTF-8.
_UNSAFE = re.compile(r"[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NEXT_LINE = re.compile(r"\n(?=\S)")


class PurifyError(Exception):
    """Any error that purifyloader raises on purpose.

    Args:
        message: what is wrong, with the value; then what to do.
        argument: name of the Python argument at fault, such as "count". The text begins with it; a command writes
            its option, `--count`, in its place.

    >>> str(PurifyError("must be at least 1. Got 0.", argument="count"))
    'count must be at least 1. Got 0.'
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(escaped(_shortened(message)) if isinstance(message, str) else message)
        self.argument = argument

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return self.message if self.argument is None else f"{self.argument} {self.message}"


def escaped(text: str) -> str:
    """Return a message in which names of somebody else's can do nothing to a terminal, nor look like a line of ours.

    Control characters are written as Python does, and every line but the first is indented.

    >>> print(escaped("There is no \\x1b[2J\\nAll is well."))
    There is no \\x1b[2J
      All is well.
    """
    return _NEXT_LINE.sub("\n  ", _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


def _shortened(message: str) -> str:
    if len(message) <= _LONGEST:
        return message
    return f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"


class InputError(PurifyError, ValueError):
    """An image, a dataset or an argument is not what the call takes."""


class ConfigError(PurifyError, ValueError):
    """A configuration names something unknown or contradicts itself."""


class CheckpointError(PurifyError):
    """A model's files are missing, damaged, or do not fit each other."""


class CacheError(PurifyError):
    """A purified cache is missing, damaged, or was made with another configuration."""


class TrainingError(PurifyError):
    """Training cannot start or go on."""
