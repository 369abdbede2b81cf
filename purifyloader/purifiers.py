"""The algebra: what can be done to an image batch to wash a poison out of it, and how to compose it.

A purifier is `purifier(x_BCHW, seeds_B) -> x_BCHW`: frozen, stateless, float32. Images of many sizes go
through `purify_images`; `Resize` and `Tiles` bring them to one. The pixels of an image are a function of
(weights, configuration, seed, image) alone. Kernels pick their arithmetic by batch size, so every network
call is padded to a fixed `compute_batch`; noise is a function of the image's seed (`purifyloader.noise`); a
composition gives each stage, repetition and tile a child seed.

Every purifier says itself as JSON (`to_json`) and is built back from it (`from_json`) through a closed
table of names. Plugins add theirs under the entry point group `purifyloader.purifiers`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from itertools import islice
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from purifyloader import corruptions, noise, sizes
from purifyloader.devices import exact_arithmetic
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.diffusion.schedule import CosineSchedule, Schedule, schedule_from_config, spaced_sigmas
from purifyloader.diffusion.weights import weights_sha256
from purifyloader.errors import ConfigError, InputError
from purifyloader.files import canonical_json
from purifyloader.images import to_unit

__all__ = [
    "SCHEMA",
    "Chain",
    "Compensation",
    "DenoiseOnce",
    "Diffuse",
    "Jpeg",
    "Purifier",
    "Repeat",
    "Resize",
    "Tiles",
    "from_config",
    "from_json",
]

SCHEMA = 1
"""Version of the JSON that purifiers say themselves in."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# On the CPU torch chooses the kernel of a 1x1 convolution by the number of threads where there are fewer
# images than this (ConvParams::use_mkldnn), and workers have one thread where the main process has many.
_CPU_BATCH = 16

Resolver = Callable[[Mapping[str, Any]], Denoiser]
"""Finds the denoiser that a configuration's "denoiser" entry (name, weights_sha256) means."""


