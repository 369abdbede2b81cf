"""Train a certificate's models where the user gives no function: a small network, fast.

A certificate takes hundreds of models, so one must cost seconds. Ours is a ResNet-9 on images that were averaged over
squares of 2 x 2 pixels: on the sample of CIFAR-10, 4,000 images denoised at sigma 0.25, it has 60 % of the test images
right (two seeds), where images in full give 62 % in three times the time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from purifyloader.certify.functions import DenoisedSet
from purifyloader.core.checks import check_choice, check_integer, check_number
from purifyloader.errors import InputError
from purifyloader.pretrained.kinds import identity_of
from purifyloader.victims.networks import resnet9, victim
from purifyloader.victims.presets import TRAININGS, VICTIMS
from purifyloader.victims.training import Normalised, train_victim

__all__ = ["SmallNetwork", "Training", "with_classes"]


class SmallNetwork(nn.Module):
    """Average images as in training, and give logits: (B, 3, H, W) in [0, 1] to (B, K)."""

    def __init__(self, network: nn.Module, pool: int) -> None:
        super().__init__()
        self.network, self.pool = Normalised(network), pool

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.network(_averaged(x_BCHW, self.pool))
        return logits


@dataclass(frozen=True)
class Training:
    """Built-in training: SGD with momentum, one cycle of the learning rate, crops and flips.

    Calling it with a training set and a seed gives a network that takes images (B, 3, H, W) in [0, 1]. With one number
    of threads, on the CPU, the same set and seed give the same network.

    Attributes:
        network: of `purifyloader.victims.presets.VICTIMS`; None for a ResNet-9 of `width`.
        pool: images are averaged over squares of so many pixels, after the crop; 1 leaves them.
        pad: furthest that a crop moves, in pixels of the images as they are. So short a training wants little: 4 in
            place of 1 cost 2 to 4 points on the sample.
        lr: the highest of the cycle.
        bfloat16: of the network's arithmetic.
        start: a network to go on from, as `warm_start` gives it. It is for the caller to know from which images.
        keep_head: go on with its last layer too, which must have as many classes.

    >>> import numpy as np
    >>> from purifyloader.certify import DenoisedSet, Training
    >>> dataset = DenoisedSet(np.zeros((8, 16, 16, 3), np.uint8), [0, 1] * 4, classes=2)
    >>> network = Training(width=4, epochs=1, batch_size=8)(dataset, 0)
    >>> type(network).__name__
    'SmallNetwork'
    """

    network: str | None = None
    width: int = 16
    pool: int = 2
    pad: int = 1
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.2
    bfloat16: bool = True
    device: str = "cpu"
    start: nn.Module | None = field(default=None, repr=False)
    keep_head: bool = False

    def __post_init__(self) -> None:
        if self.network is not None:
            check_choice("network", self.network, VICTIMS)
        for name in ("width", "pool", "epochs", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("pad", self.pad, 0)
        check_number("lr", self.lr, above=0)

    def __call__(self, dataset: DenoisedSet, seed: int) -> nn.Module:
        return self._trained(dataset.data, np.asarray(dataset.targets), dataset.classes, seed)

    def _trained(self, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int, seed: int) -> nn.Module:
        if images.shape[3] != 3:
            raise InputError(
                f"The built-in training takes images of 3 channels. Got {images.shape[3]}: give a function of your own."
            )
        trained = train_victim(
            images,
            labels,
            replace(TRAININGS["short"], epochs=self.epochs, batch_size=self.batch_size, lr=self.lr),
            classes=classes,
            network=self.network or "resnet9" if self.start is None else self.start,
            width=self.width,
            keep_head=self.keep_head,
            pad=self.pad,
            # averaged after the crop, so that a crop of whole pixels is one of half pixels
            batch_transform=lambda x_BCHW, index_B, epoch: _averaged(x_BCHW, self.pool),
            seed=seed,
            device=self.device,
            bfloat16=self.bfloat16,
        )
        return SmallNetwork(trained.model, self.pool).eval()

    def warm_start(self, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int, seed: int) -> nn.Module:
        """Train a network for `start` on these images, uint8 (N, H, W, 3), as they are."""
        trained = self._trained(images, labels, classes, seed)
        assert isinstance(trained, SmallNetwork)
        return trained.network.network

    def empty(self, classes: int) -> nn.Module:
        """Make a network of this kind for weights to be loaded into."""
        return resnet9(classes, self.width) if self.network in (None, "resnet9") else victim(self.network, classes)

    def settings(self) -> dict[str, Any]:
        """Collect all that decides a network beside the training set and the seed, as JSON."""
        values = {name: value for name, value in asdict(self).items() if name not in ("start", "device")}
        settings = {"built_in": values, "start_sha256": None, "device": torch.device(self.device).type}
        if self.start is None:
            return settings
        start = identity_of(self.start)
        return {**settings, "start_sha256": start["weights_sha256"], "start_function": start["function"]}


def with_classes(network: nn.Module, classes: int, seed: int) -> nn.Module:
    """Give a network, in place, a last linear layer for so many classes, drawn by `seed`."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    last = network.get_submodule(names[-1])
    assert isinstance(last, nn.Linear)
    if last.out_features != classes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.Linear(last.in_features, classes, bias=last.bias is not None)
        parent, _, name = names[-1].rpartition(".")
        setattr(network.get_submodule(parent), name, layer.to(last.weight.device))
    return network


def _averaged(x_BCHW: Tensor, pool: int) -> Tensor:
    return x_BCHW if pool == 1 else F.avg_pool2d(x_BCHW, pool, ceil_mode=True)
