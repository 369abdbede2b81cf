"""Denoisers around a network that has no input for the noise level."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from purifyloader.core.checks import check_flag, check_integer
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.errors import ConfigError, InputError

__all__ = ["BlindDenoiser"]


class BlindDenoiser(Denoiser):
    """A denoiser around a network that works on images in [0, 1] and has no input for the noise level.

    Such as DnCNN (Zhang et al. 2017, arXiv:1608.03981), which predicts the noise, x - x0 (`residual=True`). sigma
    decides only whether an image is refused; `sigma_range` may be one level. The network sees images noised and neither
    scaled nor clamped, in its own dtype. It stays in this process: `pretrained.save` takes a `NetworkDenoiser` alone,
    as the code of this network is yours. Caches know it by its weights and by the settings of its layers
    (`purifyloader/purifiers/README.md`), not by that code: give another forward another name.
    """

    def __init__(
        self, network: nn.Module, sigma_range: tuple[float, float], image_channels: int = 3, residual: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ConfigError(
                "network must be a torch.nn.Module, whose weights can be copied, moved and hashed. Got "
                f"{type(network).__name__}: put it into a module's forward."
            )
        low, high = sigma_range
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"sigma_range must be 0 < low <= high, in image units. Got {sigma_range}.")
        check_integer("image_channels", image_channels, 1)
        check_flag("residual", residual)
        self.network = network
        self.sigma_range = (float(low), float(high))
        self.image_channels = image_channels
        self.residual = residual
        # among the weights, or a cache could not tell the two readings of one network apart
        self.register_buffer("gives_noise", torch.tensor(residual))

    def config(self) -> dict[str, Any]:
        """Describe it for people and fingerprints; nothing builds it back."""
        return {
            "network": {"kind": "blind", "class": type(self.network).__qualname__},
            "sigma_range": list(self.sigma_range),
            "image_channels": self.image_channels,
            "residual": self.residual,
        }

    def predict(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, None]:
        """Estimate x0, without a variance fraction; `InputError` also for a network that changes the shape."""
        self.check_call(x_BCHW, sigma_B)
        # the dtype of the first weights that a cast of the network would change
        weights = itertools.chain(self.network.parameters(), self.network.buffers())
        dtype = next((tensor.dtype for tensor in weights if tensor.is_floating_point()), x_BCHW.dtype)
        out = self.call_network(x_BCHW.to(dtype))
        if out.shape != x_BCHW.shape:
            raise InputError(
                f"The network must keep the shape of its images, {tuple(x_BCHW.shape)}. Got {tuple(out.shape)}: pad "
                "them to what it takes, and cut back, in its forward."
            )
        out = out.to(x_BCHW.dtype)
        return (x_BCHW - out if self.residual else out), None
