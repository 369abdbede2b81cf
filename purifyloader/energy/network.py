"""Give each image one number by PureGen's energy network, a residual one (Bhat et al. 2024, arXiv:2405.18627).

The network is the discriminator of SNGAN (Miyato et al. 2018, arXiv:1802.05957, Table 4a) without spectral
normalisation and with the mean over pixels where that has their sum. Nothing in it normalises, so the energy of an
image depends on no other image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from purifyloader.core import limits
from purifyloader.core.checks import check_integer
from purifyloader.core.devices import exact_arithmetic, in_batches
from purifyloader.energy.walking import TEMPERATURE, check_dynamics
from purifyloader.errors import ConfigError, InputError, PurifyError

__all__ = ["EnergyConfig", "EnergyNetwork", "energy_from_config", "image_energies"]

_SIZE_MIN = 4  # two halvings must leave a pixel


@dataclass(frozen=True)
class EnergyConfig:
    """The shape of an `EnergyNetwork`. The default is the published one, 1,053,824 parameters.

    Widths are at most 65,536 channels.

    >>> from purifyloader.energy import EnergyConfig
    >>> EnergyConfig(channels=4).to_dict()
    {'channels': 4, 'image_channels': 3}
    """

    channels: int = 128  # width of every block
    image_channels: int = 3

    def __post_init__(self) -> None:
        check_integer("EnergyConfig.channels", self.channels, 1, limits.NETWORK_WIDTH)
        check_integer("EnergyConfig.image_channels", self.image_channels, 1, limits.NETWORK_WIDTH)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EnergyConfig:
        known = sorted(f.name for f in fields(cls))
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"EnergyConfig has the fields {known}. Got {unknown}. Remove them.")
        return cls(**values)


class EnergyBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; halves the resolution by a 2x2 mean where `down`.

    The `first` sees the image: no activation before its first convolution, and its skip takes the mean before its 1x1
    convolution.
    """

    def __init__(self, c_in: int, c_out: int, *, down: bool = False, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if down or c_in != c_out else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x_BCHW if self.first else F.relu(x_BCHW))))
        if not self.down:
            return h + self.skip(x_BCHW)
        if self.first:
            return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x_BCHW, 2))
        # the mean of a sum is the sum of the means
        return F.avg_pool2d(h + self.skip(x_BCHW), 2)


class EnergyNetwork(nn.Module):
    """`network(x_BCHW) -> energy_B`, low where an image looks like those it was trained on.

    Images are float in [0, 1], neither clamped nor refused outside (Langevin steps leave the range); inside, the
    network sees [-1, 1]. Any height and width from 4 pixels; where they are not multiples of 4 the last rows and
    columns count for less, as in the published network. The energy has no unit and no zero: only differences count, and
    PureGen divides them by a temperature of 1e-4. Training and evaluation mode are the same.

    Args:
        temperature: T, for which it was trained: images are as frequent as exp(-E / T). Langevin steps divide by it.

    >>> import torch
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> EnergyNetwork(EnergyConfig(channels=4))(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2])
    """

    name: str | None = None  # of the checkpoint it was loaded from; for people, not for fingerprints
    for_people: ClassVar[tuple[str, ...]] = ("name",)

    def __init__(self, config: EnergyConfig | None = None, temperature: float = TEMPERATURE) -> None:
        super().__init__()
        check_dynamics(temperature=temperature)
        self.temperature = float(temperature)
        self.config = config = EnergyConfig() if config is None else config
        c = config.channels
        self.blocks = nn.Sequential(
            EnergyBlock(config.image_channels, c, down=True, first=True),
            EnergyBlock(c, c, down=True),
            EnergyBlock(c, c),
            EnergyBlock(c, c),
        )
        self.readout = nn.Linear(c, 1, bias=False)
        for module in self.modules():  # as published
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def describe(self, every: bool = False) -> dict[str, Any]:
        """Describe the network as JSON, from which `energy_from_config` builds it back; `every` field, or as saved."""
        own = {} if self.temperature == TEMPERATURE and not every else {"temperature": self.temperature}
        return {"network": {"kind": "resnet", **self.config.to_dict()}, **own}

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Compute the energies of images (B, C, H, W); `InputError` for other channels, integers, or sides below 4."""
        channels = self.config.image_channels
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels or min(x_BCHW.shape[2:]) < _SIZE_MIN:
            raise InputError(
                f"An energy network takes images of shape (B, {channels}, H, W), H and W at least {_SIZE_MIN}. "
                f"Got {tuple(x_BCHW.shape)}. Give a batch of images."
            )
        if not x_BCHW.is_floating_point():
            raise InputError(
                f"An energy network takes floating-point images in [0, 1]. Got {x_BCHW.dtype}. Divide bytes by 255."
            )
        h = self.blocks((2 * x_BCHW - 1).to(self.readout.weight.dtype))
        # the mean and the readout in float32 at least: in bfloat16 differences of energies would be lost in rounding
        pooled_BC = F.relu(h).to(torch.promote_types(h.dtype, torch.float32)).mean(dim=(2, 3))
        return (pooled_BC * self.readout.weight[0].to(pooled_BC.dtype)).sum(dim=1).to(x_BCHW.dtype)


def energy_from_config(config: Mapping[str, Any]) -> EnergyNetwork:
    """Build the network that `EnergyNetwork.describe` described, with new weights."""
    network = config.get("network") if isinstance(config, Mapping) else None
    if not isinstance(network, Mapping) or (kind := network.get("kind")) != "resnet":
        got = repr(kind) if isinstance(network, Mapping) else type(network).__name__
        raise ConfigError(f"An energy model's configuration needs a network of the kind 'resnet'. Got {got}.")
    shape = EnergyConfig.from_dict({key: value for key, value in network.items() if key != "kind"})
    return EnergyNetwork(shape, config.get("temperature", TEMPERATURE))


@torch.no_grad()
def image_energies(energy: EnergyNetwork, x_BCHW: Tensor, compute_batch: int = 32) -> Tensor:
    """Compute the energy of each image, float32 (B,), in the network's own unit (PureGen divides it by a temperature).

    On one kind of device and version of torch it is a function of (weights, `compute_batch`, image). `PurifyError` for
    an energy that is infinite or NaN.

    Args:
        energy: in float32, on the device of the images.
        x_BCHW: float images in [0, 1].
        compute_batch: images of every network call.

    >>> import torch
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork, image_energies
    >>> image_energies(EnergyNetwork(EnergyConfig(channels=4)), torch.rand(5, 3, 8, 8)).shape
    torch.Size([5])
    """
    if len(x_BCHW) == 0:
        return x_BCHW.new_zeros(0, dtype=torch.float32)
    with exact_arithmetic(x_BCHW.device):
        energy_B = in_batches(energy, compute_batch, x_BCHW.float().contiguous())
    if not bool(energy_B.isfinite().all()):
        first = int((~energy_B.isfinite()).nonzero()[0])
        raise PurifyError(
            f"Energies must be finite. Got {float(energy_B[first])} for image {first} of {len(energy_B)}: the energy "
            f"model {energy.name or '(unnamed)'} is broken, or the image is not in [0, 1]."
        )
    return energy_B
