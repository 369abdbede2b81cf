"""One exception family. Each message says what was expected, what was got and what to do."""

__all__ = ["CacheError", "CheckpointError", "ConfigError", "InputError", "PurifyError", "TrainingError"]


_LONGEST = 20_000  # characters of a message, which may repeat what a stranger's file says


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
        super().__init__(_shortened(message))
        self.argument = argument

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return self.message if self.argument is None else f"{self.argument} {self.message}"


def _shortened(message: str) -> str:
    if not isinstance(message, str) or len(message) <= _LONGEST:
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
