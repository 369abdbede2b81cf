"""Types of a user's training: the training set it is given, and the predictor it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["DenoisedSet", "Predictor", "Train"]

Predictor = Callable[[Tensor], Any]
"""images float32 (B, C, H, W) in [0, 1] -> class numbers, integers (B,), or logits, floats (B, K)."""

Train = Callable[["DenoisedSet", int], Predictor]
"""(training set, seed) -> predictor: the user's own training, or `purifyloader.certify.training.Training`."""


class DenoisedSet(Dataset[Any]):
    """A training set after noising and denoising, in the form of torchvision's CIFAR10.

    Attributes:
        data: uint8 (N, H, W, C).
        targets: list of N class numbers.
        classes: how many there are.
        transform: of a PIL image, for `dataset[i]`; None, and yours to set.

    Example:
        >>> import numpy as np
        >>> from purifyloader.certify import DenoisedSet
        >>> dataset = DenoisedSet(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], classes=2)
        >>> image, label = dataset[1]
        >>> image.size, label
        ((8, 8), 1)
    """

    def __init__(self, data: NDArray[np.uint8], targets: Sequence[int], classes: int) -> None:
        self.data, self.targets, self.classes = data, list(targets), classes
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, class): a PIL image, or what `transform` makes of it."""
        image = self.data[index]
        picture: Any = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        return (picture if self.transform is None else self.transform(picture)), self.targets[index]
