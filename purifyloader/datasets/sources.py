"""Get in front of a dataset's own transform: a poison sits in the stored image, before crop, flip and normalisation.

A torchvision dataset keeps its transforms as attributes: a shallow copy without them hands out the raw images, and they
are applied after purification. The user's object is never changed.
"""

from __future__ import annotations

import bisect
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import transforms as v1
from torchvision.datasets import VisionDataset
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import v2

from purifyloader.core.images import ImageKind, to_engine
from purifyloader.core.notes import noted
from purifyloader.datasets.conversions import Conversion, conversion
from purifyloader.datasets.named import image_name
from purifyloader.datasets.samples import ImageKey, check_one_image, get_image, place, with_image
from purifyloader.errors import CacheError, InputError

REMEDY = (
    "A poison can only be removed from the images as they are stored: give the dataset without its "
    "transform, and the transform as PurifiedDataset(..., transform=...)."
)


T = TypeVar("T")

# Not their subclasses: what their own __call__ adds would be lost.
_COMPOSE = (v1.Compose, v2.Compose)


def _flat(transform: Any) -> Iterator[Callable[[Any], Any]]:
    """Yield the steps of a Compose, those of Composes inside it too."""
    for step in transform.transforms:
        if type(step) in _COMPOSE:
            yield from _flat(step)
        else:
            yield step


def _same_image(image: Any) -> Any:
    return image


def _same_pair(image: Any, target: Any) -> tuple[Any, Any]:
    return image, target


