"""The base classes of purifiers and conditions: they check calls, and describe themselves as JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from purifyloader.core.devices import exact_arithmetic
from purifyloader.core.images import check_channels, not_transformed, to_unit
from purifyloader.core.notes import NOTES
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.json import JsonError, parse_json
from purifyloader.pretrained.kinds import KINDS as MODEL_KINDS
from purifyloader.purifiers.frozen import Freezing, Seal, check_move, refuse_setting
from purifyloader.purifiers.packing import reduced

__all__ = ["CONDITIONS", "KINDS", "NOISE_BEFORE", "SCHEMA", "UNKNOWN_FIRST", "Condition", "Purifier", "Resolver"]
__all__ += ["by_shape", "common_channels", "condition_from_config", "conditions_of", "extent", "from_config"]
__all__ += ["from_json", "models_in", "pixels", "refuse_plans", "without_functions"]

SCHEMA = 2
"""Version of the JSON that describes purifiers. In version 1 models were told apart by their weights alone."""

NOISE_BEFORE = "put DenoiseOnce, or another that begins with noise, before it."
"""The advice that ends the reason why a purifier has no certificate: see `Purifier.noise_first`."""

UNKNOWN_FIRST = f"of which it is not known here what it does first: {NOISE_BEFORE}"

# Of a configuration, what decides no pixel: names are for people, and a plan follows from the rest and the source.
_NO_IDENTITY = ("name", "planned")
_WEIGHTS, _FUNCTION = "weights_sha256", "function"  # of a model, beside its name


class Resolver(Protocol):
    """Finds the model that a configuration's entry (name, weights_sha256, function) means.

    The entry stands under the key "denoiser" or "energy", which is its `kind`. One of schema 1 has no function.
    """

    def __call__(self, entry: Mapping[str, Any], kind: str = "denoiser") -> Any: ...


class Described(nn.Module, metaclass=Freezing):
    """A purifier or a condition: frozen, never in training mode, and described as plain data.

    Once it is made nothing can be set on it, and it can be moved to a device, but not converted or given other weights;
    what is changed inside all the same is an error at the next call (`purifyloader.purifiers.frozen`).
    """

    kind: ClassVar[str]
    _seal: Seal
    image_channels: int | None = None
    """Channels it takes, None for any."""

    options: ClassVar[tuple[str, ...] | None] = None
    """Arguments that are attributes and make up the configuration; None for a class with a `config` of its own."""

    def config(self) -> dict[str, Any]:
        """Describe it as plain data, its `kind` and the attributes of `options`; `from_config` builds it back."""
        if self.options is None:
            raise NotImplementedError(f"{type(self).__name__} needs options or a config of its own")
        values = {name: getattr(self, name) for name in self.options}
        parts = {name: part.config() for name, part in values.items() if isinstance(part, Described)}
        return {"kind": self.kind, **values, **parts}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        """Build it from its `config`, whose `kind` is gone from `values`."""
        if "purifier" in (cls.options or ()):
            values["purifier"] = from_config(values["purifier"], resolve)
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """Return the part of the configuration that decides the pixels; `ConfigError` where it no longer does.

        Names are for people, and plans follow from the rest and the source.
        """
        self._check_unchanged()
        return self._identity()

    def _identity(self) -> dict[str, Any]:
        identity = _deciding(self.config())
        assert isinstance(identity, dict)
        return identity

    def _check_unchanged(self) -> None:
        if "_seal" in self.__dict__ and not torch.compiler.is_compiling():
            self._seal.check(self)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within, it is called; raises `ConfigError` before, with what differs, where it was changed since it was made.

        A call by `purifier(...)`, `purify_with_grad` or `purify_images` is within by itself; one of `run` is not.
        """
        if torch.compiler.is_compiling():
            yield
            return
        self._seal.check(self)
        yield
        self._seal.settle(self)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_seal" in self.__dict__ and name[0] != "_" and name != "training":
            raise refuse_setting(self, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if "_seal" in self.__dict__ and name[0] != "_":
            raise refuse_setting(self, name)
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if "_seal" in self.__dict__:
            check_move(self, fn)
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise refuse_setting(self, "its weights")


class Purifier(Described):
    """Base of all purifiers: `purifier(x_BCHW, seeds_B) -> x_BCHW`.

    It takes float images in [0, 1] and int64 seeds, one an image (`noise.image_keys(seed, epoch, index)`), and gives
    float32 images, nominally in [0, 1] and not clamped, of the same shape for all purifiers but `Resize`. `InputError`
    for another type, shape or range, NaN, or seeds that do not match the batch. `purify_images` takes images of
    different sizes.

    >>> import torch
    >>> from purifyloader.purifiers import Jpeg, Purifier
    >>> purifier = Jpeg(10)
    >>> purifier(torch.rand(2, 3, 8, 8), torch.tensor([1, 2])).shape, isinstance(purifier, Purifier)
    (torch.Size([2, 3, 8, 8]), True)
    """

    selects: ClassVar[bool] = False
    """True where it treats images differently because of how they look."""

    _extent: tuple[int, int] = (0, 1)
    """How many levels of purifiers are inside, and how many single ones an image goes through."""

    @property
    def calls(self) -> int:
        """Network calls an image (NFE), of a tile with `Tiles`, at most; a Langevin step counts as one."""
        return 0

    def noise_first(self) -> float | str:
        """For a certificate: the noise that a purifier begins with, or why there is none.

        The standard deviation, in units of [0, 1] images, of Gaussian noise that is added to every value of an image,
        independent, before anything else is done to it; otherwise a reason that continues "Jpeg, ...". A subclass may
        do anything first, so it must say this again by itself.
        """
        return UNKNOWN_FIRST

    def in_order(self) -> Iterator[Purifier]:
        """Yield what is done to an image, in order: the purifier itself, or the stages inside it; a repetition once.

        As `noise_first`, it is not believed of a subclass.
        """
        yield self

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        """Purify checked float32 input; values may leave [0, 1] between stages."""
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
        """Find the first condition inside that has no plan yet, and the images as they come to it; None for none."""
        return None

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape (C, H, W) in which an image of `shape` comes out: the same, unless a `Resize` is inside."""
        return shape

    def to_json(self) -> str:
        """Describe the purifier as canonical JSON with a schema version; `recipes.from_json` builds it back.

        `ConfigError` where it was changed since it was made, for it is no longer what it says.
        """
        self._check_unchanged()
        return canonical_json({"schema": SCHEMA, "purifier": self.config()})

    def forward(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        with torch.no_grad():
            return self.purify_with_grad(x_BCHW, seeds_B)

    def purify_with_grad(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        """Purify with gradients of the input, for attacks that adapt to the purifier."""
        if not isinstance(x_BCHW, Tensor) or x_BCHW.ndim != 4 or not x_BCHW.is_floating_point():
            raise InputError(f"A purifier takes a float tensor of shape (B, C, H, W). Got {_described(x_BCHW)}.")
        with not_transformed("A purifier"):
            x = self._checked(x_BCHW, "image to purify")
            _check_seeds(seeds_B, len(x_BCHW))
            NOTES.purified += 1
            with self.unchanged(), exact_arithmetic(x.device):
                return self.run(x, seeds_B.to(x.device))

    def purify_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        """Purify float images (C, H, W) of different sizes: each is, bit for bit, the one that is purified alone.

        Images of one shape are one batch; a purifier with a network pads each shape's to `compute_batch`, so many sizes
        are cheap only where a `Resize` (with a crop) or `Tiles` makes them one. All images, results and tiles are held
        in memory at once: give a data set in batches. Images of one shape may come back as views of one tensor. All are
        in [0, 1], on one device; otherwise `InputError`, as for a call.
        """
        if not isinstance(images, Sequence):
            raise InputError(
                f"purify_images takes a list of float tensors (C, H, W). Got {_described(images)}: "
                "for one tensor of images call the purifier itself."
            )
        checked = []
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
            checked.append(self._checked(image, f"image to purify (number {i})"))
        _check_seeds(seeds_B, len(images))
        if not images:
            return []
        device = images[0].device
        NOTES.purified += 1
        with self.unchanged(), torch.no_grad(), exact_arithmetic(device):
            return self.run_images(checked, seeds_B.to(device))

    def _checked(self, x: Tensor, what: str) -> Tensor:
        """Return an image or a batch as float32 in [0, 1]."""
        if self.image_channels not in (None, x.shape[-3]):
            raise InputError(
                f"This purifier takes images of {self.image_channels} channels. Got {tuple(x.shape)} for the {what}."
            )
        check_channels("A purifier", x.shape, leading="B" if x.ndim == 4 else "", what=what)
        return to_unit(x, what)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pack weights for another process: see `purifyloader.purifiers.packing`."""
        return reduced(self) or super().__reduce_ex__(protocol)


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
    """Convert a noise level in image units to the 0-255 scale, for people: five significant digits."""
    return float(f"{255 * sigma:.5g}")


def common_channels(taker: str, *parts: Described) -> int | None:
    """Return the image channels that all parts take, None for any; `ConfigError` where they differ."""
    channels = {part.image_channels for part in parts if part.image_channels is not None}
    if len(channels) > 1:
        raise ConfigError(f"The parts of a {taker} must take the same channels. Got {sorted(channels)}.")
    return channels.pop() if channels else None


def by_shape(images: Sequence[Tensor]) -> list[list[int]]:
    """Group the positions of the images by shape."""
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return list(rows.values())


def _deciding(value: Any) -> Any:
    if isinstance(value, dict):  # the function of a model is told by everything in it
        return {k: v if k == _FUNCTION else _deciding(v) for k, v in value.items() if k not in _NO_IDENTITY}
    return [_deciding(v) for v in value] if isinstance(value, list) else value


def without_functions(identity: Any) -> Any:
    """Return an identity as schema 1 wrote it, in which models have weights and no function."""
    if isinstance(identity, dict):
        return {k: without_functions(v) for k, v in identity.items() if k != _FUNCTION or _WEIGHTS not in identity}
    return [without_functions(v) for v in identity] if isinstance(identity, list) else identity


def models_in(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kind and entry of each model that a configuration names, in its order."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        if key in MODEL_KINDS and isinstance(value, dict) and _WEIGHTS in value:
            yield key, value
        else:
            yield from models_in(value)


class Condition(Described):
    """Base of all conditions, which hold for an image or not. Frozen, and stateless but for its plan.

    Attributes:
        planned: the numbers that a plan has found, a JSON object; None before, and where none is needed.

    >>> from purifyloader.purifiers import Condition, EnergyAbove
    >>> issubclass(EnergyAbove, Condition)
    True
    """

    planned: dict[str, Any] | None = None
    for_people: ClassVar[tuple[str, ...]] = ("planned",)  # which is looked at by itself
    _agreed: dict[str, Any] | None = None

    def take_plan(self, planned: Mapping[str, Any] | None) -> None:
        """Take the numbers that a plan has found, which no call changes any more; None to be without a plan."""
        vars(self)["planned"] = None if planned is None else dict(planned)
        vars(self)["_agreed"] = copy.deepcopy(self.planned)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "planned" and self.planned is None:
            self.take_plan(value)
        else:
            super().__setattr__(name, value)

    @property
    def needs_plan(self) -> bool:
        """True for a statement about the whole dataset, planned by now or not."""
        return False

    def measure(self, x_BCHW: Tensor) -> Tensor:
        """Measure the number that decides about each image, float32 (B,), which a plan collects."""
        raise NotImplementedError

    def holds(self, x_BCHW: Tensor) -> Tensor:
        """Tell for which images it holds, bool (B,); `ConfigError` where it needs a plan and has none."""
        raise NotImplementedError

    def make_plan(self, measures_N: Tensor) -> dict[str, Any]:
        """Make the plan (`planned`) for a dataset of these `measure`s, on the CPU."""
        raise NotImplementedError

    def check_plan(self, planned: Any) -> None:
        """Raise `ConfigError` unless `make_plan` may have given this."""
        raise NotImplementedError

    def measure_images(self, images: Sequence[Tensor]) -> Tensor:
        """`measure` of images (C, H, W) of any sizes, (B,)."""
        out = torch.empty(len(images), dtype=torch.float32, device="cpu")
        for rows in by_shape(images):
            out[rows] = self.measure(torch.stack([images[row] for row in rows])).cpu()
        return out

    def holds_images(self, images: Sequence[Tensor]) -> list[int]:
        """Return the positions of those images (C, H, W), of any sizes, for which it holds."""
        positions: list[int] = []
        for rows in by_shape(images):
            holds = self.holds(torch.stack([images[row] for row in rows])).tolist()
            positions += [row for row, it_does in zip(rows, holds, strict=True) if it_does]
        return sorted(positions)


def conditions_of(purifier: nn.Module) -> Iterator[Condition]:
    """Yield the conditions inside that need a plan, planned or not, in the order in which images come to them."""
    parts = (part for _, part in purifier.named_modules(remove_duplicate=False))
    return (part for part in parts if isinstance(part, Condition) and part.needs_plan)


def refuse_plans(taker: str, purifier: nn.Module) -> None:
    """Raise `ConfigError` where a condition about the whole dataset is inside something that does not see it."""
    if any(True for _ in conditions_of(purifier)):
        raise ConfigError(
            f"{taker} takes no condition with a share k, because k counts the whole images of a dataset, once. Got one "
            f"inside: put {taker} inside the Where, as in Where(EnergyAbove(energy, k=0.5), {taker}(...)), or give "
            "the condition a threshold."
        )


_LEVELS, _RUNS = 32, 100_000


def extent(taker: str, parts: Sequence[Purifier], times: int = 1) -> tuple[int, int]:
    """Return the `_extent` of a purifier of these parts, or raise `ConfigError` where it is beyond any sense."""
    levels = 1 + max(part._extent[0] for part in parts)
    runs = times * sum(part._extent[1] for part in parts)
    if levels > _LEVELS or runs > _RUNS:
        raise ConfigError(
            f"Purifiers must be in one another at most {_LEVELS} levels deep, and an image must go through at most "
            f"{_RUNS:,} of them. Got {levels} levels and {runs:,} in a {taker}: leave some out."
        )
    return levels, runs


Named = TypeVar("Named", Purifier, Condition)

KINDS: dict[str, type[Purifier]] = {}
"""The purifiers of the library by kind, filled in `purifyloader.purifiers`."""

CONDITIONS: dict[str, type[Condition]] = {}
"""The conditions of the library by kind, filled there too."""


def _build(config: Any, resolve: Resolver, table: Mapping[str, type[Named]], what: str) -> Named:
    """Build the purifier or condition of a configuration, of a kind in the table or of a plugin's: never by a path."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"A {what}'s configuration is an object with a kind. Got {type(config).__name__}.")
    values = dict(config)
    kind = values.pop("kind", None)
    cls = table.get(kind) if isinstance(kind, str) else None
    if cls is None:
        plugins: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=f"purifyloader.{what}s")}
        if not isinstance(kind, str) or kind not in plugins:
            raise ConfigError(f"A {what}'s kind must be one of {sorted({*table, *plugins})}. Got {kind!r}.")
        cls = plugins[kind].load()
    try:
        return cls.build(values, resolve)
    except PurifyError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        names = ", ".join(sorted(map(str, values)))
        raise ConfigError(f"The configuration of {kind!r} does not fit it: {error}. Got {names:.200}.") from None


def from_config(config: Mapping[str, Any], resolve: Resolver) -> Purifier:
    """Build the purifier that `Purifier.config` described; `ConfigError` for no such kind, or values that do not fit.

    Args:
        config: plain data with a `kind`.
        resolve: finds the model meant by an entry `{"name", "weights_sha256", "function"}` and its kind
            (`purifyloader.recipes.from_json` loads it by name and checks the rest).

    >>> from purifyloader import purifiers
    >>> purifiers.from_config({"kind": "jpeg", "quality": 30}, resolve=lambda entry, kind: None).config()
    {'kind': 'jpeg', 'quality': 30}
    """
    return _build(config, resolve, KINDS, "purifier")


def condition_from_config(config: Any, resolve: Resolver) -> Condition:
    """Build the condition that `Condition.config` described."""
    return _build(config, resolve, CONDITIONS, "condition")


def from_json(text: str, resolve: Resolver) -> Purifier:
    """Build the purifier that `Purifier.to_json` described; `ConfigError` for other text, or a newer schema.

    Schema 1, whose models have no function, is still read: a model with the weights is the one that was meant.
    `resolve` is that of `from_config`; `purifyloader.recipes.from_json` finds models by name.

    >>> from purifyloader import purifiers
    >>> purifiers.from_json(purifiers.Jpeg(30).to_json(), resolve=lambda entry, kind: None).config()
    {'kind': 'jpeg', 'quality': 30}
    """
    if not isinstance(text, str | bytes | bytearray):
        raise ConfigError(f"A purifier is read from JSON text. Got {type(text).__name__}.")
    try:
        values = parse_json(text)
    except JsonError as error:
        raise ConfigError(f"A purifier is read from JSON. Got text that is not JSON ({error}).") from None
    if not isinstance(values, dict) or not {"schema", "purifier"} <= set(values):
        raise ConfigError(f"A purifier's JSON is an object with schema and purifier. Got {text[:80]!r}.")
    if type(values["schema"]) is not int or not 1 <= values["schema"] <= SCHEMA:
        raise ConfigError(
            f"This version of purifyloader reads purifier schemas 1 to {SCHEMA}. Got {values['schema']!r}: "
            "use the version that wrote it, or a newer one."
        )
    _check_number_of_parts(values["purifier"])
    return from_config(values["purifier"], resolve)


_PARTS, _MODELS = 10_000, 32  # each model is a network in memory


def _check_number_of_parts(config: Any) -> None:
    """Raise `ConfigError` for more purifiers or models than anybody writes down, before the first is built."""
    models = sum(1 for _ in models_in(config))
    parts, level = 0, [config]
    while level:
        parts += sum(isinstance(value, dict) for value in level)
        level = [part for value in level for part in _inside(value)]
    if models > _MODELS or parts > _PARTS:
        raise ConfigError(
            f"A purifier's JSON must have at most {_PARTS:,} objects and {_MODELS} models. Got {parts:,} and "
            f"{models:,}: write what is repeated as a repeat."
        )


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