class Purifier(nn.Module):
    """Base of all purifiers: `purifier(x_BCHW, seeds_B) -> x_BCHW`.

    Args of a call:
        x_BCHW: float images in [0, 1].
        seeds_B: int64, one an image: `noise.image_keys(seed, epoch, index)`.

    Returns:
        float32 images, nominally in [0, 1] and not clamped; of the same shape, for all purifiers but
        `Resize` (`output_shape` says which).

    Raises:
        InputError: another type, shape or range, NaN, or seeds that do not match the batch.

    `purify_images` does the same to a list of images of different sizes.
    """

    kind: ClassVar[str]
    image_channels: int | None = None
    """Channels it takes, None for any."""

    def config(self) -> dict[str, Any]:
        """The configuration as plain data, with its `kind`; `from_config` builds it back."""
        raise NotImplementedError

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        """The inverse of `config` (whose `kind` is gone from `values`)."""
        return cls(**values)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        """The purification itself, on checked float32 input; values may leave [0, 1] between stages.

        The images keep their shape, unless `output_shape` says otherwise.
        """
        raise NotImplementedError

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        """`run` on checked float32 images (C, H, W) of any sizes: those of one shape together, in one batch."""
        by_shape: dict[torch.Size, list[int]] = {}
        for row, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(row)
        out = list(images)
        for rows in by_shape.values():
            results = self.run(torch.stack([images[row] for row in rows]), seeds_B[rows])
            for row, x in zip(rows, results, strict=True):
                out[row] = x
        return out

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) in which an image of `shape` comes out: the same, unless a `Resize` is inside."""
        return shape

    def identity(self) -> dict[str, Any]:
        """What decides the pixels: the configuration without the names that are only for people."""
        identity = _without_names(self.config())
        assert isinstance(identity, dict)
        return identity

    def to_json(self) -> str:
        return canonical_json({"schema": SCHEMA, "purifier": self.config()})

    def forward(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        with torch.no_grad():
            return self.purify_with_grad(x_BCHW, seeds_B)

    def purify_with_grad(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        """The same, with gradients of the input: for attacks that adapt to the purifier."""
        if not isinstance(x_BCHW, Tensor) or x_BCHW.ndim != 4 or not x_BCHW.is_floating_point():
            raise InputError(f"A purifier takes a float tensor of shape (B, C, H, W). Got {_described(x_BCHW)}.")
        self._check_pixels(x_BCHW, "image to purify")
        _check_seeds(seeds_B, len(x_BCHW))
        with exact_arithmetic(x_BCHW.device):
            return self.run(x_BCHW.float(), seeds_B.to(x_BCHW.device))

    def purify_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        """Images of different sizes at once: each is, bit for bit, what the purifier makes of it alone.

        Images of one shape are one batch; a purifier with a network pads each shape's to `compute_batch`,
        so many sizes are cheap only where a `Resize` (with a crop) or `Tiles` makes them one.

        Memory: all images, their results and, with `Tiles`, all their tiles are held at the same time,
        beside the network's own for `compute_batch` images. Give a data set in batches. Images of one shape
        may come back as views of one tensor.

        Args:
            images: float (C, H, W) in [0, 1], of any sizes, on one device.
            seeds_B: int64, one an image: `noise.image_keys(seed, epoch, index)`.

        Returns:
            float32 images in the order they came, of the shapes that `output_shape` says; an empty list
            for an empty list.

        Raises:
            InputError: another type, shape, range or device, NaN, or seeds that do not match the images.
        """
        if not isinstance(images, Sequence):
            raise InputError(
                f"purify_images takes a list of float tensors (C, H, W). Got {_described(images)}: "
                "for one tensor of images call the purifier itself."
            )
        for i, image in enumerate(images):
            if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
                raise InputError(
                    f"purify_images takes float tensors of shape (C, H, W). Got {_described(image)} as image {i}."
                )
            if image.device != images[0].device:
                raise InputError(
                    f"purify_images takes images on one device. Got {images[0].device} and, for image {i}, "
                    f"{image.device}: move them to one."
                )
            self._check_pixels(image, f"image to purify (number {i})")
        _check_seeds(seeds_B, len(images))
        if not images:
            return []
        device = images[0].device
        with torch.no_grad(), exact_arithmetic(device):
            return self.run_images([image.float() for image in images], seeds_B.to(device))

    def _check_pixels(self, x: Tensor, what: str) -> None:
        """Channels, size and range of an image or a batch."""
        if self.image_channels not in (None, x.shape[-3]):
            raise InputError(
                f"This purifier takes images of {self.image_channels} channels. Got {tuple(x.shape)} for the {what}."
            )
        if 0 in x.shape[-3:]:
            raise InputError(f"An {what} needs at least one pixel and one channel. Got {tuple(x.shape)}.")
        to_unit(x.detach(), what)

    def train(self, mode: bool = True) -> Self:
        """Purifiers are never in training mode, whatever module holds them."""
        return super().train(False)


class _NetworkPurifier(Purifier):
    """A purifier around a denoiser, run in chunks of exactly `compute_batch` images.

    Args:
        denoiser: copied and frozen; the original is left alone.
        dtype: of the network's arithmetic, "float32" or "bfloat16".
        compute_batch: images of every network call (at least 16 on the CPU); part of the configuration,
            for it decides which kernels run.
    """

    def __init__(self, denoiser: Denoiser, dtype: str, compute_batch: int) -> None:
        super().__init__()
        if not isinstance(denoiser, Denoiser):
            raise InputError(
                f"Expected a denoiser, as `purifyloader.pretrained.load` gives. Got {type(denoiser).__name__}."
            )
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {sorted(DTYPES)}. Got {dtype!r}.")
        if not isinstance(compute_batch, int) or compute_batch < 1:
            raise ConfigError(f"compute_batch must be a positive integer. Got {compute_batch!r}.")
        self.dtype = dtype
        self.compute_batch = compute_batch
        self.image_channels = denoiser.image_channels
        self._denoiser_config = {"name": denoiser.name, "weights_sha256": weights_sha256(denoiser)}
        self.denoiser = copy.deepcopy(denoiser).to(DTYPES[dtype]).requires_grad_(False)
        self.eval()

    def network_config(self) -> dict[str, Any]:
        return {
            "denoiser": self._denoiser_config,
            "dtype": self.dtype,
            "compute_batch": self.compute_batch,
        }

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        size = self.compute_batch
        x_BCHW = x_BCHW.contiguous()  # channels-last memory would choose other kernels, and so other bits
        if x_BCHW.device.type == "cpu":
            size = max(size, _CPU_BATCH)
        chunks = []
        for x, seeds in zip(x_BCHW.split(size), seeds_B.split(size), strict=True):
            missing = size - len(x)
            if missing:
                x_full = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
                seeds_full = torch.cat([seeds, seeds.new_zeros(missing)])
                chunks.append(self.run_chunk(x_full, seeds_full)[: len(x)])
            else:
                chunks.append(self.run_chunk(x, seeds))
        return torch.cat(chunks) if x_BCHW.shape[0] else x_BCHW

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        raise NotImplementedError


class DenoiseOnce(_NetworkPurifier):
    """Add noise of exactly sigma and denoise in one network call (Hong et al. 2024; Carlini et al. 2023).

    Args:
        denoiser: see `purifyloader.pretrained.load`.
        sigma: noise level in image units, within `denoiser.sigma_range`.
        dtype, compute_batch: see `Diffuse`.
    """

    kind = "denoise-once"

    def __init__(self, denoiser: Denoiser, sigma: float, *, dtype: str = "float32", compute_batch: int = 32) -> None:
        super().__init__(denoiser, dtype, compute_batch)
        _check_number("sigma", sigma)
        denoiser.check_sigma(sigma)
        self.sigma = float(sigma)

    def config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sigma": self.sigma,
            "sigma_px": _pixels(self.sigma),
            **self.network_config(),
        }

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values.pop("sigma_px", None)
        return cls(resolve(values.pop("denoiser")), **values)

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        noised = x_BCHW + self.sigma * noise.normal(seeds_B, x_BCHW.shape[1:])
        return self.denoiser(noised, torch.full((len(x_BCHW),), self.sigma, dtype=torch.float64))


class Diffuse(_NetworkPurifier):
    """Noise to a level, then sample back down to 0 (ECLIPSE, Algorithm 1; DiffPure).

    Give the level as `t`, read through `schedule`, or as `sigma`.

    Args:
        denoiser: see `purifyloader.pretrained.load`.
        t: timestep to noise to.
        sigma: or its noise level, in image units (25 px is 25/255).
        steps: network calls (NFE), evenly spaced in t. Default: every timestep when `t` is given,
            one when `sigma` is.
        schedule: what `t` means; ECLIPSE's cosine one with T = 4000 by default.
        sampler: "ancestral" or "ddim".
        dtype: of the network's arithmetic, "float32" or "bfloat16".
        compute_batch: images of every network call.
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
    ) -> None:
        super().__init__(denoiser, dtype, compute_batch)
        if (t is None) == (sigma is None):
            raise ConfigError(f"Give the noise level as t or as sigma, one of them. Got t={t!r}, sigma={sigma!r}.")
        _check_number("t" if sigma is None else "sigma", t if sigma is None else sigma)
        if sampler not in SAMPLERS:
            raise ConfigError(f"sampler must be one of {sorted(SAMPLERS)}. Got {sampler!r}.")
        self.schedule = CosineSchedule(4000) if schedule is None else schedule
        self.t, self.sigma = t, sigma
        if steps is None:
            if t is not None and t != int(t):
                raise ConfigError(f"A fractional t needs steps, the number of network calls. Got t={t}.")
            steps = 1 if t is None else int(t)
        self.steps = steps
        self.sampler = sampler
        if sigma is not None:
            denoiser.check_sigma(sigma)
            t = float(self.schedule.t(sigma))
        assert t is not None
        levels = spaced_sigmas(self.schedule, t, steps)
        # a sigma asked for is used as it is, not as it comes back from the schedule
        self.sigmas = levels if sigma is None else (float(sigma), *levels[1:])
        denoiser.check_sigma(torch.tensor(self.sigmas[:-1], dtype=torch.float64))

    def config(self) -> dict[str, Any]:
        level = {"t": self.t} if self.sigma is None else {"sigma": self.sigma}
        return {
            "kind": self.kind,
            **level,
            "sigma_px": _pixels(self.sigmas[0]),
            "steps": self.steps,
            "schedule": self.schedule.config(),
            "sampler": self.sampler,
            **self.network_config(),
        }

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values.pop("sigma_px", None)
        schedule = schedule_from_config(values.pop("schedule"))
        return cls(resolve(values.pop("denoiser")), schedule=schedule, **values)

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        shape = x_BCHW.shape[1:]
        noised = x_BCHW + self.sigmas[0] * noise.normal(seeds_B, shape)
        return SAMPLERS[self.sampler](
            self.denoiser, noised, self.sigmas, lambda step: noise.normal(seeds_B, shape, step + 1)
        )


