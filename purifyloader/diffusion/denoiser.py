"""The denoiser contract: `denoiser(x, sigma) -> x0` in image units, whatever the network predicts.

    x = x0 + sigma * noise,   x0 in [0, 1],   x neither scaled nor clamped

Inside, a network sees data in [-1, 1], where the same noise has s = 2 sigma, and its output F becomes

    D(x; s) = c_skip(s) x + c_out(s) F(c_in(s) x, time(s))

with the coefficients of its parameterization (the form of Karras et al. 2022, arXiv:2206.00364, Eq. 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from purifyloader.core.checks import check_choice
from purifyloader.core.devices import Compiled
from purifyloader.diffusion.networks import build_network, network_config, network_to_dict
from purifyloader.diffusion.plain import PlainUNet
from purifyloader.diffusion.schedule import Schedule, schedule_from_config
from purifyloader.diffusion.unet import UNet
from purifyloader.errors import ConfigError, InputError

__all__ = ["PARAMETERIZATIONS", "TIMES", "Denoiser", "NetworkDenoiser", "denoiser_from_config"]

SIGMA_DATA = 0.5  # standard deviation of image data in [-1, 1], as EDM and the consistency models take it


def _edm(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = s**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, s * SIGMA_DATA * total.rsqrt(), total.rsqrt()


PARAMETERIZATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    # the noise (Ho et al. 2020)
    "epsilon": lambda s: (torch.ones_like(s), -s, (1 + s**2).rsqrt()),
    # alpha * noise - sigma_vp * x0 (Salimans & Ho 2022)
    "v": lambda s: (1 / (1 + s**2), -s * (1 + s**2).rsqrt(), (1 + s**2).rsqrt()),
    # the image itself
    "x0": lambda s: (torch.zeros_like(s), torch.ones_like(s), (1 + s**2).rsqrt()),
    # unit variance in, unit variance out (Karras et al. 2022)
    "edm": _edm,
}
"""Output of the network: s -> (c_skip, c_out, c_in), for data in [-1, 1]."""

TIMES = ("rescaled", "timestep", "continuous")  # input of a network with a schedule; see `NetworkDenoiser`


class Denoiser(nn.Module):
    """Estimates the clean image from a noised one.

    `denoiser(x_BCHW, sigma_B) -> x0_BCHW` in [0, 1] units, unclipped; `predict` gives the variance fraction beside it.
    `sigma_range` is the noise it was trained for, in image units; outside it both raise.
    """

    sigma_range: tuple[float, float]
    image_channels: int = 3
    name: str | None = None  # of the checkpoint it was loaded from; for people, not for fingerprints
    for_people: ClassVar[tuple[str, ...]] = ("name",)

    _compiled: Compiled | None = None

    def compile_network(self, compile: bool) -> None:
        """Compile `network`, whose weights must not change any more, or not; with gradients it runs as it is.

        Raises `ConfigError` for a denoiser without such an attribute.
        """
        network = getattr(self, "network", None)
        if compile and not isinstance(network, nn.Module):
            raise ConfigError(
                "compile needs a denoiser whose attribute `network` is a module. Got "
                f"{type(self).__name__} without: leave compile out."
            )
        self._compiled = Compiled(network, constant=True) if compile else None  # type: ignore[arg-type]

    def call_network(self, *inputs: Tensor) -> Tensor:
        call = self.network if self._compiled is None or torch.is_grad_enabled() else self._compiled
        out: Tensor = call(*inputs)  # type: ignore[operator]
        return out

    def predict(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Estimate x0 and, where the network learned it, the variance fraction v in [0, 1] (else None).

        v interpolates between the two bounds of the posterior's log variance (improved-diffusion, Eq. 15): 0 is the
        lower bound, 1 the upper.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        return self.predict(x_BCHW, sigma_B)[0]

    def check_call(self, x_BCHW: Tensor, sigma_B: Tensor) -> None:
        """Raise `InputError` for other shapes of images or of sigma, or a sigma out of the range."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.image_channels:
            raise InputError(
                f"A denoiser takes images of shape (B, {self.image_channels}, H, W). Got {tuple(x_BCHW.shape)}."
            )
        if sigma_B.shape != x_BCHW.shape[:1]:
            raise InputError(f"sigma must have shape ({x_BCHW.shape[0]},), one an image. Got {tuple(sigma_B.shape)}.")
        self.check_sigma(sigma_B)

    def check_sigma(self, sigma: Tensor | float) -> None:
        if torch.compiler.is_compiling():  # looking at values would break the graph in two
            return
        low, high = self.sigma_range
        values = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        if values.numel() and not bool(((values >= low * (1 - 1e-6)) & (values <= high * (1 + 1e-6))).all()):
            least, most = float(values.min()), float(values.max())
            got = f"{least:.4g} ({255 * least:.3g} px)"
            got = got if least == most or values.numel() == 1 else f"from {got} to {most:.4g} ({255 * most:.3g} px)"
            raise InputError(
                f"This denoiser was trained for sigma from {low:.4g} to {high:.4g} "
                f"({255 * low:.3g} to {255 * high:.3g} px). Got {got}. "
                "Ask for a sigma in that range, or train a denoiser for yours."
            )


