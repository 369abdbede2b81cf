"""The networks that are trained on poisoned data to see what a defence is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from purifyloader.errors import ConfigError

__all__ = ["ResNet9", "resnet9"]

# Keeps the softmax soft at the start of training, so that a high learning rate is stable.
_OUTPUT_SCALE = 0.125


def _conv(in_channels: int, out_channels: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)]
    if pool:  # before the normalisation, as batch norm and ReLU then cost a quarter
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.branch(x_BCHW)


class ResNet9(nn.Module):
    """The ResNet-9 of the DAWNBench CIFAR-10 entries (Page 2018): `resnet9` makes one.

    Args of `forward`: normalised images (B, C, H, W), H and W at least 8. Returns logits (B, classes).
    """

    def __init__(self, classes: int, width: int, image_channels: int) -> None:
        super().__init__()
        w = width
        self.features = nn.Sequential(
            _conv(image_channels, w),
            _conv(w, 2 * w, pool=True),
            _Residual(2 * w),
            _conv(2 * w, 4 * w, pool=True),
            _conv(4 * w, 8 * w, pool=True),
            _Residual(8 * w),
        )
        self.linear = nn.Linear(8 * w, classes, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pooled_BC = self.features(x_BCHW).amax(dim=(2, 3))
        logits: Tensor = _OUTPUT_SCALE * self.linear(pooled_BC)
        return logits


def resnet9(classes: int = 10, width: int = 16, image_channels: int = 3) -> ResNet9:
    """ResNet-9 with channels (w, 2w, 4w, 8w); the original is width 64.

    With the defaults it has 412,944 parameters, small enough to train on two CPU cores.

    Raises:
        ConfigError: a size below 1.
    """
    for name, value in (("classes", classes), ("width", width), ("image_channels", image_channels)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"resnet9: {name} must be an integer of 1 or more. Got {value!r}.")
    return ResNet9(classes, width, image_channels).to(memory_format=torch.channels_last)