class Jpeg(Purifier):
    """JPEG compression (image shortcut squeezing, ISS-J; Liu et al. 2023), the baseline to try first."""

    kind = "jpeg"

    def __init__(self, quality: int = 10) -> None:
        super().__init__()
        corruptions.check_quality(quality)
        self.quality = quality

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "quality": self.quality}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.jpeg(x_BCHW, self.quality)


class Compensation(Purifier):
    """One fixed draw of ECLIPSE's corruption, as Algorithm 1 prints it (Eq. 13).

    The published training script draws it afresh in every epoch, which is what
    `purifyloader.transforms.Compensate` does and what defends better.
    """

    kind = "compensation"

    def __init__(self, p: float = 0.4, sigma: float = 0.05) -> None:
        super().__init__()
        corruptions.check_compensation(p, sigma)
        self.p, self.sigma = p, sigma

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "p": self.p, "sigma": self.sigma, "sigma_px": _pixels(self.sigma)}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values.pop("sigma_px", None)
        return cls(**values)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.compensate(x_BCHW, seeds_B, self.p, self.sigma)


class Resize(Purifier):
    """Images of any size at the size that a model was trained for: the one purifier that changes shapes.

    Antialiased bilinear, image by image; an image that has the size already passes unchanged. It draws
    nothing.

    Args:
        size: of the shorter side, in pixels. The aspect is kept, the longer side rounded down (torchvision).
        crop: also cut out the central crop x crop pixels, so that all images have one shape; at most `size`.

    Raises:
        ConfigError: no such size or crop.
    """

    kind = "resize"

    def __init__(self, size: int, crop: int | None = None) -> None:
        super().__init__()
        sizes.check_resize(size, crop)
        self.size, self.crop = size, crop

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "crop": self.crop}

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return sizes.resized_shape(shape, self.size, self.crop)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        images = self.run_images(x_BCHW.unbind(), seeds_B)
        if not images:
            channels, height, width = x_BCHW.shape[1:]
            return x_BCHW.new_zeros(0, *self.output_shape((channels, height, width)))
        return torch.stack(images)

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        return [sizes.resize(image, self.size, self.crop) for image in images]


