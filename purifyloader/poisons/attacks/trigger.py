"""Add a trigger to some images of the target class: a back door (Narcissus; arXiv:2204.05255).

The labels stay right. A victim learns the trigger as a sign of the class, and calls any image that carries it so.
"""

from __future__ import annotations

import operator
import os
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core.checks import as_path, check_number
from purifyloader.errors import InputError
from purifyloader.files.opening import check_file
from purifyloader.poisons.attacks.additive import Images, Integers, as_labels, change_images, sha256_of, size_of
from purifyloader.poisons.attacks.choice import colour, drawn, of_class
from purifyloader.poisons.poisoned import Bound, Poisoned
from purifyloader.poisons.triggers import Additive

__all__ = ["add_trigger", "attack", "backdoor", "read_trigger"]

_ATTACK = 0x74726967  # "trig"


def read_trigger(path: str | os.PathLike[str]) -> Tensor:
    """Read the published trigger file, `.npy` (1, 3, H, W) or (3, H, W) float in units of [-1, 1] images.

    It is returned as float32 (H, W, 3) in units of [0, 1] images: half of the numbers in the file.

    Raises:
        InputError: no such file, another format or shape, or numbers that cannot be in these units.

    >>> import tempfile, numpy as np
    >>> from purifyloader.poisons import read_trigger
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/trigger.npy", np.full((1, 3, 8, 8), 0.125, np.float32))
    ...     read_trigger(f"{folder}/trigger.npy").max()
    tensor(0.0625)
    """
    path = as_path(path)
    try:
        check_file(path)
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # which compares its length with what it says
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"A trigger is a .npy file of numbers. Got {path}: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.shape[-3:-2] != (3,) or array.ndim > 4:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"A trigger is floating-point, of shape (1, 3, H, W) or (3, H, W). Got {got} in {path}.")
    array = array.reshape(-1, *array.shape[-3:])
    if len(array) != 1:
        raise InputError(f"A trigger file holds one trigger. Got {len(array)} in {path}.")
    largest = float(np.abs(array).max())
    if not 0 < largest <= 2:
        raise InputError(
            f"A trigger is in units of [-1, 1] images, at most 2 and not all zero. Got {largest} in {path}: "
            "divide numbers on the 0-255 scale by 127.5."
        )
    return torch.from_numpy(array[0].astype(np.float32)).permute(1, 2, 0) / 2


def add_trigger(images: Images, trigger_HWC: Tensor, strength: float = 1.0, indices: Integers | None = None) -> Images:
    """Return a copy of the images, uint8 (N, H, W, 3), with the trigger added to those at `indices` (all if None).

    Args:
        trigger_HWC: in units of [0, 1] images, of the size of the images.
        strength: what the trigger is multiplied by; Narcissus tests with 3, PureGen with 1.

    Raises:
        InputError: sizes that do not fit, indices that do not name each image once, or a strength that is no number.

    >>> import numpy as np, torch
    >>> from purifyloader.poisons import add_trigger
    >>> add_trigger(np.zeros((2, 8, 8, 3), np.uint8), torch.full((8, 8, 3), 16 / 255), indices=[1]).max(axis=(1, 2, 3))
    array([ 0, 16], dtype=uint8)
    """
    shape = (*size_of(images), 3)
    if trigger_HWC.shape != shape:
        raise InputError(f"A trigger must have the shape of the images, {shape}. Got {tuple(trigger_HWC.shape)}.")
    check_number("strength", strength, error=InputError)
    trigger = Additive(trigger_HWC.detach().to("cpu", torch.float32).numpy(), strength)
    no_labels = torch.zeros(len(images), dtype=torch.int64)
    return change_images(images, no_labels, indices, lambda x_BHWC, _, index_B: trigger.move(x_BHWC, index_B))


