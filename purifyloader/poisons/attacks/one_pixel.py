"""One-pixel shortcuts, OPS (Wu et al. 2023, arXiv:2205.12141). For testing defences.

In every image of a class the same pixel is set to the same colour: a change of almost nothing, which a victim finds
before anything else. Nothing in it is random: the pixel is the best there is by the paper's measure.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core.checks import check_choice
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.additive import Images, Integers, as_labels, change_images, size_of
from purifyloader.poisons.attacks.choice import on_chosen_images
from purifyloader.poisons.poisoned import Bound

__all__ = ["Pixel", "attack", "ops", "ops_pixels"]

_COLOURS = tuple((red, green, blue) for red, green, blue in itertools.product((0, 255), repeat=3))
"""The corners of the colour cube: the search is over these alone (section 3.2)."""

_CHUNK = 1024  # images summed together, which bounds memory


class Pixel(NamedTuple):
    """A `Pixel` is what one class's images get, and where: colour on the scale of 0 to 255."""

    row: int
    column: int
    colour: tuple[int, int, int]


def ops_pixels(
    images: Images, labels: Integers, *, classes: int = 10, objective: Literal["paper", "code"] = "paper"
) -> list[Pixel | None]:
    """Find each class's pixel, the position and colour of the paper's Algorithm 1, by trying all; None without images.

    They maximise equation 2, mean / variance over the class's images of the distance sum_j |x_j - colour_j| (channels
    j) at the position. The sums are of integers and exact, so that no order or batch of images matters. Where the
    variance is 0 the larger mean wins; of equals the first by row, column and colour. Classes are served in order,
    and none gets a pixel and colour that another has, which would tell nothing.

    Args:
        images: uint8 (N, H, W, 3).
        labels: integers (N,) in [0, classes).
        objective: "paper" for equation 2, or "code" for what the authors' code has in its place: mean / standard
            deviation over images and channels of |x_j - colour_j|. Where channels move together the first prefers
            colours in which they cancel, such as magenta, and the second does not.

    Raises:
        InputError: images or labels of another type, shape or range, or too few pixels for so many classes.

    >>> import torch
    >>> from purifyloader.poisons import ops_pixels
    >>> images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    >>> len(ops_pixels(images, [0, 1, 0, 1], classes=2))
    2
    """
    height, width = size_of(images)
    labels_N = as_labels(labels, classes)
    check_choice("objective", objective, ("paper", "code"), error=InputError)
    if len(labels_N) != len(images):
        raise InputError(f"There must be one label an image. Got {len(images)} images and {len(labels_N)} labels.")
    free = torch.ones(height, width, len(_COLOURS), dtype=torch.bool)
    found: list[Pixel | None] = []
    for label in range(classes):
        members = (labels_N == label).nonzero()[:, 0]
        if not len(members):
            found.append(None)
            continue
        score, distance = _scores(images, members, objective)
        score[~free] = -torch.inf
        distance[(score < score.max()) | ~free] = -1
        if float(score.max()) == -torch.inf:
            raise InputError(
                f"Each class needs a pixel and colour of its own. Got {classes} classes and images of {height} x "
                f"{width}, with none left that changes class {label}: leave OPS out for these images."
            )
        row, column, colour = torch.unravel_index(distance.argmax(), distance.shape)  # of equals the first
        free[row, column, colour] = False
        found.append(Pixel(int(row), int(column), _COLOURS[int(colour)]))
    return found


def _scores(images: NDArray[np.uint8] | Tensor, members: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """Compute the objective of each position and colour, float64 (H, W, 8), and the sum of distances, int64 (H, W, 8).

    With a distance of 255 - x_j where the colour's channel is 255, and x_j where it is 0, the sum over channels is a
    constant plus signed channels, whose mean and variance for all eight colours follow from the same few moments.
    """
    height, width = images.shape[1:3]
    first = torch.zeros(height, width, 3, dtype=torch.int64)
    second = torch.zeros(height, width, 3, 3, dtype=torch.int64)
    for index in members.split(_CHUNK):
        # a numpy array is copied by indexing: torch warns of those it must not write
        x = torch.as_tensor(images[index.to(images.device) if isinstance(images, Tensor) else index.numpy()])
        x = x.cpu().to(torch.int32)
        first += x.sum(dim=0)
        for i in range(3):
            for j in range(3):
                second[:, :, i, j] += (x[..., i] * x[..., j]).sum(dim=0)
    n = len(members)
    distances, scores = [], []
    for colour in _COLOURS:
        s = torch.tensor([-1 if level else 1 for level in colour])
        signed = (s * first).sum(dim=-1)
        total = n * sum(colour) + signed  # n times the mean
        # with 0 below: inf, or nan where nothing would change
        if objective == "paper":
            squared = (s[:, None] * s * second).sum(dim=(-2, -1))
            spread = n * squared - signed * signed  # n squared times the variance
            score = (n * total).to(torch.float64) / spread
        else:
            level = torch.tensor(colour)
            squared = (n * level * level - 2 * level * first + second.diagonal(dim1=-2, dim2=-1)).sum(dim=-1)
            score = total / (3 * n * squared - total * total).to(torch.float64).sqrt()
        distances.append(total)
        scores.append(score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
    return torch.stack(scores, dim=-1), torch.stack(distances, dim=-1)


def ops(
    images: Images,
    labels: Integers,
    *,
    indices: Integers | None = None,
    classes: int = 10,
    objective: Literal["paper", "code"] = "paper",
) -> Images:
    """Return a copy of the images, uint8 (N, H, W, 3), with their class's pixel set to its colour.

    Args:
        labels: integers (N,) in [0, classes).
        indices: which images to poison, all if None; the search is over all of them.
        objective: see `ops_pixels`.

    Raises:
        InputError: images, labels or an argument of another type, shape or range.

    >>> import torch
    >>> from purifyloader.poisons import ops
    >>> images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    >>> changed = ops(images, [0, 1, 0, 1], classes=2) != images
    >>> int(changed.any(dim=3).sum())  # a pixel an image
    4
    """
    return _with_pixels(images, labels, indices=indices, classes=classes, objective=objective)[0]


def _with_pixels(
    images: Images,
    labels: Integers,
    *,
    indices: Integers | None,
    classes: int,
    objective: Literal["paper", "code"] = "paper",
) -> tuple[Images, dict[str, Any]]:
    """Search and set the pixels; also say them in JSON values."""
    pixels = ops_pixels(images, labels, classes=classes, objective=objective)
    rows, columns, colours = zip(*(pixel or Pixel(0, 0, (0, 0, 0)) for pixel in pixels), strict=True)
    row_K, column_K, colour_K3 = torch.tensor(rows), torch.tensor(columns), torch.tensor(colours) / 255

    def change(x_BHWC: Tensor, label_B: Tensor, _: Tensor) -> Tensor:
        label = label_B.to(x_BHWC.device)
        where = torch.arange(len(label), device=x_BHWC.device), row_K.to(label)[label], column_K.to(label)[label]
        x_BHWC[where] = colour_K3.to(x_BHWC.device)[label]
        return x_BHWC

    described = [None if pixel is None else pixel._asdict() | {"colour": list(pixel.colour)} for pixel in pixels]
    return change_images(images, as_labels(labels, classes), indices, change), {"pixels": described}


attack = on_chosen_images("ops", _with_pixels, lambda _: Bound("l0", 1))