class Chain(Purifier):
    """One purifier after another; stage i draws from `fold_in(seed, i)`.

    So a purifier alone and in a chain, even as its only stage, draws other noise for the same seed.
    """

    kind = "chain"

    def __init__(self, *stages: Purifier) -> None:
        super().__init__()
        if not stages or not all(isinstance(stage, Purifier) for stage in stages):
            raise ConfigError(f"Chain takes one or more purifiers. Got {[type(s).__name__ for s in stages]}.")
        self.stages = nn.ModuleList(stages)
        channels = {stage.image_channels for stage in stages if stage.image_channels is not None}
        if len(channels) > 1:
            raise ConfigError(f"The stages of a chain must take the same channels. Got {sorted(channels)}.")
        self.image_channels = channels.pop() if channels else None

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "stages": [stage.config() for stage in self._stages()]}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return cls(*(from_config(stage, resolve) for stage in values["stages"]))

    def _stages(self) -> Iterator[Purifier]:
        for stage in self.stages:
            assert isinstance(stage, Purifier)
            yield stage

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        for stage in self._stages():
            shape = stage.output_shape(shape)
        return shape

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        for i, stage in enumerate(self._stages()):
            x_BCHW = stage.run(x_BCHW, noise.fold_in(seeds_B, i))
        return x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        for i, stage in enumerate(self._stages()):
            images = stage.run_images(images, noise.fold_in(seeds_B, i))
        return list(images)


class Repeat(Purifier):
    """The same purifier several times over; repetition i draws from `fold_in(seed, i)`."""

    kind = "repeat"

    def __init__(self, purifier: Purifier, times: int) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier) or not isinstance(times, int) or times < 1:
            raise ConfigError(
                f"Repeat takes a purifier and a positive number of times. Got {type(purifier).__name__} and {times!r}."
            )
        self.purifier, self.times = purifier, times
        self.image_channels = purifier.image_channels

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "purifier": self.purifier.config(), "times": self.times}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return cls(from_config(values["purifier"], resolve), values["times"])

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        for _ in range(self.times):
            shape = self.purifier.output_shape(shape)
        return shape

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        for i in range(self.times):
            x_BCHW = self.purifier.run(x_BCHW, noise.fold_in(seeds_B, i))
        return x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        for i in range(self.times):
            images = self.purifier.run_images(images, noise.fold_in(seeds_B, i))
        return list(images)


