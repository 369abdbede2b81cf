"""What the scripts beside this one share: the CIFAR-10 sample as a torchvision dataset, and a small model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.datasets import VisionDataset

from purifyloader.datasets.splits import load_sample
from purifyloader.victims.networks import resnet9

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DATA = Path(__file__).parents[1] / "data"


class Sample(VisionDataset):
    """(PIL image, label), as `torchvision.datasets.CIFAR10` gives them."""

    def __init__(self, count: int, transform: Callable[[Any], Any] | None = None) -> None:
        super().__init__(DATA, transform=transform)
        images, labels = load_sample(DATA, "train")
        self.data, self.targets = images[:count], labels[:count].tolist()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def model() -> nn.Module:
    torch.manual_seed(0)
    return resnet9(width=8)


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="of the sample")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    return parser.parse_args()


def report(epoch: int, losses: list[float]) -> None:
    print(f"epoch {epoch}: loss {losses[0]:.3f} -> {losses[-1]:.3f} over {len(losses)} steps")
