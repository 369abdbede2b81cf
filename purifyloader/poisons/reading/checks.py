"""Check that a poison was read as it was meant: against its bound, and against what misreadings look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purifyloader.datasets.arrays import as_arrays
from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Bound, Moved, Poisoned

__all__ = ["check", "check_numbers", "levels", "unmoved"]

_SAMPLE = 64  # images that are looked at, of those that moved and of the clean set
_ONE_SIDE = 0.01  # the share of values that may go the other way where a sign was lost
_NEARER = 4  # how much nearer a misreading must bring images where no bound says what is near; no attack comes near it
_AS_FAR = 0.7  # of the distance to other images, from where on the own is no nearer
_MEANT = "or say checked=False if it is meant so"


def levels(bound: Bound) -> str:
    """Describe a bound in levels of 0 to 255."""
    if bound.norm == "l0":
        return f"{bound.epsilon:g} pixels"
    return f"{255 * bound.epsilon:g} levels of 255 ({bound.norm})"


def _limit(bound: Bound, values: int) -> float:
    """Return how far an image of so many values may be moved, in levels, with half a level a value for rounding.

    To l-infinity the whole level is added that the loaders that cut off need.
    """
    if bound.norm == "l0":
        return bound.epsilon
    return 255 * bound.epsilon + (1.0 if bound.norm == "linf" else 0.5 * values**0.5)


def _within(bound: Bound | None) -> str:
    return "" if bound is None else f", within {levels(bound)}"


def check_numbers(delta: NDArray[Any], bound: Bound | None, what: str, signed: bool = True) -> None:
    """Refuse a perturbation (N, ...), in units of [0, 1] images, whose very numbers say that it is misread.

    They are not finite, zero everywhere, 255 times too large, or (if `signed`) without their sign; with a bound also
    255 times too small, or beyond it. `what` names it in a message.
    """
    low = high = longest = 0.0
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
    if bound is not None and bound.norm == "l0":
        return
    if signed and (low == 0 or high == 0):
        raise InputError(
            f"{what} must go up and down{_within(bound)}. {got}: the sign was lost, by a cast or a clamp. Take the "
            f"file before that, {_MEANT}."
        )
    if bound is None:
        return
    reached = largest if bound.norm == "linf" else longest
    if reached * 100 < bound.epsilon:
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
        clean: the clean training set in the same order: (images uint8 (N, H, W, C), labels), or a dataset.
        bound: of the perturbation, if not `poisoned.bound`. Where neither is known, how far the images moved is no
            reason to refuse them, but only what no attack does to them.
        signed: whether a perturbation that goes one way only is a mistake; of one with a bound.

    Returns:
        How far the images were moved, in levels of 0 to 255.

    Raises:
        InputError: other numbers or shapes; labels (true ones, where the set knows them) that are mostly others;
            nothing moved, though the set says that images are poisoned, and no label is another.
            With a bound: numbers of one sign, or a perturbation beyond it by more than 8-bit rounding (one level; for
            l2 half a level a value; for l0 nothing). The message says what it looks like: a factor of 255, images of
            [-1, 1] taken for [0, 1] or the reverse, wrapped-around numbers, or channels, axes or images in another
            order.
            Without one: images that are all black, or most values of which moved to black or white; images that such
            a misreading brings several times nearer to the clean ones; numbers that plainly wrapped around; and images
            that are no more like the clean ones of their places than like others.

    >>> import numpy as np
    >>> from purifyloader.poisons import check, make
    >>> clean = np.full((4, 8, 8, 3), 128, np.uint8), np.array([0, 1, 0, 1])
    >>> check(make("urp", clean), clean).images
    4
    """
    images, labels = as_arrays(clean)
    moved = poisoned.moved(images)
    differ = int((labels != poisoned.shown_labels).sum())  # true labels, if it says them, are the clean ones
    if 2 * differ > len(labels) and differ > 1:
        raise InputError(
            f"A poisoned set is compared with the clean one in the same order. Got other labels for {differ:,} of "
            f"{len(labels):,} images: give the clean set that the poison was made from, in its order."
        )
    bound = poisoned.bound if bound is None else bound
    if not moved.images:
        # a set may say that none of it is poisoned, and without a bound its poison may be in its labels
        if len(poisoned.poisoned) and (bound is not None or (labels == poisoned.labels).all()):
            raise unmoved(bound)
        return moved
    if bound is None:
        _check_unbounded(_sample(poisoned.images, images), moved)
        return moved
    limit = _limit(bound, int(np.prod(images.shape[1:])))
    if _reached(moved, bound) > limit:
        raise _explained(_sample(poisoned.images, images), bound, limit, moved)
    if signed and bound.norm != "l0" and not _ONE_SIDE < moved.down < 1 - _ONE_SIDE:
        way = "down" if moved.down > 0.5 else "up"
        raise InputError(
            f"A perturbation goes up and down{_within(bound)}. Got {way} only: its sign was lost, by a cast or a clamp "
            f"to positive numbers. Take the file before that, {_MEANT}."
        )
    return moved