class NetworkDenoiser(Denoiser):
    """A denoiser around a network that predicts noise, v, x0 or the EDM target.

    The network is `network(x_BCHW, time_B)`, with twice the image's channels where it learned the variance. Without a
    schedule its time is 250 ln(2 sigma); the noise itself is never rounded. With one it is, for timestep t of T,
        "rescaled"    the nearest trained timestep, counted from 0, on the scale 0..1000: (t - 1) * 1000/T
        "timestep"    the nearest trained timestep, counted from 0: t - 1
        "continuous"  999 t/T, not rounded (Song et al. 2021, arXiv:2011.13456, whose t is this t/T)
    """

    def __init__(
        self,
        network: UNet | PlainUNet,
        parameterization: str,
        sigma_range: tuple[float, float],
        schedule: Schedule | None = None,
        time: str = "rescaled",
    ) -> None:
        super().__init__()
        check_choice("parameterization", parameterization, sorted(PARAMETERIZATIONS))
        low, high = sigma_range
        if not 0 < low < high < math.inf:
            raise ConfigError(f"sigma_range must be 0 < low < high, in image units. Got {sigma_range}.")
        check_choice("time", time, TIMES)
        if time != "rescaled" and schedule is None:
            raise ConfigError(f"A denoiser whose time is {time!r} needs a schedule. Got none: give schedule=.")
        self.network = network
        self.parameterization = parameterization
        self.sigma_range = (float(low), float(high))
        self.schedule = schedule
        self.time_input = time
        self.image_channels = network.config.image_channels
        self.learned_variance = network.config.learned_variance

    def config(self, every: bool = False) -> dict[str, Any]:
        """Describe it as JSON, from which `denoiser_from_config` builds it back.

        What came after the first checkpoints is left out at its default, so that theirs stay what they were; with
        `every` field it is there, so that denoisers can be told apart.
        """
        later = {} if self.time_input == "rescaled" and not every else {"time": self.time_input}
        return {
            "parameterization": self.parameterization,
            "sigma_range": list(self.sigma_range),
            "schedule": self.schedule.config(every) if self.schedule is not None else None,
            "network": network_to_dict(self.network.config, every),
            **later,
        }

    def time(self, sigma_B: Tensor) -> Tensor:
        """Compute the network's time input for each sigma, float64 on the CPU."""
        sigma_B = sigma_B.detach().to("cpu", torch.float64)
        if self.schedule is None:
            return 250 * (2 * sigma_B).log()
        timesteps = self.schedule.timesteps
        sigma = sigma_B.numpy()
        top = float(self.schedule.sigma(timesteps))
        # the same tolerance as `check_sigma`: the last level may come rounded up to float32
        sigma = np.where(sigma <= top * (1 + 1e-6), np.minimum(sigma, top), sigma)
        t_B = torch.from_numpy(self.schedule.t(sigma))
        if self.time_input == "continuous":
            return t_B * (999 / timesteps)
        t_B = t_B.round().clamp(1, timesteps)
        return (t_B - 1) * (1000 / timesteps) if self.time_input == "rescaled" else t_B - 1

    def predict(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor | None]:
        self.check_call(x_BCHW, sigma_B)
        return self.apply_network(x_BCHW, sigma_B, self.time(sigma_B))

    def apply_network(self, x_BCHW: Tensor, sigma_B: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """`predict` for a time input already known and noise already checked (for training)."""
        # float64 for B numbers costs nothing and keeps the coefficients exact
        s = 2 * sigma_B.to("cpu", torch.float64)[:, None, None, None]
        # copies that wait for nothing: a GPU would have to finish all that it was given before
        c_skip, c_out, c_in = (
            c.to(x_BCHW.dtype).to(x_BCHW.device, non_blocking=True) for c in PARAMETERIZATIONS[self.parameterization](s)
        )
        y = 2 * x_BCHW - 1
        # sizes that the levels of the network do not divide are padded by repeating the border
        h, w = x_BCHW.shape[-2:]
        multiple = self.network.config.size_multiple
        scaled = (c_in * y).to(self.network.stem.weight.dtype)
        right, below = -w % multiple, -h % multiple
        padded = F.pad(scaled, (0, right, 0, below), mode="replicate") if right or below else scaled
        times = time_B.to(torch.float32).to(x_BCHW.device, non_blocking=True)
        out = self.call_network(padded, times)[..., :h, :w]
        out = out.to(x_BCHW.dtype)
        fraction = None
        if self.learned_variance:
            out, raw = out.chunk(2, dim=1)
            fraction = (raw + 1) / 2
        return (c_skip * y + c_out * out + 1) / 2, fraction


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def denoiser_from_config(config: Mapping[str, Any]) -> NetworkDenoiser:
    """Build back, with fresh weights, what `NetworkDenoiser.config` said."""
    try:
        network = dict(config["network"])
        parameterization, sigma_range = config["parameterization"], config["sigma_range"]
        schedule, time = config["schedule"], config.get("time", "rescaled")
    except (KeyError, TypeError) as error:
        raise ConfigError(
            "A denoiser's configuration needs network, parameterization, sigma_range and schedule. "
            f"Got {sorted(config) if isinstance(config, Mapping) else type(config).__name__} ({error!r})."
        ) from None
    network.setdefault("kind", None)
    if not isinstance(sigma_range, list | tuple) or len(sigma_range) != 2 or not all(map(_is_number, sigma_range)):
        raise ConfigError(f"sigma_range must be [low, high]. Got {sigma_range!r}.")
    return NetworkDenoiser(
        build_network(network_config(network)),
        parameterization,
        (float(sigma_range[0]), float(sigma_range[1])),
        schedule_from_config(schedule) if schedule is not None else None,
        time,
    )
