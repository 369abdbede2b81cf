"""The networks that a denoiser may have, by the kind that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from purifyloader.core.checks import check_choice
from purifyloader.diffusion.plain import PlainUNet, PlainUNetConfig
from purifyloader.diffusion.unet import UNet, UNetConfig

__all__ = ["NetworkConfig", "build_network", "kind_of_network", "network_config", "network_to_dict"]

NetworkConfig = UNetConfig | PlainUNetConfig

_UNET = "unet"
_KINDS: dict[str, tuple[type[NetworkConfig], type[UNet] | type[PlainUNet]]] = {
    _UNET: (UNetConfig, UNet),
    "plain-unet": (PlainUNetConfig, PlainUNet),
}


def kind_of_network(config: NetworkConfig) -> str:
    """Return the kind by which `network_config` finds the class of a configuration."""
    return next(kind for kind, (cls, _) in _KINDS.items() if type(config) is cls)


def build_network(config: NetworkConfig) -> UNet | PlainUNet:
    """Build a network, with fresh weights."""
    return UNet(config) if isinstance(config, UNetConfig) else PlainUNet(config)


def network_config(values: Mapping[str, Any]) -> NetworkConfig:
    """Read a network's configuration from its fields and its kind, which is a "unet" where they have none."""
    fields = dict(values)
    kind = fields.pop("kind", _UNET)
    check_choice("The network's kind", kind, _KINDS)
    return _KINDS[kind][0].from_dict(fields)


def network_to_dict(config: NetworkConfig, every: bool = False) -> dict[str, Any]:
    """Describe it as JSON, which `network_config` reads; of `every` see `UNetConfig.to_dict`."""
    return {"kind": kind_of_network(config), **config.to_dict(every)}
