"""Compute the energies of many images, each the same number whatever images come with it."""

from __future__ import annotations

import torch
from torch import Tensor

from purifyloader.core.batches import in_batches
from purifyloader.core.devices import exact_arithmetic
from purifyloader.energy.network import EnergyNetwork
from purifyloader.errors import PurifyError

__all__ = ["image_energies"]


@torch.no_grad()
def image_energies(energy: EnergyNetwork, x_BCHW: Tensor, compute_batch: int = 32) -> Tensor:
    """Compute the energy of each image, float32 (B,), in the network's own unit (PureGen divides it by a temperature).

    On one kind of device and version of torch it is a function of (weights, `compute_batch`, image).

    Args:
        energy: in float32, on the device of the images.
        x_BCHW: float images in [0, 1].
        compute_batch: images of every network call.

    Raises:
        InputError: images that the network does not take.
        PurifyError: an energy is infinite or NaN.

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
