"""Purifiers around a network. All of them call it with a fixed number of images: see `purifyloader.core.devices`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from purifyloader.core import limits, noise
from purifyloader.core.checks import check_choice, check_flag, check_integer, check_number
from purifyloader.core.devices import in_batches, warn_of_bfloat16
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.diffusion.schedule import CosineSchedule, Schedule, schedule_from_config, spaced_sigmas
from purifyloader.errors import ConfigError, InputError
from purifyloader.pretrained.kinds import KINDS, identity_of, kind_of
from purifyloader.purifiers.base import Purifier, Resolver, pixels

__all__ = ["DenoiseOnce", "Diffuse"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_model(taker: str, model: Any, kind: str) -> None:
    """Raise `InputError` unless this is a model of a kind; `taker` is what asks for one."""
    wanted, other = KINDS[kind], kind_of(model)
    if other is wanted:
        return
    hint = "" if other is None else f" {other.words[0].upper()}{other.words[1:]} goes into {other.used_by}."
    raise InputError(
        f"{taker} takes {wanted.words}, as `purifyloader.pretrained.load(...{wanted.load_argument})` gives. "
        f"Got {type(model).__name__}.{hint}"
    )


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Copy a module as `copy.deepcopy` does, in less than half the time.

    Most of the time goes into the dozen collections of a module that are empty, of hooks and the like.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for value in vars(part).values():
            if type(value) in (OrderedDict, dict, set) and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)


def known_hashes(model: nn.Module, own: nn.Module, role: str, identity: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of the weights of a model's own copy, by its attribute, where it has the types of before."""
    types = ([t.dtype for t in chain(part.parameters(), part.buffers())] for part in (model, own))
    return {role: identity["weights_sha256"]} if next(types) == next(types) else {}


class NetworkPurifier(Purifier):
    """A purifier around a network, run in chunks of exactly `compute_batch` images (at least 16 on the CPU).

    The model is copied in `dtype` and one memory format, as another would choose other kernels, and so other bits.
    `role` is the attribute that has it, its key in the configuration, and the kind of model that it must be.
    """

    role: ClassVar[str]
    asks: ClassVar[tuple[str, ...]] = ()  # the role for a `Resolver`; one of denoisers alone takes the entry alone

    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format  # where a network says no other

    def __init__(self, model: nn.Module, dtype: str, compute_batch: int, compile: bool) -> None:
        check_model(type(self).__name__, model, self.role)
        super().__init__()
        check_flag("compile", compile)
        check_choice("dtype", dtype, DTYPES)
        check_integer("compute_batch", compute_batch, 1, limits.COMPUTE_BATCH)
        self.dtype = dtype
        self.compute_batch = compute_batch
        self.compiles = compile
        self._entry = identity_of(model)  # before any cast
        self.image_channels = KINDS[self.role].image_channels(model)
        own = copied(model)
        memory_format = getattr(getattr(model, "network", None), "memory_format", self.memory_format)
        own.to(dtype=DTYPES[dtype], memory_format=memory_format).requires_grad_(False)
        setattr(self, self.role, own)
        self._hashes = known_hashes(model, own, self.role, self._entry)
        self.eval()

    def network_config(self) -> dict[str, Any]:
        later = {"compile": True} if self.compiles else {}  # so that earlier configurations stay what they were
        return {self.role: self._entry, "dtype": self.dtype, "compute_batch": self.compute_batch, **later}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values = {name: value for name, value in values.items() if name not in ("sigma_px", "step_px")}  # for people
        return cls(resolve(values.pop(cls.role), *cls.asks), **values)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        if self.dtype == "bfloat16":
            warn_of_bfloat16(x_BCHW.device)
        x_BCHW = x_BCHW.contiguous()  # channels-last memory would choose other kernels, and so other bits
        return in_batches(self.run_chunk, self.compute_batch, x_BCHW, seeds_B) if len(x_BCHW) else x_BCHW

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        raise NotImplementedError


class _DenoiserPurifier(NetworkPurifier):
    role = "denoiser"
    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser, dtype: str, compute_batch: int, compile: bool) -> None:
        super().__init__(denoiser, dtype, compute_batch, compile)
        self.denoiser.compile_network(compile)


