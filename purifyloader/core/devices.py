"""Devices by name, checked before anything is moved to them, and arithmetic that is the same in any script or batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from purifyloader.errors import InputError, PurifyError

__all__ = ["as_device", "check_worker", "device_of", "device_of_process", "exact_arithmetic", "in_batches"]


def as_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine, with its index; `InputError` if it or this build of torch does not have it."""
    try:
        actual = torch.empty(0, device=torch.device(device)).device  # "cuda" with its index
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Expected a device of this machine, such as 'cpu' or 'cuda'. Got {device!r}: {reason}"
        ) from None
    return actual


def device_of_process(name: str | None, rank: int) -> torch.device:
    """Return the device of one of several processes: for "cuda" and None each has a GPU of its own, while there are.

    None is a GPU where there is one, else the CPU; `rank` counts where no launcher has set LOCAL_RANK.
    """
    gpus = torch.cuda.device_count()
    if name is None:
        name = "cuda" if gpus else "cpu"
    if name == "cuda" and gpus:  # one for each process
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % gpus}"
    return as_device(name)


def device_of(module: nn.Module) -> torch.device | None:
    """Return where a module's weights are; None where it has none and works anywhere."""
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def check_worker(device: torch.device) -> None:
    """Raise `PurifyError` for a GPU in a forked DataLoader worker, where torch's own error names no way out."""
    if device.type == "cuda" and get_worker_info() is not None and torch.cuda._is_in_bad_fork():
        raise PurifyError(
            "Purifying on a GPU does not work in a forked DataLoader worker. Got a purifier on "
            f"{str(device)!r}. Either give PurifiedDataset a cache= folder, so that workers only read, or "
            'start workers with DataLoader(..., multiprocessing_context="spawn").'
        )


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Switch off the TF32, reduced-precision matmul, autocast and autotuned kernels that the script around has on.

    On the CPU the number of threads is rounded down to a power of two. Measured: 1, 2, 4 and 8 threads give the same
    bits, 3 do not, because the last thread's share then has another size.
    """
    backends: Any = torch.backends
    precisions = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    # each backend by itself: torch refuses to answer for all of them once a user has set one
    settings: list[tuple[Any, str, Any]] = [(b, "fp32_precision", "ieee") for b in (*precisions, backends.mkldnn.conv)]
    settings += [(backends.cudnn, "benchmark", False), (backends.cudnn, "deterministic", True)]
    before = [getattr(backend, name) for backend, name, _ in settings]
    threads = torch.get_num_threads()
    even = 1 << (threads.bit_length() - 1)
    try:
        for backend, name, value in settings:
            setattr(backend, name, value)
        if device.type == "cpu" and even != threads:
            torch.set_num_threads(even)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (backend, name, _), value in zip(settings, before, strict=True):
            setattr(backend, name, value)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


# On the CPU torch chooses the kernel of a 1x1 convolution by the number of threads where there are fewer
# images than this (ConvParams::use_mkldnn), and workers have one thread where the main process has many.
_CPU_BATCH = 16


def in_batches(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """Call `function` with exactly `size` rows of all tensors at a time; the last are filled up with copies.

    So a result is independent of the rest of its batch: kernels pick their arithmetic by the size of the batch (in
    bfloat16 3 % of 8-bit levels differ between batch sizes). On the CPU `size` is at least 16, whatever is asked for.
    """
    if tensors[0].device.type == "cpu":
        size = max(size, _CPU_BATCH)
    chunks = []
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        count = len(parts[0])
        if count < size:
            # with copies of a row, so that nothing can go wrong in the filling that does not go wrong in a row
            parts = tuple(torch.cat([part, part[-1:].expand(size - count, *part.shape[1:])]) for part in parts)
        chunks.append(function(*parts)[:count])
    return torch.cat(chunks)
