"""Devices by name, checked before anything is moved to them."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

from purifyloader.errors import InputError, PurifyError

__all__ = ["as_device", "check_worker"]


def as_device(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        InputError: no such device, or one that this machine or this build of torch does not have.
    """
    try:
        found = torch.empty(0, device=torch.device(device)).device  # "cuda" with its index
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Expected a device of this machine, such as 'cpu' or 'cuda'. Got {device!r}: {reason}"
        ) from None
    return found


def check_worker(device: torch.device) -> None:
    """CUDA in a forked worker fails deep inside torch, with a message that names neither way out.

    Raises:
        PurifyError: `device` is a GPU and this is a forked DataLoader worker.
    """
    if device.type == "cuda" and get_worker_info() is not None and torch.cuda._is_in_bad_fork():
        raise PurifyError(
            "Purifying on a GPU does not work in a forked DataLoader worker. Got a purifier on "
            f"{str(device)!r}. Either give PurifiedDataset a cache= folder, so that workers only read, or "
            'start workers with DataLoader(..., multiprocessing_context="spawn").'
        )