def backdoor(
    images: Images,
    labels: Integers,
    trigger_HWC: Tensor,
    target: int,
    count: int,
    *,
    classes: int = 10,
    seed: int = 0,
) -> tuple[Images, NDArray[np.int64]]:
    """Add the trigger to `count` images of the class `target`, chosen by `seed`; PureGen takes 1 % of the set.

    Args:
        images: uint8 (N, H, W, 3).
        labels: integers (N,).
        trigger_HWC: see `read_trigger`.

    Returns:
        The poisoned set, and the rising indices of what was poisoned in it.

    Raises:
        InputError: the class has fewer images than `count`, or what `add_trigger` refuses.

    >>> import numpy as np, torch
    >>> from purifyloader.poisons import backdoor
    >>> images, labels = np.zeros((6, 8, 8, 3), np.uint8), [0, 1, 2, 0, 1, 2]
    >>> poisoned, indices = backdoor(images, labels, torch.full((8, 8, 3), 16 / 255), target=1, count=2)
    >>> indices
    array([1, 4])
    """
    labels_N = as_labels(labels, classes)
    if len(labels_N) != len(images):
        raise InputError(f"There must be one label an image. Got {len(images)} images and {len(labels_N)} labels.")
    of_target = (labels_N == target).nonzero()[:, 0]
    if type(count) is not int or not 1 <= count <= len(of_target):
        raise InputError(
            f"count must be from 1 to the {len(of_target)} images of the class {target}. Got {count!r}: "
            "poison fewer, or another class."
        )
    chosen = drawn(of_target, count, seed, _ATTACK)
    return add_trigger(images, trigger_HWC, indices=chosen), chosen.numpy()


def attack(
    dataset: Any,
    seed: int = 0,
    *,
    trigger: str | os.PathLike[str] | Tensor | NDArray[np.floating],
    target_class: int,
    share: float | None = None,
    share_of: Literal["set", "class"] = "set",
    count: int | None = None,
) -> Poisoned:
    """Add a published trigger to some images of the class that it is to stand for.

    Args:
        dataset: see `as_arrays`; in colour.
        seed: of the choice of images.
        trigger: a published `.npy` file, in units of [-1, 1] images (see `read_trigger`), or float (H, W, 3) in units
            of [0, 1] images.
        target_class: whose images get it.
        share: of the "set" or of the "class", as `share_of` says; PureGen's 1 % of the set without a count either.
        count: so many images of the class.
    """
    images, labels = colour(dataset)
    delta = _as_trigger(trigger, images.shape[1:])
    share = 0.01 if share is None and count is None else share
    wanted = of_class(labels, target_class, share, count, share_of)
    poisoned, indices = backdoor(images, labels, delta, target_class, wanted, classes=int(labels.max()) + 1, seed=seed)
    settings = {
        "seed": operator.index(seed),
        "trigger": {"sha256": sha256_of(delta)},
        "target_class": int(target_class),
        "share": share,
        "share_of": share_of,
        "count": count,
    }
    bound = Bound("linf", float(delta.abs().max()))
    known = {"bound": bound, "trigger": Additive(delta.numpy()), "target_class": int(target_class)}
    return Poisoned.of(poisoned, labels, "narcissus", indices, **known, settings=settings)


def _as_trigger(trigger: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(trigger, str | os.PathLike):
        delta = read_trigger(trigger)
    elif isinstance(trigger, Tensor | np.ndarray):
        delta = torch.as_tensor(trigger).detach().cpu()
        if not delta.is_floating_point():
            raise InputError(f"trigger must be in floating point, in units of [0, 1] images. Got {delta.dtype}.")
    else:
        raise InputError(f"trigger must be a .npy file, a tensor or an array. Got {type(trigger).__name__}.")
    if tuple(delta.shape) != shape:
        raise InputError(f"trigger must have the shape of the images, {shape}. Got {tuple(delta.shape)}.")
    largest = float(delta.abs().max())
    if not 0 < largest <= 1:
        raise InputError(
            f"trigger must be finite, at most 1 in units of [0, 1] images, and not all zero. Got {largest:g}: divide "
            "numbers on the 0-255 scale by 255."
        )
    return delta.to(torch.float32).contiguous()
