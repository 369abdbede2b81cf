"""Share each step of a training among the processes that torch.distributed has joined."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from purifyloader.errors import ConfigError
from purifyloader.files.atomic import canonical_json

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """The number of this process and of all that train together; alone, nothing below communicates."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def own(self, batch_size: int) -> slice:
        """Return the positions of a batch that this process takes."""
        if batch_size % self.world_size:
            raise ConfigError(
                f"batch_size must be a multiple of the number of processes, {self.world_size}, which share each batch. "
                f"Got {batch_size}."
            )
        share = batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return True where `flag` is in at least one process."""
        return flag if self.world_size == 1 else self.mean({"flag": float(flag)}, device)["flag"] > 0

    def mean(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Return the mean of each value over all processes, so that all of them judge, and stop, alike."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        return dict(zip(values, (sums / self.world_size).tolist(), strict=True))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the mean over all processes into the gradients."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        flat /= self.world_size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def check_same(self, values: dict[str, Any], device: torch.device) -> None:
        """Raise `ConfigError` where another process has another value, such as the images in another order."""
        if self.world_size == 1:
            return
        digests = [hashlib.sha256(canonical_json(value).encode()).digest()[:8] for value in values.values()]
        own = torch.tensor([[int.from_bytes(digest, "big", signed=True) for digest in digests]], device=device)
        if differing := [n for n, column in zip(values, self.gather(own).T, strict=True) if len(column.unique()) > 1]:
            raise ConfigError(
                f"All processes of a training need the same configuration and images. Got another "
                f"{' and another '.join(differing)} in one of {self.world_size} processes. Start them with the same "
                "options, sort what lists the images, and seed what shuffles them."
            )

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return rows
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)
