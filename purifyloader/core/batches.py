"""Network calls of one fixed number of images, so that an image's result does not depend on its company.

Kernels pick their arithmetic by the size of the batch (in bfloat16 3 % of 8-bit levels differ between batch sizes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_batches"]

# On the CPU torch chooses the kernel of a 1x1 convolution by the number of threads where there are fewer
# images than this (ConvParams::use_mkldnn), and workers have one thread where the main process has many.
_CPU_BATCH = 16


def in_batches(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """`function` of all rows, called with exactly `size` rows at a time; the last are filled up with copies.

    Args:
        function: takes as many tensors as are given and gives one row for each of theirs.
        size: on the CPU at least 16 are taken, whatever is asked for.
        tensors: of one length, at least one row, on one device.
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