class Tiles(Purifier):
    """A purifier applied to square tiles, at the resolution the image has, and blended together again.

    All tiles of all images that come together are purified together: the network's batches are as full for
    images of different sizes as for one size. Tile j of an image (row by row from the top left) draws from
    `fold_in(seed, j)`. Where tiles overlap they are averaged, each weighted by a ramp that falls linearly
    towards its edge; a pixel that one tile covers is exactly that tile's.

    The last tile of a row or column ends with the image, and so may overlap its neighbours by more. An image
    smaller than a tile is mirrored at its borders (its border repeated where it is too small for that) and
    cut back. What is decided once an image, such as whether `Compensation` makes it grey, belongs after the
    tiles, not in them.

    Args:
        purifier: one that keeps shapes; put a `Resize` before the tiles.
        size: side of a tile, in pixels: what the model was trained for.
        overlap: pixels that neighbours share, at most half a tile; a quarter by default.

    Raises:
        ConfigError: no such size or overlap, or a purifier that changes shapes.
    """

    kind = "tiles"

    def __init__(self, purifier: Purifier, size: int, overlap: int | None = None) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            raise ConfigError(f"Tiles takes a purifier. Got {type(purifier).__name__}.")
        if overlap is None and isinstance(size, int):
            overlap = size // 4
        sizes.check_tiles(size, overlap)
        tile = (purifier.image_channels or 3, size, size)
        # by kind too: a resize to the very size of a tile would do nothing, which nobody asks for
        if purifier.output_shape(tile) != tile or any(isinstance(part, Resize) for part in purifier.modules()):
            raise ConfigError(
                "Tiles takes a purifier that keeps the shape of a tile. Got one that resizes: "
                "put the Resize before, as in Chain(Resize(...), Tiles(...))."
            )
        assert overlap is not None
        self.purifier, self.size, self.overlap = purifier, size, overlap
        self.image_channels = purifier.image_channels

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "purifier": self.purifier.config(), "size": self.size, "overlap": self.overlap}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return cls(from_config(values.pop("purifier"), resolve), **values)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return torch.stack(self.run_images(x_BCHW.unbind(), seeds_B)) if len(x_BCHW) else x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        cuts = [sizes.cut(image, self.size, self.overlap) for image in images]
        place = [(row, j) for row, tiles in enumerate(cuts) for j in range(len(tiles))]
        row_T, j_T = torch.tensor(place, dtype=torch.int64, device=seeds_B.device).reshape(-1, 2).unbind(1)
        tiles = self.purifier.run_images([cuts[row][j] for row, j in place], noise.fold_in(seeds_B[row_T], j_T))
        done = iter(tiles)
        return [
            sizes.join(list(islice(done, len(own))), image.shape, self.size, self.overlap)
            for image, own in zip(images, cuts, strict=True)
        ]


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_seeds(seeds_B: Any, count: int) -> None:
    if not isinstance(seeds_B, Tensor) or seeds_B.dtype != torch.int64:
        raise InputError(
            f"seeds must be an int64 tensor, one an image. Got {_described(seeds_B)}: see `noise.image_keys`."
        )
    if seeds_B.shape != (count,):
        raise InputError(f"seeds must have shape ({count},), one an image. Got {tuple(seeds_B.shape)}.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number. Got {value!r}.")


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_names(v) for k, v in value.items() if k != "name"}
    return [_without_names(v) for v in value] if isinstance(value, list) else value


def _pixels(sigma: float) -> float:
    """sigma on the 0-255 scale, for people: five significant digits."""
    return float(f"{255 * sigma:.5g}")


_KINDS: dict[str, type[Purifier]] = {
    cls.kind: cls for cls in (Chain, Compensation, DenoiseOnce, Diffuse, Jpeg, Repeat, Resize, Tiles)
}


def from_config(config: Mapping[str, Any], resolve: Resolver) -> Purifier:
    """Build back what `Purifier.config` said.

    Args:
        config: plain data with a `kind`.
        resolve: finds the denoiser meant by an entry `{"name", "weights_sha256"}`
            (`purifyloader.recipes.from_json` loads it by name and checks the hash).
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"A purifier's configuration is an object with a kind. Got {type(config).__name__}.")
    values = dict(config)
    kind = values.pop("kind", None)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        plugins = {entry.name: entry for entry in entry_points(group="purifyloader.purifiers")}
        if kind not in plugins:
            raise ConfigError(f"A purifier's kind must be one of {sorted({*_KINDS, *plugins})}. Got {kind!r}.")
        cls = plugins[kind].load()
    assert cls is not None
    try:
        return cls.build(values, resolve)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"The configuration of {kind!r} does not fit it: {error}. Got {sorted(values)}.") from None


def from_json(text: str, resolve: Resolver) -> Purifier:
    """Build back what `Purifier.to_json` said; a newer schema than this library's is an error."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"Expected a purifier as JSON. Got text that is not JSON ({error}).") from None
    if not isinstance(values, dict) or not {"schema", "purifier"} <= set(values):
        raise ConfigError(f"Expected a JSON object with schema and purifier. Got {text[:80]!r}.")
    if values["schema"] != SCHEMA:
        raise ConfigError(
            f"This version of purifyloader reads purifier schema {SCHEMA}. Got {values['schema']!r}: "
            "use the version that wrote it, or a newer one."
        )
    return from_config(values["purifier"], resolve)
