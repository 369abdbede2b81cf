"""Images that say which they are and how often they were purified, and the purifier that counts."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader.purifiers import Purifier

SIZE = 8


class Counting(Purifier):
    """Adds 1 to the level of every pixel of the first channel; the others say which image it is."""

    kind = "test-counting"

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        out = x_BCHW.clone()
        out[:, 0] += 1 / 255
        return out


class Seeds(Purifier):
    """Pixels that are a function of the seed alone: which draw an image got."""

    kind = "test-seeds"

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        levels = torch.stack([(seeds_B >> 8 * i) & 0xFF for i in range(3)], 1).float() / 255
        return levels[:, :, None, None].expand(x_BCHW.shape)


def numbered(count: int, size: int = SIZE) -> Tensor:
    """uint8 (count, 3, size, size): level 0 of the first channel, the number of the image in the two others."""
    number = torch.arange(count)
    levels = torch.stack([torch.zeros_like(number), number // 256, number % 256], 1).to(torch.uint8)
    return levels[:, :, None, None].expand(-1, -1, size, size).contiguous()


def read(images: Tensor) -> tuple[list[int], list[int]]:
    """The number of each image, (B, 3, H, W) uint8 or float in [0, 1], and how often it was purified."""
    levels = images if images.dtype == torch.uint8 else (images.float() * 255).round().to(torch.uint8)
    flat = levels.flatten(2)
    assert bool((flat == flat[:, :, :1]).all()), "an image is no longer of one colour"
    times, high, low = flat[:, :, 0].long().unbind(1)
    return (256 * high + low).tolist(), times.tolist()


class Numbered(Dataset[Any]):
    """(image, number) of numbered images, as PIL or through a transform."""

    def __init__(self, count: int, transform: Any = None) -> None:
        self.images, self.transform = numbered(count), transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index].permute(1, 2, 0).numpy())
        return (image if self.transform is None else self.transform(image)), index

    def __len__(self) -> int:
        return len(self.images)