class _Transform:
    """A user's transform of the image, opened just before it normalises, and one of the target."""

    def __init__(
        self, transform: Callable[[Any], Any] | None, target_transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.image, self.target = transform, target_transform
        self.first: Sequence[Callable[[Any], Any]] = ()
        self.then: Sequence[Callable[[Any], Any]] = () if transform is None else (transform,)
        if type(transform) in _COMPOSE:
            steps = list(_flat(transform))
            normalize = (i for i, step in enumerate(steps) if isinstance(step, v1.Normalize | v2.Normalize))
            cut = next(normalize, len(steps))
            self.first, self.then = steps[:cut], steps[cut:]

    def before(self, image: Any) -> Any:
        for step in self.first:
            image = step(image)
        return image

    def after(self, sample: Any, image: Any, image_key: ImageKey) -> Any:
        for step in self.then:
            image = step(image)
        if self.target is not None:
            at = _target_place(sample, image_key)
            sample = with_image(sample, self.target(sample[at]), at)
        return with_image(sample, image, place(sample, image_key))

    def pair(self, image: Any, target: Any) -> tuple[Any, Any]:
        """Apply both halves to a sample that is (image, target): the way most images go."""
        for step in self.first:
            image = step(image)
        for step in self.then:
            image = step(image)
        return image, target if self.target is None else self.target(target)


def _target_place(sample: Any, image_key: ImageKey) -> int:
    """Return the position of the target that a torchvision dataset transforms: the first field beside the image."""
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        got = f"{len(sample)} field" if isinstance(sample, tuple | list) else f"a {type(sample).__name__}"
        raise InputError(
            "The samples of a dataset with a target_transform, or with transforms of both, are (image, target, ...). "
            f"Got {got}: transform the target in the dataset itself."
        )
    return 1 if place(sample, image_key) == 0 else 0


class _JointTransform:
    """A torchvision `transforms(image, target)`; it cannot be opened, so all of it comes after."""

    def __init__(self, transforms: Callable[[Any, Any], Any]) -> None:
        self.pair = transforms

    def before(self, image: Any) -> Any:
        return image

    def after(self, sample: Any, image: Any, image_key: ImageKey) -> Any:
        at = _target_place(sample, image_key)
        image, target = self.pair(image, sample[at])
        return with_image(with_image(sample, target, at), image, place(sample, image_key))


def fetch(raw: Dataset[Any], indices: Sequence[int]) -> list[Any]:
    """Read samples of a dataset, through the batched `__getitems__` of its class where that has one.

    One that a wrapper reads through to the dataset inside is not its own, and would go around its `__getitem__`.
    """
    if type(raw) is Subset:  # torch's own looks for one in the same way as a wrapper does
        return fetch(raw.dataset, [raw.indices[i] for i in indices])
    kind = type(raw)
    if not hasattr(kind, "__getitems__") or _is_nearer(kind, "__getitem__", "__getitems__"):
        return [_item(raw, i) for i in indices]
    own: Any = raw
    try:
        return list(own.__getitems__(list(indices)))
    except Exception as error:
        which = ", ".join(map(str, indices[:4])) + ", ..." * (len(indices) > 4)
        error.add_note(f"It is of one of the items {which} of the {kind.__name__}.")
        raise


def of_item(position: int, function: Callable[..., T], *arguments: Any, remedy: str = "") -> T:
    """Call a function, and name the item where it raises."""
    try:
        return function(*arguments)
    except InputError as error:
        raise InputError(f"Item {position} of the dataset: {error} {remedy}".rstrip()) from None


def _item(raw: Dataset[Any], index: int) -> Any:
    """Read one sample; whatever goes wrong keeps its type, and says of which sample it is."""
    try:
        return raw[index]
    except Exception as error:
        name = image_name(raw, index)
        error.add_note(f"It is of item {index} of the {type(raw).__name__}{f', {name}' if name else ''}.")
        raise


def _is_nearer(kind: type, name: str, other: str) -> bool:
    """Tell whether a class defines `name` below the class that defines `other`."""
    return next(
        name in vars(each) and other not in vars(each) for each in kind.__mro__ if {name, other} & {*vars(each)}
    )


class Source:
    """A dataset of images as they are stored (`raw`), and what its user wants done to each sample afterwards."""

    def __init__(self, raw: Dataset[Any], transform: _Transform | _JointTransform) -> None:
        self.raw = raw
        self._transform = transform

    def __len__(self) -> int:
        return len(self.raw)  # type: ignore[arg-type]

    def fetch(self, indices: Sequence[int]) -> list[Any]:
        return fetch(self.raw, indices)

    def _transform_of(self, index: int) -> _Transform | _JointTransform:
        return self._transform

    def before(self, index: int, image: Any) -> Any:
        """Apply the user's transform to a (purified) image up to its normalisation."""
        return self._transform_of(index).before(image)

    def after(self, index: int, sample: Any, image: Any, image_key: ImageKey) -> Any:
        """Apply the rest of the transform, and put the result in its place in the sample."""
        return self._transform_of(index).after(sample, image, image_key)

    def pair(self, index: int, image: Any, target: Any) -> Any:
        """Apply all of the transform to a sample that is (image, target)."""
        return self._transform_of(index).pair(image, target)

    def transform(self) -> Callable[[Any], Any] | None:
        """Return the user's transform of an image, or raise `AttributeError` where there is not one of images alone."""
        if not isinstance(self._transform, _Transform):
            raise AttributeError("The dataset's transforms take the target too.")
        return self._transform.image

    def with_transform(self, transform: Callable[[Any], Any] | None) -> Source:
        """Return the same raw images with another transform of the image; that of the target stays."""
        if not isinstance(self._transform, _Transform):
            raise InputError(
                "The dataset's transforms take the target too, and cannot be replaced by one of images alone: give it "
                "another one before it is wrapped."
            )
        return Source(self.raw, _Transform(transform, self._transform.target))

    def conversion(self) -> Conversion | None:
        """Return the transform as one of whole batches, if it does the same to every image; else None."""
        transform = self._transform
        if isinstance(transform, _JointTransform) or transform.target is not None:
            return None
        return conversion(transform.first, transform.then)


class _SubsetSource(Source):
    raw: Subset[Any]

    def __init__(self, dataset: Subset[Any], inner: Source) -> None:
        raw = copy.copy(dataset)
        raw.dataset = inner.raw
        self.raw, self.inner, self.indices = raw, inner, dataset.indices

    def transform(self) -> Callable[[Any], Any] | None:
        return self.inner.transform()

    def with_transform(self, transform: Callable[[Any], Any] | None) -> Source:
        return _SubsetSource(self.raw, self.inner.with_transform(transform))

    def _transform_of(self, index: int) -> _Transform | _JointTransform:
        return self.inner._transform_of(int(self.indices[index]))

    def conversion(self) -> Conversion | None:
        return self.inner.conversion()


class _ConcatSource(Source):
    raw: ConcatDataset[Any]

    def __init__(self, dataset: ConcatDataset[Any], parts: Sequence[Source]) -> None:
        raw = copy.copy(dataset)
        raw.datasets = [part.raw for part in parts]
        self.raw, self.parts, self.ends = raw, parts, list(dataset.cumulative_sizes)

    def transform(self) -> Callable[[Any], Any] | None:
        first, *others = (part.transform() for part in self.parts)
        if any(transform is not first for transform in others):
            raise AttributeError("The datasets that are concatenated have transforms of their own.")
        return first

    def with_transform(self, transform: Callable[[Any], Any] | None) -> Source:
        return _ConcatSource(self.raw, [part.with_transform(transform) for part in self.parts])

    def _transform_of(self, index: int) -> _Transform | _JointTransform:
        index %= self.ends[-1]  # a Subset may hold negative indices
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part]._transform_of(index - (self.ends[part - 1] if part else 0))

    def conversion(self) -> Conversion | None:
        return None  # each part may have its own