def unmoved(bound: Bound | None) -> InputError:
    """Make the error for a poison that leaves the clean images as they are."""
    far = "" if bound is None else f", by up to {levels(bound)}"
    return InputError(
        f"A poison must move images{far}. Got the clean images: this is the clean set, or the perturbation was rounded "
        f"away, as numbers 255 times too small are. Take another file, {_MEANT}."
    )


def _reached(moved: Moved, bound: Bound) -> float:
    return {"linf": moved.linf, "l2": moved.l2_max, "l0": moved.pixels}[bound.norm]


def _norms(delta: NDArray[Any], bound: Bound) -> NDArray[Any]:
    if bound.norm == "l0":
        return np.asarray((delta != 0).any(axis=3).sum(axis=(1, 2)))
    rows = np.abs(delta.reshape(len(delta), -1).astype(np.float64))
    return np.asarray(rows.max(axis=1) if bound.norm == "linf" else np.sqrt((rows**2).sum(axis=1)))


Levels = NDArray[np.int16]


class _Sample(NamedTuple):
    """A sample of the images that moved, in levels: (S, H, W, C), the clean ones of their places, and others (M, ...).

    `apart` (S, M) says whether an image and one of the others, from all over the clean set, are of two places.
    """

    got: Levels
    clean: Levels
    others: Levels
    apart: NDArray[np.bool_]


def _sample(got: NDArray[np.uint8], clean: NDArray[np.uint8]) -> _Sample:
    parts = [slice(start, start + 1024) for start in range(0, len(got), 1024)]
    moved = np.flatnonzero(np.concatenate([(got[part] != clean[part]).any(axis=(1, 2, 3)) for part in parts]))
    chosen, places = moved[_spread(len(moved))], _spread(len(clean))
    some = got[chosen].astype(np.int16)
    return _Sample(some, clean[chosen].astype(np.int16), clean[places].astype(np.int16), chosen[:, None] != places)


def _spread(count: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.int64)


_WRAPPED = "numbers that wrapped around at 256: clamp to 0 and 255 before the cast to uint8"

# How a perturbation looks that was read wrongly: the difference to the clean images if it had been read so, and by
# how much reading it so stretches the rounding. The first that brings it within its bound is named.
_MISREADINGS: tuple[tuple[str, float, Callable[[Levels, Levels], Levels]], ...] = (
    (_WRAPPED, 1.0, lambda got, clean: (got - clean + 128) % 256 - 128),
    ("the channels in the reverse order (BGR): reverse the last axis", 1.0, lambda got, clean: got[..., ::-1] - clean),
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
    ("images in [0, 1] taken for [-1, 1]: do not add 1 and halve", 2.0, lambda got, clean: 2 * got - 255 - clean),
)


_BLACK = "all are black, for they were divided by 255 once too often. Multiply them by 255"
_BLOWN_UP = "what moved is all black or white, as by a perturbation 255 times too large. Divide it by 255"
_ELSEWHERE = (
    "they are no nearer to the clean images of their places than to others, so the order is another. Give the clean "
    "set that the poison was made from, in its order"
)


def _explained(sample: _Sample, bound: Bound, limit: float, moved: Moved) -> InputError:
    reached = f"up to {_reached(moved, bound):.4g}, in {moved.images:,} images"
    head = (
        f"The images must be within {levels(bound)} of the clean ones, with a slack for 8-bit rounding. Got {reached}"
    )
    if _is_black(sample):
        return InputError(f"{head}: {_BLACK}.")
    if _to_black_or_white(sample):
        return InputError(f"{head}: {_BLOWN_UP}.")
    for words, stretched, difference in _MISREADINGS:
        if (_norms(difference(sample.got, sample.clean), bound) <= stretched * limit).mean() > 0.9:
            return InputError(f"{head}. They look like {words}.")
    if _is_elsewhere(sample):
        return InputError(f"{head}: {_ELSEWHERE}.")
    return InputError(
        f"{head}. Give bound= if the attack has another, or checked=False to read it as it is and look at "
        "settings['moved']."
    )


