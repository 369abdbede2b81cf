"""Devices by name, checked before anything is moved to them."""

from __future__ import annotations

import torch

from purifyloader.errors import InputError

__all__ = ["as_device"]


def as_device(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        InputError: no such device, or one that this machine or this build of torch does not have.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Expected a device of this machine, such as 'cpu' or 'cuda'. Got {device!r}: {reason}"
        ) from None
    return found
