"""What every purifier is: its calls and their checks, its configuration, and the table that builds it back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from purifyloader.core.devices import exact_arithmetic
from purifyloader.core.images import to_unit
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.purifiers.packing import reduced

if TYPE_CHECKING:
    from purifyloader.purifiers.energy_above import Condition

__all__ = [
    "KINDS",
    "SCHEMA",
    "Purifier",
    "Resolver",
    "by_shape",
    "from_config",
    "from_json",
    "of_kind",
    "pixels",
]

Named = TypeVar("Named")

SCHEMA = 1
"""Version of the JSON that purifiers say themselves in."""

# Of a configuration, what decides no pixel: names are for people, and a plan follows from the rest and the source.
_NO_IDENTITY = ("name", "planned")


class Resolver(Protocol):
    """Finds the model that a configuration's entry (name, weights_sha256) means.

    The entry stands under the key "denoiser" or "energy", and that is the kind of model asked for.
    """

    def __call__(self, entry: Mapping[str, Any], kind: str = "denoiser") -> Any: ...


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

    @property
    def calls(self) -> int:
        """Network calls an image (NFE), of a tile with `Tiles`, at most; a Langevin step counts as one."""
        return 0

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
        out = list(images)
        for rows in by_shape(images):
            results = self.run(torch.stack([images[row] for row in rows]), seeds_B[rows])
            for row, x in zip(rows, results, strict=True):
                out[row] = x
        return out

    def to_plan(self, images: Sequence[Tensor], seeds_B: Tensor) -> tuple[Condition, list[Tensor]] | None:
        """The first condition inside that has no plan yet, and the images as they come to it.

        Args:
            images: checked float32 (C, H, W), as `run_images` takes them.

        Returns:
            None where nothing inside needs a plan.
        """
        return None

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) in which an image of `shape` comes out: the same, unless a `Resize` is inside."""
        return shape

    def identity(self) -> dict[str, Any]:
        """What decides the pixels: the configuration without names, which are for people, and without plans,
        which are functions of the rest and of the source."""
        identity = _deciding(self.config())
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

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """For another process: see `purifyloader.purifiers.packing`."""
        return reduced(self) or super().__reduce_ex__(protocol)

    def train(self, mode: bool = True) -> Self:
        """Purifiers are never in training mode, whatever module holds them."""
        return super().train(False)


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_seeds(seeds_B: Any, count: int) -> None:
    if not isinstance(seeds_B, Tensor) or seeds_B.dtype != torch.int64:
        raise InputError(
            f"seeds must be an int64 tensor, one an image. Got {_described(seeds_B)}: see `noise.image_keys`."
        )
    if seeds_B.shape != (count,):
        raise InputError(f"seeds must have shape ({count},), one an image. Got {tuple(seeds_B.shape)}.")


def pixels(sigma: float) -> float:
    """A noise level in image units on the 0-255 scale, for people: five significant digits."""
    return float(f"{255 * sigma:.5g}")


def by_shape(images: Sequence[Tensor]) -> list[list[int]]:
    """The positions of the images of each shape."""
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return list(rows.values())


def _deciding(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _deciding(v) for k, v in value.items() if k not in _NO_IDENTITY}
    return [_deciding(v) for v in value] if isinstance(value, list) else value


KINDS: dict[str, type[Purifier]] = {}
"""The closed table of kinds, filled in `purifyloader.purifiers`."""


def of_kind(kind: Any, table: Mapping[str, type[Named]], group: str, what: str) -> type[Named]:
    """The class of a kind, from a closed table or from the entry points of a group, never by an import path.

    Raises:
        ConfigError: it is in neither.
    """
    if isinstance(kind, str) and kind in table:
        return table[kind]
    plugins = {entry.name: entry for entry in entry_points(group=group)}
    if not isinstance(kind, str) or kind not in plugins:
        raise ConfigError(f"A {what}'s kind must be one of {sorted({*table, *plugins})}. Got {kind!r}.")
    found: type[Named] = plugins[kind].load()
    return found


def from_config(config: Mapping[str, Any], resolve: Resolver) -> Purifier:
    """Build back what `Purifier.config` said.

    Args:
        config: plain data with a `kind`.
        resolve: finds the model meant by an entry `{"name", "weights_sha256"}` and its kind
            (`purifyloader.recipes.from_json` loads it by name and checks the hash).

    Raises:
        ConfigError: no such kind, or values that do not fit it.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"A purifier's configuration is an object with a kind. Got {type(config).__name__}.")
    values = dict(config)
    kind = values.pop("kind", None)
    cls = of_kind(kind, KINDS, "purifyloader.purifiers", "purifier")
    try:
        return cls.build(values, resolve)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"The configuration of {kind!r} does not fit it: {error}. Got {sorted(values)}.") from None


def from_json(text: str, resolve: Resolver) -> Purifier:
    """Build back what `Purifier.to_json` said; a newer schema than this library's is an error."""
    try:
        values = json.loads(text)
    except TypeError:
        raise ConfigError(f"Expected a purifier as JSON text. Got {type(text).__name__}.") from None
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
