"""Weights in training: the network, its running average, and the moments of its optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from purifyloader.train.state import Groups

__all__ = ["Weights"]

Network = TypeVar("Network", bound=nn.Module)

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW; plain gradient descent has none


class Weights(Generic[Network]):
    """A network after `step` steps, its average, and its optimiser: Adam, AdamW, or plain gradient descent.

    `ema_decay` is of the average, (1 + step) / (10 + step) while that is smaller, 0 for none. A `fused` optimiser keeps
    its count of steps beside the parameters.
    """

    def __init__(
        self,
        network: Network,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        ema_decay: float,
        fused: bool = False,
    ) -> None:
        self.step = 0
        self.network = network
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.parameters = dict(network.named_parameters())
        self.optimizer = optimizer(self.parameters.values())
        self._ema_decay, self._fused = ema_decay, fused

    def update(self, rate: float) -> None:
        """Take one step with the gradients there are."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        decay = min(self._ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.parameters.values()), 1 - decay)
        self.step += 1

    def clip(self, norm: float) -> float:
        """Scale the gradients down to `norm` where they are larger; return the norm that they had."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), norm))

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.average.parameters())

    def groups(self) -> Groups:
        """Return everything that a state file holds of the weights."""
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        moments = {m: {name: state[m] for name, state in states.items() if m in state} for m in _MOMENTS}
        return {"model": self.network.state_dict(), "average": self.average.state_dict(), **moments}

    def moments(self, step: int) -> Groups:
        """Return tensors with the shapes of the moments after `step` steps."""
        has = step > 0 and "betas" in self.optimizer.defaults
        return {moment: dict(self.parameters) for moment in _MOMENTS if has}

    def restore(self, step: int, groups: Groups) -> None:
        """Take over what `groups` returned after `step` steps."""
        self.step = step
        self.network.load_state_dict(groups["model"])
        self.average.load_state_dict(groups["average"])
        for name, parameter in self.parameters.items():
            if name in groups.get(_MOMENTS[0], {}):
                # in the memory format of the parameter, which fused kernels rely on
                if bool((groups[_MOMENTS[1]][name] < 0).any()):
                    raise ValueError(f"a mean of squares, of {name}, is negative")
                moments = {m: torch.empty_like(parameter).copy_(groups[m][name]) for m in _MOMENTS}
                count: Tensor = torch.tensor(float(step), device=parameter.device if self._fused else "cpu")
                self.optimizer.state[parameter] = {"step": count, **moments}
