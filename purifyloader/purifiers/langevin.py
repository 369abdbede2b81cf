"""Purify by an energy: Langevin steps from the image itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.devices import Compiled
from purifyloader.energy import EnergyNetwork
from purifyloader.energy.walking import STEP_SIZE, check_dynamics, langevin
from purifyloader.errors import PurifyError
from purifyloader.purifiers.base import NOISE_BEFORE, pixels
from purifyloader.purifiers.networks import NetworkPurifier, check_model

__all__ = ["Langevin"]


class Langevin(NetworkPurifier):
    """Walk downhill in energy, with noise (PureGen-EBM; Bhat et al. 2024, arXiv:2405.18627, Eq. 4).

    The walk starts at the image, with no noise but that of its steps, and nothing is clamped on the way. Step i draws
    from `noise.normal(seeds, shape, i)`. An adaptive attack should know that the published network is piecewise linear:
    almost everywhere the gradient of `purify_with_grad` is that of an image left as it is. `InputError` for no energy
    model, `ConfigError` for other bad arguments.

    Args:
        energy: see `purifyloader.pretrained.load(..., kind="energy")`; copied and frozen.
        steps: Langevin steps, at most a million, each a forward and a backward pass of the network.
        step_size: the noise that a step adds, in image units.
        temperature: divides the energy; None for the one it was trained for.
        dtype: of the network's arithmetic, "float32" or "bfloat16"; the image itself stays in float32.
        compute_batch: images of every network call, at most 16,384.
        compile: compile the network with torch.compile, which takes half a minute for each shape of images.
            `purify_with_grad` runs it as it is, for it differentiates twice, and so its last bits are those of
            `compile=False`; its memory grows with the steps.

    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> from purifyloader.purifiers import Langevin
    >>> Langevin(EnergyNetwork(EnergyConfig(channels=4)), steps=3).calls
    3
    """

    kind = "langevin"
    role = "energy"
    asks = ("energy",)
    memory_format = torch.channels_last  # like the images: 1.45 times as fast in float32, more in bfloat16
    energy: EnergyNetwork

    def __init__(
        self,
        energy: EnergyNetwork,
        steps: int = 150,
        *,
        step_size: float = STEP_SIZE,
        temperature: float | None = None,
        dtype: str = "float32",
        compute_batch: int = 32,
        compile: bool = False,
    ) -> None:
        check_model("Langevin", energy, self.role)
        temperature = energy.temperature if temperature is None else temperature
        check_dynamics(steps, step_size, temperature)
        super().__init__(energy, dtype, compute_batch, compile)
        self.steps, self.step_size, self.temperature = steps, float(step_size), float(temperature)
        self.image_channels = energy.config.image_channels
        self._compiled = Compiled(self.energy) if compile else None

    def noise_first(self) -> float | str:
        return f"whose first step follows the energy of the image as it is, before it adds noise: {NOISE_BEFORE}"

    @property
    def calls(self) -> int:
        return self.steps

    def config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "steps": self.steps,
            "step_size": self.step_size,
            "step_px": pixels(self.step_size),
            "temperature": self.temperature,
            **self.network_config(),
            "compile": self.compiles,
        }

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        shape = x_BCHW.shape[1:]
        differentiable = torch.is_grad_enabled() and x_BCHW.requires_grad
        try:
            return langevin(
                self.energy if differentiable or self._compiled is None else self._compiled,
                x_BCHW.contiguous(memory_format=torch.channels_last),
                self.steps,
                lambda step: noise.normal(seeds_B, shape, step).contiguous(memory_format=torch.channels_last),
                step_size=self.step_size,
                temperature=self.temperature,
            ).contiguous()
        except RuntimeError as error:
            if "fork-based multiprocessing" not in str(error):
                raise
            raise PurifyError(
                "Langevin steps need gradients, which torch does not compute in a forked DataLoader worker once its "
                "parent has computed some on a GPU. Either give PurifiedDataset a cache= folder, so that workers only "
                'read, or start workers with DataLoader(..., multiprocessing_context="spawn").'
            ) from None