def without_source(
    length: int, transform: Callable[[Any], Any] | None, target_transform: Callable[[Any], Any] | None
) -> Source:
    """Make a source of transforms alone, for samples that come out of a cache."""
    return Source(_Nothing(length), _Transform(transform, target_transform))


class _Nothing(Dataset[Any]):
    """Stands for the source of a cache that is read without one."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise CacheError("This cache is read without its source, and its samples are all there is of it.")


def take_over(dataset: Dataset[Any], transform: Callable[[Any], Any] | None = None) -> Source:
    """Get in front of a dataset's transforms.

    Torchvision datasets give up theirs, also inside `Subset`, `random_split` and `ConcatDataset`. Any other dataset is
    read as it is, and `transform` is applied after purification; `InputError` where the dataset already has one.
    """
    if type(dataset) is Subset:
        return _SubsetSource(dataset, take_over(dataset.dataset, transform))
    if type(dataset) is ConcatDataset:
        return _ConcatSource(dataset, [take_over(part, transform) for part in dataset.datasets])
    if not isinstance(dataset, VisionDataset):
        return Source(dataset, _Transform(transform))
    raw = copy.copy(dataset)
    own = getattr(dataset, "transform", None)
    target = getattr(dataset, "target_transform", None)
    joint = getattr(dataset, "transforms", None)
    # Not None where there was something: a dataset may call what it has without asking.
    if own is not None:
        raw.transform = _same_image
    if target is not None:
        raw.target_transform = _same_image
    if isinstance(joint, StandardTransform):
        raw.transforms = StandardTransform(None, None)
        joint = None
    elif joint is not None:
        raw.transforms = _same_pair
    if transform is not None and (own is not None or joint is not None):
        raise InputError(f"The {type(dataset).__name__} has a transform of its own. Give transform= or that one.")
    if joint is not None:
        return Source(raw, _JointTransform(joint))
    return Source(raw, _Transform(own if own is not None else transform, target))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Look at a dataset without a change of what the user draws afterwards."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def check_honest(
    source: Source, channels: int | None, image_key: ImageKey, items: int = 64
) -> list[tuple[tuple[int, int, int], ImageKind]]:
    """Refuse a dataset whose images are already normalised or augmented, with the item, the reason and the remedy.

    Reads `items` images spread over the dataset, twice: values must be uint8 or in [0, 1], and the same both times.
    Returns shape in the engine, (C, H, W), and kind of each.
    """
    indices = sorted(set(np.linspace(0, len(source) - 1, min(items, len(source)), dtype=np.int64).tolist()))
    with random_state_kept(), noted() as done:
        samples = source.fetch(indices)
        first, second = (
            [of_item(i, get_image, sample, image_key) for i, sample in zip(indices, read, strict=True)]
            for read in (samples, source.fetch(indices))
        )
    if done.compensated:
        raise InputError(
            "Compensation comes after all purification, anew in every epoch, and this dataset compensates already. "
            "Give compensate= to the outer PurifiedDataset only, and chain the purifiers."
        )
    if done.purified:
        raise InputError(
            "The images of this dataset are purified already, when it is read. Give the dataset inside it, and chain "
            "the purifiers: purifiers.Chain(first, then)."
        )
    for index, sample in zip(indices, samples, strict=True):
        if not of_item(index, check_one_image, sample, image_key):
            break  # one warning is enough
    probed: list[tuple[tuple[int, int, int], ImageKind]] = []
    for index, a, b in zip(indices, first, second, strict=True):
        try:
            (x, kind), (y, _) = to_engine(a, channels), to_engine(b, channels)
        except InputError as error:
            raise InputError(f"Item {index} of the dataset: {error} {REMEDY}") from None
        if x.shape != y.shape or not torch.equal(x, y):
            raise InputError(
                f"Item {index} of the dataset is another image each time: the dataset augments its images. {REMEDY}"
            )
        probed.append(((x.shape[0], x.shape[1], x.shape[2]), kind))
    return probed