class DenoiseOnce(_DenoiserPurifier):
    """Add noise of exactly sigma and denoise in one network call (Hong et al. 2024; Carlini et al. 2023).

    sigma is in image units, within `denoiser.sigma_range`, or `InputError`. See `Diffuse` for the other arguments.

    >>> from purifyloader import pretrained
    >>> from purifyloader.purifiers import DenoiseOnce
    >>> DenoiseOnce(pretrained.load("cifar10-sparse"), sigma=0.1).calls
    1
    """

    kind = "denoise-once"
    calls = 1

    def __init__(
        self,
        denoiser: Denoiser,
        sigma: float,
        *,
        dtype: str = "float32",
        compute_batch: int = 32,
        compile: bool = False,
    ) -> None:
        super().__init__(denoiser, dtype, compute_batch, compile)
        check_number("sigma", sigma)
        denoiser.check_sigma(float(sigma))
        self.sigma = float(sigma)

    def noise_first(self) -> float | str:
        return self.sigma

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "sigma": self.sigma, "sigma_px": pixels(self.sigma), **self.network_config()}

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        noised = x_BCHW + self.sigma * noise.normal(seeds_B, x_BCHW.shape[1:])
        return self.denoiser(noised, torch.full((len(x_BCHW),), self.sigma, dtype=torch.float64, device="cpu"))


class Diffuse(_DenoiserPurifier):
    """Noise to a level, then sample back down to 0 (ECLIPSE, Algorithm 1; DiffPure).

    `InputError` for no denoiser, one that was not trained for this noise, or no such t or steps; `ConfigError` for
    other bad arguments.

    Args:
        denoiser: see `purifyloader.pretrained.load`; copied and frozen.
        t: timestep to noise to, read through `schedule`,
        sigma: or its noise level, in image units (25 px is 25/255).
        steps: network calls (NFE), at most a million, evenly spaced in t; None for every timestep with `t`, and one
            with `sigma`.
        schedule: ECLIPSE's cosine one with T = 4000 by default.
        sampler: "ancestral" or "ddim".
        dtype: of the network's arithmetic, "float32" or "bfloat16".
        compute_batch: images of every network call, at most 16,384, which decides what kernels run.
        compile: compile the network with torch.compile, ten seconds to a minute for each shape of images;
            `purify_with_grad` does without.

    >>> from purifyloader import pretrained
    >>> from purifyloader.purifiers import Diffuse
    >>> Diffuse(pretrained.load("cifar10-sparse"), sigma=0.1, steps=4).calls
    4
    """

    kind = "diffuse"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        t: float | None = None,
        sigma: float | None = None,
        steps: int | None = None,
        schedule: Schedule | None = None,
        sampler: str = "ancestral",
        dtype: str = "float32",
        compute_batch: int = 32,
        compile: bool = False,
    ) -> None:
        super().__init__(denoiser, dtype, compute_batch, compile)
        if (t is None) == (sigma is None):
            raise ConfigError(f"Give the noise level as t or as sigma, one of them. Got t={t!r}, sigma={sigma!r}.")
        check_number("t" if sigma is None else "sigma", t if sigma is None else sigma)
        check_choice("sampler", sampler, SAMPLERS)
        self.schedule = CosineSchedule(4000) if schedule is None else schedule
        self.t, self.sigma = t, sigma
        if steps is None:
            if t is not None and t != int(t):
                raise ConfigError(f"A fractional t needs steps, the number of network calls. Got t={t}.")
            steps = 1 if t is None else int(t)
        self.steps = steps
        self.sampler = sampler
        if sigma is not None:
            denoiser.check_sigma(float(sigma))
            t = float(self.schedule.t(sigma))
        assert t is not None
        levels = spaced_sigmas(self.schedule, t, steps)
        # a sigma asked for is used as it is, not as it comes back from the schedule
        self.sigmas = levels if sigma is None else (float(sigma), *levels[1:])
        denoiser.check_sigma(torch.tensor(self.sigmas[:-1], dtype=torch.float64, device="cpu"))

    @property
    def calls(self) -> int:
        return self.steps

    def noise_first(self) -> float | str:
        return self.sigmas[0]  # the samplers see the noised image alone, and draw other noise

    def config(self) -> dict[str, Any]:
        level = {"t": self.t} if self.sigma is None else {"sigma": self.sigma}
        return {
            "kind": self.kind,
            **level,
            "sigma_px": pixels(self.sigmas[0]),
            "steps": self.steps,
            "schedule": self.schedule.config(),
            "sampler": self.sampler,
            **self.network_config(),
        }

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return super().build({**values, "schedule": schedule_from_config(values["schedule"])}, resolve)

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        shape = x_BCHW.shape[1:]
        noised = x_BCHW + self.sigmas[0] * noise.normal(seeds_B, shape)
        return SAMPLERS[self.sampler](
            self.denoiser, noised, self.sigmas, lambda step: noise.normal(seeds_B, shape, step + 1)
        )
