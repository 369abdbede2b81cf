"""Whether a poison was read as it was meant: against its bound, and against what reading it wrongly looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.errors import InputError
from purifyloader.poisons.arrays import as_arrays
from purifyloader.poisons.poisoned import Bound, Moved, Poisoned

__all__ = ["check", "check_numbers", "levels"]

_SAMPLE = 256  # images that are looked at to explain a refusal
_ONE_SIDE = 0.01  # the share of values that may go the other way where a sign was lost


def levels(bound: Bound) -> str:
    """A bound in words, in levels of 0 to 255."""
    if bound.norm == "l0":
        return f"{bound.epsilon:g} pixels"
    return f"{255 * bound.epsilon:g} levels of 255 ({bound.norm})"


def _limit(bound: Bound, values: int) -> float:
    """How far an image of so many values may be moved, in levels; what 8-bit rounding may add is half a level a value.

    To l-infinity the whole level is added that the loaders that cut off need.
    """
    if bound.norm == "l0":
        return bound.epsilon
    return 255 * bound.epsilon + (1.0 if bound.norm == "linf" else 0.5 * values**0.5)


def check_numbers(delta: NDArray[Any], bound: Bound | None, what: str, signed: bool = True) -> None:
    """Refuse a perturbation, in units of [0, 1] images, whose very numbers say that it is misread.

    Args:
        delta: floating point (N, ...).
        bound: of the attack, where there is one.
        what: names it in a message.
        signed: whether numbers of one sign only are a mistake.

    Raises:
        InputError: not finite, zero everywhere, 255 times too large or too small, without its sign, or beyond the
            bound.
    """
    low = high = 0.0
    longest = 0.0
    for start in range(0, len(delta), 1024):
        part = delta[start : start + 1024].reshape(len(delta[start : start + 1024]), -1)
        if not np.isfinite(part).all():
            raise InputError(f"{what} must be finite numbers. Got NaN or infinity: the file is damaged.")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        longest = max(longest, float(np.sqrt(np.square(part, dtype=np.float64).sum(axis=1)).max()))
    largest = max(-low, high)
    got = f"Got numbers from {low:.4g} to {high:.4g}"
    if not largest:
        raise InputError(
            f"{what} must move an image. Got zero everywhere, as a cast to integers leaves of numbers in units of "
            "[0, 1] images: multiply by 255 before the cast."
        )
    if largest > 1:
        raise InputError(
            f"{what} must be in units of [0, 1] images. {got}, 255 times too large if they are levels of 0 to 255: "
            "divide them by 255."
        )
    if bound is None or bound.norm == "l0":
        return
    if signed and (low == 0 or high == 0):
        raise InputError(
            f"{what} must go up and down, within {levels(bound)}. {got}: the sign was lost, by a cast or a clamp. Take "
            "the file before that."
        )
    reached, epsilon = (largest, bound.epsilon) if bound.norm == "linf" else (longest, bound.epsilon)
    if reached * 100 < epsilon:
        raise InputError(
            f"{what} must come near its bound of {levels(bound)}. {got}, some 255 times too small: they were divided "
            "by 255 once too often."
        )
    if 255 * reached > _limit(bound, int(np.prod(delta.shape[1:]))):
        raise InputError(
            f"{what} must be within {levels(bound)}, with a slack for 8-bit rounding. {got}, up to "
            f"{255 * reached:.4g} levels. Give bound= if the attack has another, and halve numbers in units of [-1, 1] "
            "images."
        )


def check(poisoned: Poisoned, clean: Any, *, bound: Bound | None = None, signed: bool = True) -> Moved:
    """Compare a poisoned set with the clean one, and refuse what was plainly misread.

    Args:
        poisoned: of `read`, or of an attack.
        clean: the clean training set in the same order: (images uint8 (N, H, W, C), labels), or a dataset.
        bound: of the perturbation, if not `poisoned.bound`. Where neither is known nothing is refused but another
            order of the labels.
        signed: whether a perturbation that goes one way only is a mistake.

    Returns:
        How far the images were moved, in levels of 0 to 255.

    Raises:
        InputError: other numbers or shapes; images in another order; nothing moved; numbers of one sign; a
            perturbation beyond the bound by more than 8-bit rounding (one level; for l2 half a level a value; for l0
            nothing), where the message says what it looks like: a factor of 255, images of [-1, 1] taken for [0, 1] or
            the reverse, wrapped-around numbers, or channels or axes in another order.
    """
    images, labels = as_arrays(clean)
    moved = poisoned.moved(images)
    differ = int((labels != poisoned.labels).sum())
    if 2 * differ > len(labels) and differ > 1:
        raise InputError(
            f"A poisoned set is compared with the clean one in the same order. Got other labels for {differ:,} of "
            f"{len(labels):,} images: give the clean set that the poison was made from, in its order."
        )
    bound = poisoned.bound if bound is None else bound
    if bound is None:
        return moved
    if not moved.images:
        raise InputError(
            f"A poison must move images, by up to {levels(bound)}. Got the clean images: this is the clean set, or the "
            "perturbation was rounded away, as numbers 255 times too small are."
        )
    limit = _limit(bound, int(np.prod(images.shape[1:])))
    if _reached(moved, bound) > limit:
        raise _explained(poisoned.images, images, bound, limit, moved)
    if signed and bound.norm != "l0" and not _ONE_SIDE < moved.down < 1 - _ONE_SIDE:
        way = "down" if moved.down > 0.5 else "up"
        raise InputError(
            f"A perturbation goes up and down, within {levels(bound)}. Got {way} only: its sign was lost, by a cast or "
            "a clamp to positive numbers. Take the file before that, or say checked=False if it is meant so."
        )
    return moved


def _reached(moved: Moved, bound: Bound) -> float:
    return {"linf": moved.linf, "l2": moved.l2_max, "l0": moved.pixels}[bound.norm]


def _norms(delta: NDArray[Any], bound: Bound) -> NDArray[Any]:
    if bound.norm == "l0":
        return np.asarray((delta != 0).any(axis=3).sum(axis=(1, 2)))
    rows = np.abs(delta.reshape(len(delta), -1).astype(np.float64))
    return np.asarray(rows.max(axis=1) if bound.norm == "linf" else np.sqrt((rows**2).sum(axis=1)))


Levels = NDArray[np.int16]

# How a perturbation looks that was read wrongly: the difference to the clean images if it had been read so, and by
# how much reading it so stretches the rounding. The first that brings it within its bound is named.
_MISREADINGS: tuple[tuple[str, float, Callable[[Levels, Levels], Levels]], ...] = (
    (
        "numbers that wrapped around at 256: clamp to 0 and 255 before the cast to uint8",
        1.0,
        lambda got, clean: (got - clean + 128) % 256 - 128,
    ),
    (
        "the channels in the reverse order (BGR): reverse the last axis",
        1.0,
        lambda got, clean: got[..., ::-1] - clean,
    ),
    (
        "bytes of whole channels, one after another, taken for pixels: transpose them to (H, W, C)",
        1.0,
        lambda got, clean: got.reshape(len(got), got.shape[3], *got.shape[1:3]).transpose(0, 2, 3, 1) - clean,
    ),
    (
        "rows taken for columns: swap the height and the width",
        1.0,
        lambda got, clean: (got.transpose(0, 2, 1, 3) if got.shape[1] == got.shape[2] else got) - clean,
    ),
    (
        "images in [-1, 1] taken for [0, 1]: add 1 and halve",
        2.0,
        lambda got, clean: got - np.clip(2 * clean - 255, 0, 255),
    ),
    (
        "images in [0, 1] taken for [-1, 1]: do not add 1 and halve",
        2.0,
        lambda got, clean: 2 * got - 255 - clean,
    ),
)


def _explained(
    got: NDArray[np.uint8], clean: NDArray[np.uint8], bound: Bound, limit: float, moved: Moved
) -> InputError:
    differ = np.concatenate(
        [
            start + np.flatnonzero((got[start : start + 1024] != clean[start : start + 1024]).any(axis=(1, 2, 3)))
            for start in range(0, len(got), 1024)
        ]
    )
    chosen = differ[:: max(1, len(differ) // _SAMPLE)]
    some, same = got[chosen].astype(np.int16), clean[chosen].astype(np.int16)
    reached = f"up to {_reached(moved, bound):.4g}, in {moved.images:,} images"
    head = (
        f"The images must be within {levels(bound)} of the clean ones, with a slack for 8-bit rounding. Got {reached}"
    )
    if int(some.max()) <= 1 < int(same.max()):
        return InputError(f"{head}: all are black, for they were divided by 255 once too often. Multiply them by 255.")
    if (np.isin(some[some != same], (0, 255))).mean() > 0.9:
        return InputError(
            f"{head}: what moved is all black or white, as by a perturbation 255 times too large. Divide it by 255."
        )
    for words, stretched, difference in _MISREADINGS:
        if (_norms(difference(some, same), bound) <= stretched * limit).mean() > 0.9:
            return InputError(f"{head}. They look like {words}.")
    # as far from their own clean images as from others: compared by l2, which a few pixels do not decide
    rows = Bound("l2", 1)
    own = np.median(_norms(some - same, rows))
    others = np.median(_norms(some - np.roll(same, 1, axis=0), rows)) if len(some) > 1 else np.inf
    if own > 0.7 * others:
        return InputError(
            f"{head}: they are no nearer to the clean images of their places than to others, so the order is another. "
            "Give the clean set that the poison was made from, in its order."
        )
    return InputError(
        f"{head}. Give bound= if the attack has another, or checked=False to read it as it is and look at "
        "settings['moved']."
    )
