"""One exception family. Each message says what was expected, what was got and what to do."""

__all__ = ["CacheError", "CheckpointError", "ConfigError", "InputError", "PurifyError", "TrainingError"]


class PurifyError(Exception):
    """Any error that purifyloader raises on purpose."""


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
