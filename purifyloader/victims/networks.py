"""Networks that are trained on poisoned data to see what a defence is worth, and the attackers' own networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from purifyloader.core.checks import check_integer
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.errors import ConfigError
from purifyloader.victims.presets import VICTIMS

__all__ = ["last_features", "resnet9", "victim"]

_OUTPUT_SCALE = 0.125  # a soft softmax at the start of training, so that a high learning rate is stable


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


class _ResNet9(nn.Module):
    """ResNet-9 of the DAWNBench CIFAR-10 entries (Page 2018); images (B, C, H, W) of 8 x 8 pixels or more."""

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


def resnet9(classes: int = 10, width: int = 16, image_channels: int = 3) -> _ResNet9:
    """Make a ResNet-9 with channels (w, 2w, 4w, 8w); the original is width 64, width 16 has 412,944 parameters."""
    for name, value in (("classes", classes), ("width", width), ("image_channels", image_channels)):
        check_integer(name, value, 1)
    return _ResNet9(classes, width, image_channels).to(memory_format=torch.channels_last)


def _resnet18(classes: int) -> nn.Module:
    """Make torchvision's ResNet-18 with the stem for small images: a 3 x 3 convolution of stride 1, and no pooling."""
    model = models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def _vgg19(classes: int) -> nn.Module:
    """Make torchvision's VGG-19 with batch norm, and one linear layer in place of three: 20 million parameters."""
    model = models.vgg19_bn(num_classes=1)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, classes)
    return model.to(memory_format=torch.channels_last)


def _densenet121(classes: int) -> nn.Module:
    """Make torchvision's DenseNet-121 with the stem for small images."""
    model = models.densenet121(num_classes=classes)
    model.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def _mobilenet_v2(classes: int) -> nn.Module:
    """Make torchvision's MobileNetV2 with its first two strides 1, for small images."""
    model = models.mobilenet_v2(num_classes=classes)
    model.features[0][0].stride = (1, 1)
    model.features[2].conv[1][0].stride = (1, 1)
    return model.to(memory_format=torch.channels_last)


class _UNetClassifier(nn.Module):
    """U-Net of a diffusion model turned into a classifier (ECLIPSE, sec. 4.4), at time 0.

    In the place of its last layer are global average pooling and a linear layer, which are a 1 x 1 convolution and
    the pooling in the other order.
    """

    def __init__(self, classes: int, config: UNetConfig) -> None:
        super().__init__()
        self.unet = UNet(config)
        width = self.unet.conv_out.in_channels
        self.unet.register_module("conv_out", nn.Identity())
        self.linear = nn.Linear(width, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        multiple = self.unet.config.size_multiple
        height, width = x_BCHW.shape[2:]
        x = F.pad(x_BCHW, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        features = self.unet(x, torch.zeros(len(x), device=x.device))[..., :height, :width]
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


def _unet(classes: int, channels: int = 16) -> _UNetClassifier:
    """Make a U-Net classifier with so many channels; 128 gives the published network of ECLIPSE."""
    config = UNetConfig() if channels == 128 else UNetConfig.small(channels=channels)
    return _UNetClassifier(classes, config).to(memory_format=torch.channels_last)


_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "resnet9": resnet9,
    "resnet18": _resnet18,
    "vgg19": _vgg19,
    "densenet121": _densenet121,
    "mobilenet_v2": _mobilenet_v2,
    "unet": _unet,
}


def last_features(network: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Return the input of a network's last linear layer, (B, F); a gradient goes through."""
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        network(x_BCHW)
    finally:
        handle.remove()
    return seen[0].float()


def victim(name: str, classes: int = 10) -> nn.Module:
    """Make a network of `VICTIMS` for images (B, 3, H, W), initialised from torch's global generator."""
    if name not in VICTIMS:
        raise ConfigError(f"A victim is one of {', '.join(VICTIMS)}. Got {name!r}.")
    check_integer("classes", classes, 1)
    maker, arguments = VICTIMS[name]
    return _MAKERS[maker](classes, *arguments)
