"""Check single values that users give: each checker raises an error that names the value and the values allowed.

Checkers of fields of a configuration raise `ConfigError` unless told otherwise, `as_integer` raises `InputError`.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.errors import ConfigError, InputError, PurifyError

__all__ = [
    "as_integer",
    "as_path",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_number",
    "check_seed",
    "launcher_number",
    "plain_number",
    "shown",
    "stored_integer",
    "stored_integers",
]


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path, `~` in its place the user's home folder, as torchvision has it for `root`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of a user who is not there
        return Path(path)
    except TypeError:
        raise InputError(f"A path is text or a pathlib.Path. Got {type(path).__name__}.") from None


def plain_number(value: Any) -> Any:
    """Return one of numpy's numbers as Python's, which JSON and hashes know; anything else as it is."""
    is_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_numpy and value.dtype.kind in "biuf" else value


def _got(value: Any) -> str:
    own, text = plain_number(value), shown(value, 200)
    return text if own is value else f"{text}, a number of numpy's: give {type(own).__name__}(...) of it"


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    unit: str = "",
    error: type[PurifyError] = ConfigError,
) -> None:
    """Raise an error unless `value` is a finite Python number (no bool) within the limits.

    `above` and `below` are not allowed themselves; `unit` follows the limits in the message, such as "in image units".
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    if number and not (
        (low is not None and value < low)
        or (above is not None and value <= above)
        or (high is not None and value > high)
        or (below is not None and value >= below)
    ):
        return
    raise error(
        f"{name} must be a finite number{_limits(low, above, high, below)}{', ' * bool(unit)}{unit}. Got {_got(value)}."
    )


def check_integer(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    *,
    none: bool = False,
    unit: str = "",
    error: type[PurifyError] = ConfigError,
) -> None:
    """Raise an error unless `value` is a Python integer (no bool) from `low` to `high`; `none` allows None too."""
    if (none and value is None) or (type(value) is int and low <= value and (high is None or value <= high)):
        return
    if high is not None:
        allowed = f"an integer from {low} to {high}"
    else:
        allowed = "a positive integer" if low == 1 else f"an integer of {low} or more"
    raise error(f"{name} must be {allowed}{' or None' * none}{', ' * bool(unit)}{unit}. Got {_got(value)}.")


def check_choice(name: str, value: Any, allowed: Collection[Any], *, error: type[PurifyError] = ConfigError) -> None:
    """Raise an error unless `value` is one of `allowed`, and of its type: 1 is equal to True and no stand-in for it."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise error(f"{name} must be one of {', '.join(map(repr, allowed))}. Got {_got(value)}.")


def check_flag(name: str, value: Any, *, error: type[PurifyError] = ConfigError) -> None:
    """Raise an error unless `value` is True or False: 1 is equal to True, but would be written to JSON as a number."""
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False. Got {_got(value)}.")


def check_seed(seed: Any) -> None:
    """Raise `ConfigError` unless `seed` is a Python integer of 64 bits."""
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed must be an integer of 64 bits. Got {_got(seed)}.")


def as_integer(name: str, value: Any, low: int) -> int:
    """Return `value`, which may be one of numpy's or torch's integers, as a Python integer from `low` to 2^63 - 1."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer. Got {_got(value)}.") from None
    if not low <= integer < 2**63:
        raise InputError(f"{name} must be an integer from {low} to 2^63 - 1. Got {_got(value)}.")
    return integer


def shown(value: Any, most: int = 60) -> str:
    """Return the repr of a value that somebody else's file gives, cut to `most` characters."""
    if isinstance(value, int) and value.bit_length() > 4 * most:  # Python writes no number of many digits
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def stored_integer(what: str, value: Any, low: int = 0) -> int:
    """Return an integer that somebody else's file or file name gives, as a number or in digits, from `low`.

    Raises `InputError` for what is none, or does not fit into the 64 bits of an array's; `what` names it and the file.
    """
    try:
        integer = int(value) if isinstance(value, str | bytes) else operator.index(value)
    except (TypeError, ValueError):  # of many thousand digits, too
        integer = low - 1
    if not low <= integer < 2**63:
        lowest = str(low) if low > -(2**63) else "-2^63"
        raise InputError(f"{what} must be an integer from {lowest} to 2^63 - 1. Got {shown(value)}.")
    return integer


def stored_integers(what: str, values: Iterable[Any], low: int = 0) -> NDArray[np.int64]:
    """Return what `stored_integer` does of each value, or of an array of integers of any kind, as int64 (N,)."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        for end in (values.min(), values.max()) if values.size else ():
            stored_integer(what, end, low)
        return values.astype(np.int64)
    return np.array([stored_integer(what, value, low) for value in values], np.int64)


def launcher_number(name: str, default: int, low: int = 0) -> int:
    """Return a number that a launcher, such as torchrun, has set in the environment; `default` where it has not."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or int(text) < low:
        raise InputError(
            f"The environment variable {name} is a whole number, at least {low}. Got {text!r}: set it, or unset it "
            "for one process."
        )
    return int(text)


def _limits(low: float | None, above: float | None, high: float | None, below: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    lower = f" of {low} or more" if low is not None else f" above {above}" if above is not None else ""
    upper = f" of {high} or less" if high is not None else f" below {below}" if below is not None else ""
    return f"{lower}{' and' * bool(lower and upper)}{upper}"