def _check_unbounded(sample: _Sample, moved: Moved) -> None:
    """Refuse what no attack does to images, however far it moves them."""
    head = (
        "The images must be those of their places in the clean set, however far they moved. Got "
        f"{moved.images:,} images, {moved.l2_mean:.4g} levels (l2) away on average"
    )
    # an attack may set pixels to black or white, but not most of them
    if _is_black(sample):
        raise InputError(f"{head}: {_BLACK}, {_MEANT}.")
    if _to_black_or_white(sample) and (sample.got != sample.clean).mean() > 0.5:
        raise InputError(f"{head}: {_BLOWN_UP}, {_MEANT}.")
    if _is_wrapped(sample):
        raise InputError(f"{head}. They look like {_WRAPPED}, {_MEANT}.")
    own = _length(sample.got - sample.clean)
    for words, _, difference in _MISREADINGS:
        # bright spots on dark images come nearer too if they are taken for numbers that wrapped around
        if words != _WRAPPED and _NEARER * _length(difference(sample.got, sample.clean)) <= own:
            raise InputError(f"{head}. They look like {words}, {_MEANT}.")
    if _is_elsewhere(sample):
        raise InputError(f"{head}: {_ELSEWHERE}, {_MEANT}.")


def _length(delta: Levels) -> float:
    return float(np.median(_norms(delta, Bound("l2", 1))))


def _is_black(sample: _Sample) -> bool:
    return int(sample.got.max()) <= 1 < int(sample.clean.max())


def _to_black_or_white(sample: _Sample) -> bool:
    return bool(np.isin(sample.got[sample.got != sample.clean], (0, 255)).mean() > 0.9)


def _is_wrapped(sample: _Sample) -> bool:
    """Tell whether what moved far moved by nearly 256, and nothing by less: such a patch is black and white."""
    far = np.abs(sample.got - sample.clean)
    jumped = sample.got[far > 192]
    between = ((far > 64) & (far <= 192)).any()
    return bool(len(jumped) and not between and np.isin(jumped, (0, 255)).mean() < 0.5)


def _is_elsewhere(sample: _Sample) -> bool:
    """Tell whether images are as far from the clean ones of their places as from others, and no more like them.

    No measure of how far tells alone. By l2 an attack such as CUDA moves dark images as far, as it makes them
    brighter, and so does a bright patch. But a patch leaves most values as they are; and CUDA leaves images as much
    like their own by correlation, which brightness and contrast do not decide; nor does its sign, for a negative is
    like its image. In another order, every second clean image is more like than that of the place.
    """
    if not sample.apart.any():
        return False
    got, clean, others = (part.reshape(len(part), -1).astype(np.float32) for part in sample[:3])
    squares = (got**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * got @ others.T
    apart = np.sqrt(np.maximum(squares, 0))[sample.apart]
    if _length(sample.got - sample.clean) <= _AS_FAR * float(np.median(apart)):
        return False
    other_bytes = sample.others.astype(np.uint8)
    changed = [_share_changed(one, other_bytes, other) for one, other in zip(sample.got, sample.apart, strict=True)]
    if (sample.got != sample.clean).mean() <= _AS_FAR * np.mean(changed):
        return False
    got, clean, others = (_standardised(part) for part in (got, clean, others))
    own = np.abs((got * clean).sum(axis=1))[:, None]
    # more by a little: clean images that are all alike are no more like than that of the place
    more_like = np.abs(got @ others.T) > own + 1e-3
    return bool(more_like[sample.apart].mean() > 0.25)


def _share_changed(one: Levels, others: NDArray[np.uint8], apart: NDArray[np.bool_]) -> np.float64:
    differs = others != one.astype(np.uint8)  # as bytes, which are compared four times as fast as int16
    changed = np.count_nonzero(differs) - np.count_nonzero(differs[~apart])
    share: np.float64 = np.divide(changed, np.count_nonzero(apart) * one.size)
    return share


def _standardised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of mean 0 and length 1, so that the product of two is their correlation; about 0 for a row of one value."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    # any other row of whole levels is longer than that
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(0.5))
