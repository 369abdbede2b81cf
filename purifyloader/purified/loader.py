"""Purify the batches of any loader on the device, ahead of the training step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision import tv_tensors

from purifyloader.core import noise
from purifyloader.core.checks import as_integer, launcher_number
from purifyloader.core.devices import as_device, device_of, exact_arithmetic
from purifyloader.core.images import check_channels, luma, tolerance
from purifyloader.core.notes import noted
from purifyloader.datasets.samples import ImageKey, check_one_image, place, with_image
from purifyloader.errors import InputError, PurifyError
from purifyloader.purified.already import GivesPurified, parts_of, purified_by
from purifyloader.purified.job import COMPENSATE, PURIFY, placed
from purifyloader.purified.keyed import KeyedCorruption, check_compensate
from purifyloader.purified.sealed import shown
from purifyloader.purified.tensors import check_applicable
from purifyloader.purifiers import Purifier

log = logging.getLogger(__name__)

_RANK_BITS = 40  # of an image's number: the processes of a job count apart
_MANY_CALLS = 10
_STATE = ("state_dict", "load_state_dict")
_END = object()
_ONCE = "Take one of the two away, or give purifier=None to compensate only."


class _Ready(NamedTuple):
    """A batch to hand out, and what must be true before."""

    batch: Any
    checks: list[tuple[Tensor, str]]  # on the device: what must hold, and the error where it does not
    done: torch.cuda.Event | None
    images: list[Tensor]
    state: dict[str, Any] | None  # of the loader when it had given this batch
    position: int  # images up to its end


class PurifiedLoader:
    """A loader whose batches come purified: the last line before the training loop.

    Whole batches are purified after collation, in this process, on `device`; on a GPU on a stream of its own, while
    the training step before runs. A batch comes out as the loader gives it: the same tuple, dict or named tuple, the
    images of the same type and memory format, and everything else untouched; only the images are on `device`.

    Draws are a function of (seed, epoch, position), and of the rank where there are several processes: the same
    batches in the same order are purified alike. With `index_key` they are a function of (seed, epoch, index), and an
    image is purified alike wherever it comes in the epoch. An epoch is one pass: they count up by themselves, and
    `set_epoch` sets the next one.

    Numbers, names, labels and samplers of the loader are read through this object, and all of its attributes set;
    `len` too. Its dataset shows through without samples, and what else could give images that are not purified not at
    all: whoever builds a loader anew from these attributes gets an error. Where the loader has `state_dict` and
    `load_state_dict` (torchdata's StatefulDataLoader), so has this object, and a run goes on in mid-epoch with the
    same pixels.

    In a job of several processes each must have a share of the images: wrap the loader that `accelerator.prepare` or
    the framework gave, or one with a `DistributedSampler`.

    Args:
        loader: any iterable of batches: torch's DataLoader, StatefulDataLoader, webdataset's WebLoader, timm's, or
            one that `accelerator.prepare` gave. Images are a tensor (B, C, H, W), or a list or tuple of tensors
            (C, H, W), uint8, or floating point in [0, 1], or normalised.
        purifier: see `purifyloader.recipes`. It runs in every epoch: take one of one network call, such as
            `recipes.eclipse(model, sigma=0.05)`; one of many gives a warning, and is for a cache (`PurifiedDataset`).
            None only compensates.
        device: where to purify and to leave the images; by default where the purifier is, or, without one or for one
            without weights, where they are.
        compensate: ECLIPSE's other half, `Compensate()`, right after purification.
        normalize: (mean, std), a number a channel each, of batches that are normalised: undone before, redone after.
        keep_outside: pixels outside [0, 1] come back as they are. Random erasing behind the normalisation fills its
            rectangles with such (timm's does, in its pixel mode); without this they are an error.
        seed: of all noise.
        image_key: where the image is in a batch; position 0 of a tuple, "image" of a dict by default.
        index_key: where the indices of the images are in a batch, integers (B,), if they are.
        ahead: batches in work while one is used. By default 1 on a GPU and 0 elsewhere.

    Raises `InputError` for a loader that is none or purifies already, a purifier that needs a plan, or, while
    iterating, a loader of which it cannot be seen that it shares the images out in a job of several processes (a
    sampler with `num_replicas` and `rank` does), a `RANK` or `WORLD_SIZE` that is no number, or images in another form
    or range; `PurifyError`, while iterating, for a purifier that gives NaN. The batch is named.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> from purifyloader import PurifiedLoader, recipes
    >>> loader = DataLoader([(torch.rand(3, 32, 32), label) for label in range(6)], batch_size=4)
    >>> [(tuple(images.shape), labels.tolist()) for images, labels in PurifiedLoader(loader, recipes.jpeg(10))]
    [((4, 3, 32, 32), [0, 1, 2, 3]), ((2, 3, 32, 32), [4, 5])]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        purifier: Purifier | None,
        device: str | torch.device | None = None,
        *,
        compensate: KeyedCorruption | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        keep_outside: bool = False,
        seed: int = 0,
        image_key: ImageKey = None,
        index_key: ImageKey = None,
        ahead: int | None = None,
    ) -> None:
        if not hasattr(loader, "__iter__") or isinstance(loader, Iterator):
            raise InputError(
                f"The loader, of type {type(loader).__name__}, cannot be iterated in every epoch"
                + (", but is used up after one." if isinstance(loader, Iterator) else ".")
            )
        if purifier is not None:
            check_applicable(purifier)
            if (already := purified_by(loader)) is not None:
                raise InputError(f"The images of this loader are purified already, by a {already}. {_ONCE}")
            if purifier.calls > _MANY_CALLS:
                log.warning(
                    "A PurifiedLoader purifies in every epoch, and this purifier takes %d network calls an image: "
                    "precompute a cache, or take one of fewer calls.",
                    purifier.calls,
                )
        elif compensate is None:
            raise InputError("Give a purifier, or compensate=, or both; without either use the loader as it is.")
        check_compensate(compensate)
        where = None if purifier is None else device_of(purifier)
        self.__dict__.update(  # for `__setattr__` sets the loader's
            loader=loader,
            purifier=purifier if purifier is None else placed(purifier, device),
            device=where if device is None else as_device(device),
            compensate=compensate,
            normalize=None if normalize is None else _as_normalize(normalize),
            keep_outside=bool(keep_outside),
            seed=as_integer("seed", seed, -(2**63)),
            image_key=image_key,
            index_key=index_key,
            ahead=None if ahead is None else as_integer("ahead", ahead, 0),
            _looked=False,  # at the first batch: is it normalised?
            _next=0,  # epoch of the next pass
            _resumed=0,  # images of it that a loaded state has behind it
            _state=None,  # after the batch last handed out: of the loader, epoch, position
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        _check_shared_out(self.loader)
        epoch, position = self._next, self._resumed
        self.__dict__.update(_next=epoch + 1, _resumed=0)
        # before anything is read: torch's loaders draw their seed here
        return self._batches(iter(self.loader), epoch, position)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is; the loader is told too, where it wants to know."""
        self.__dict__.update(_next=as_integer("epoch", epoch, 0), _resumed=0)
        if self._state is not None and self._state["position"] == 0:  # between two passes
            self.__dict__["_state"] = {**self._state, "epoch": self._next}
        if callable(inner := getattr(self.loader, "set_epoch", None)):
            inner(epoch)
        for part in parts_of(self.loader):
            if isinstance(part, GivesPurified) and callable(inner := getattr(part, "set_epoch", None)):
                inner(epoch)

    def __getattr__(self, name: str) -> Any:
        if "loader" not in self.__dict__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _STATE:
            if not _is_stateful(self.loader):
                raise AttributeError(f"The loader in this {type(self).__name__} has no state.")
            return getattr(self, f"_{name}")
        return shown(self.loader, name, type(self).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"{name} of a PurifiedLoader is given when it is made.")
        setattr(self.loader, name, value)

    def _state_dict(self) -> dict[str, Any]:
        if self._state is not None:
            return dict(self._state)
        return {"loader": self.loader.state_dict(), "epoch": self._next, "position": self._resumed}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or set(state) != {"loader", "epoch", "position"}:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise InputError(f"This is no state of a PurifiedLoader, but {got}. Give what its state_dict() gave.")
        self.loader.load_state_dict(state["loader"])
        self.__dict__.update(_next=state["epoch"], _resumed=state["position"], _state=None)

    def _batches(self, batches: Iterator[Any], epoch: int, position: int) -> Iterator[Any]:
        stateful = _is_stateful(self.loader)
        ready: deque[_Ready] = deque()
        streams: dict[torch.device, torch.cuda.Stream] = {}
        number = 0
        while (batch := self._read(batches)) is not _END:
            state = self.loader.state_dict() if stateful else None
            try:
                ready.append(self._prepared(batch, epoch, position, state, streams))
            except PurifyError as error:
                raise type(error)(f"Batch {number} of the loader: {error}") from None
            position, number = ready[-1].position, number + 1
            default = 0 if ready[-1].done is None else 1
            if len(ready) > (default if self.ahead is None else self.ahead):
                yield self._handed_out(ready.popleft(), epoch, number - 1 - len(ready))
        while ready:
            yield self._handed_out(ready.popleft(), epoch, number - 1 - len(ready))
        if stateful:
            end = {"loader": self.loader.state_dict(), "epoch": epoch + 1, "position": 0}
            self.__dict__["_state"] = end

    def _read(self, batches: Iterator[Any]) -> Any:
        """Read a batch, and refuse one that was purified or compensated when it was read; in workers nobody sees it."""
        with noted() as done:
            batch = next(batches, _END)
        twice = [(done.purified, self.purifier, "purified"), (done.compensated, self.compensate, "compensated")]
        for count, again, what in twice:
            if count and again is not None:
                raise InputError(f"The images of this loader are {what} already when they are read. {_ONCE}")
        return batch

    def _handed_out(self, ready: _Ready, epoch: int, number: int) -> Any:
        if ready.done is not None:
            # It was begun a training step ago. Waiting for it here costs a GPU nothing that has that step to do, and
            # nobody gets an image that was not found good.
            ready.done.synchronize()
            for x in ready.images:
                x.record_stream(torch.cuda.current_stream(x.device))
        try:
            _verify(ready.checks)
        except InputError as error:
            raise InputError(f"Batch {number} of the loader: {error}") from None
        if ready.state is not None:
            self.__dict__["_state"] = {"loader": ready.state, "epoch": epoch, "position": ready.position}
        return ready.batch

    def _prepared(
        self, batch: Any, epoch: int, position: int, state: dict[str, Any] | None, streams: dict[Any, Any]
    ) -> _Ready:
        where = place(batch, self.image_key)
        held = batch if where is None else batch[where]
        images = [held] if isinstance(held, Tensor) and held.ndim == 4 else held
        if not isinstance(images, list | tuple) or not all(isinstance(x, Tensor) for x in images):
            raise InputError(
                f"The images of a batch are {_described(held)}. Collate them to a tensor (B, C, H, W), or a list of "
                "tensors (C, H, W), or name their field as image_key=."
            )
        ragged = images is held
        if ragged and any(x.ndim != 3 for x in images):
            raise InputError(f"A list of images holds tensors (C, H, W). Got {', '.join(map(_described, images[:4]))}.")
        if self.image_key is None or position == 0:  # with a key it warns, once
            check_one_image(batch, self.image_key, dimensions=4)
        count = len(images) if ragged else len(images[0])
        keys_B = noise.image_keys(self.seed, epoch, self._numbers(batch, position, count))
        checks: list[tuple[Tensor, str]] = []
        device = self.device or (images[0].device if images else torch.device("cpu"))
        done = None
        if device.type == "cuda":
            if (stream := streams.get(device)) is None or any(x.is_cuda for x in images):
                # for the weights, and for images that are being copied; else it need not wait for the training step
                stream = streams.setdefault(device, stream or torch.cuda.Stream(device))
                stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                out = self._processed(images, keys_B, device, checks)
                done = torch.cuda.Event()
                done.record(stream)
            for x in images:
                if x.is_cuda:
                    x.record_stream(stream)
        else:
            out = self._processed(images, keys_B, device, checks)
        result = with_image(batch, type(held)(out) if ragged else out[0], self.image_key)
        return _Ready(result, checks, done, out, state, position + count)

    def _numbers(self, batch: Any, position: int, count: int) -> Tensor:
        if self.index_key is None:
            return torch.arange(position, position + count, device="cpu") + (_rank() << _RANK_BITS)
        indices = batch[place(batch, self.index_key)]
        if not isinstance(indices, Tensor):
            try:
                indices = torch.as_tensor(indices, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                indices = torch.empty(0, device="cpu")
        if indices.is_floating_point() or indices.shape != (count,):
            raise InputError(
                f"index_key={self.index_key!r} must name the indices of {count} images, integers ({count},). Got "
                f"{_described(indices)}."
            )
        return indices.cpu()

    @torch.no_grad()
    def _processed(
        self, images: Sequence[Tensor], keys: Tensor, device: torch.device, checks: list[tuple[Tensor, str]]
    ) -> list[Tensor]:
        """Purify and compensate each tensor of images, in its own type; keys are in the order of the images."""
        values = [self._unit(x.as_subclass(Tensor).to(device, non_blocking=True), checks) for x in images]
        opened = [x.clamp(0, 1) for x in values]
        if device.type != "cuda":
            _verify(checks)  # what is no image must not reach a network that would complain about something else
        keys = keys.to(device, non_blocking=True)
        single = len(opened) == 1 and opened[0].ndim == 4
        if self.purifier is not None:
            self._check_shapes(opened)
            grey = [x.shape[-3] == 1 and self.purifier.image_channels == 3 for x in opened]
            out = [x.expand(*x.shape[:-3], 3, -1, -1) if g else x for x, g in zip(opened, grey, strict=True)]
            purify_keys = noise.fold_in(keys, PURIFY)
            with self.purifier.unchanged(), exact_arithmetic(device):
                # not by calling it: that looks at the values, and would wait for a GPU
                if not single:
                    out = self.purifier.run_images(out, purify_keys)
                elif len(keys):
                    out = [self.purifier.run(out[0], purify_keys)]
            opened = [luma(x) if g else x for x, g in zip(out, grey, strict=True)]
            checks += [(x.isfinite().all(), "the purifier must give finite images. Got NaN or infinity.") for x in out]
        opened = [x.clamp(0, 1) for x in opened]
        if self.compensate is not None:
            children = noise.fold_in(keys, COMPENSATE)
            rows = [children] if single else list(children[:, None])
            opened = [self._compensated(x, k) for x, k in zip(opened, rows, strict=True)]
        return [self._closed(x, was, like) for x, was, like in zip(opened, values, images, strict=True)]

    def _compensated(self, x: Tensor, keys_B: Tensor) -> Tensor:
        # A class of its own only: a subclass may have changed `apply`, which looks at the values and waits for a GPU.
        if (run := vars(type(self.compensate)).get("run")) is not None:
            batch = x if x.ndim == 4 else x[None]
            return run(self.compensate, batch, keys_B).reshape(x.shape)
        assert self.compensate is not None
        out = self.compensate.apply(x, keys_B)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise InputError(f"compensate must keep the shape {tuple(x.shape)}. Got {_described(out)}.")
        return out.clamp(0, 1)

    def _check_shapes(self, images: Sequence[Tensor]) -> None:
        assert self.purifier is not None
        wanted = self.purifier.image_channels
        for x in images:
            if wanted not in (None, x.shape[-3]) and not (wanted == 3 and x.shape[-3] == 1):
                raise InputError(f"This purifier takes images of {wanted} channels. Got {tuple(x.shape)}.")
            check_channels("A purifier", x.shape, leading="B" if x.ndim == 4 else "")

    def _unit(self, x: Tensor, checks: list[tuple[Tensor, str]]) -> Tensor:
        """Bring images to float32 in [0, 1], but for rounding and what `keep_outside` keeps; `checks` sees to that."""
        if x.dtype == torch.uint8:
            if self.normalize is not None:
                raise InputError("Images of uint8 are not normalised. Leave normalize= out.")
            return x.float() / 255
        if not x.is_floating_point():
            raise InputError(f"Images are uint8 or floating point. Got {x.dtype}.")
        values = x.float()
        if self.normalize is not None:
            mean, std = (_per_channel(numbers, x) for numbers in self.normalize)
            if not self._looked and values.numel():
                self.__dict__["_looked"] = True
                if values.min() >= 0 and values.max() <= 1:
                    log.warning(
                        "normalize= was given, but the first batch lies in [0, 1], from %.3g to %.3g, as images that "
                        "are not normalised do.",
                        values.min(),
                        values.max(),
                    )
            values = values * std + mean
        if values.numel():
            checks.append(self._check_range(values, self._slack(x)))
        return values

    def _slack(self, x: Tensor) -> float:
        """Return how far out of [0, 1] a value may be, which is clamped: more where it was rounded normalised."""
        return tolerance(x.dtype) + (0.0 if self.normalize is None else 4 * torch.finfo(x.dtype).eps)

    def _check_range(self, values: Tensor, slack: float) -> tuple[Tensor, str]:
        if self.keep_outside:
            share = _outside(values, slack).float().mean()
            return (share <= 0.5) & values.isfinite().all(), (
                "keep_outside= is for the rectangles of random erasing. Got images outside [0, 1] in most of their "
                "pixels, or NaN: give the mean and std that the loader normalises with."
            )
        low, high = values.aminmax()
        inside = (low >= -slack) & (high <= 1 + slack)  # False for NaN
        if self.normalize is None:
            return inside, (
                "images in floating point lie in [0, 1]. Got others, or NaN: give normalize=(mean, std) where the "
                "loader normalises, divide 0-255 floats by 255, and clamp behind bicubic resizing or sharpening."
            )
        return inside, (
            "normalize= must be the mean and std that the loader normalises with. Got images that it does not bring "
            "back into [0, 1]. If random erasing comes behind the normalisation (timm's pixel mode), say "
            "keep_outside=True, or purify what the loader reads: a PurifiedDataset in place of its dataset."
        )

    def _closed(self, x: Tensor, was: Tensor, like: Tensor) -> Tensor:
        """Bring images in [0, 1] to the type, normalisation, tensor type and memory format of `like`."""
        if like.dtype == torch.uint8:
            x = (x * 255).round().to(torch.uint8)  # as `quantize`, which looks at the values first
        elif self.normalize is not None:
            mean, std = (_per_channel(numbers, x) for numbers in self.normalize)
            x = (x - mean) / std
        x = x.to(like.dtype)
        if self.keep_outside and like.is_floating_point():
            kept = like.as_subclass(Tensor).to(x.device, non_blocking=True)
            x = torch.where(_outside(was, self._slack(like)), kept, x)
        if like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            x = x.contiguous()
        return tv_tensors.wrap(x, like=like) if isinstance(like, tv_tensors.TVTensor) else x


def _outside(values: Tensor, slack: float) -> Tensor:
    """Find the pixels that are outside [0, 1] in some channel: bool (..., 1, H, W)."""
    return ((values < -slack) | (values > 1 + slack)).any(-3, keepdim=True)


def _check_shared_out(loader: Any) -> None:
    """Refuse a loader of torch's in a job of several processes if nothing says that it shares the images out."""
    while not isinstance(loader, DataLoader) and "loader" in getattr(loader, "__dict__", {}):
        loader = loader.loader  # of timm's, which prefetches
    if _processes() == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    if type(loader).__module__.partition(".")[0] == "accelerate":  # it shares out, or reads in one process for all
        return
    batches = getattr(loader, "batch_sampler", None)
    if any(
        hasattr(part, "num_replicas") for part in (loader, loader.sampler, batches, getattr(batches, "sampler", None))
    ):
        return
    raise InputError(
        f"In a job of several processes each must have a share of the images. It cannot be seen that the "
        f"{type(loader.sampler).__name__} of this {type(loader).__name__} shares them out among {_processes()}: wrap "
        "what accelerator.prepare(loader) gives, or give the loader sampler=DistributedSampler(dataset). A sampler of "
        "your own that shares them out says so by attributes num_replicas and rank. If the dataset is this process's "
        "share already, or each shall have all: DistributedSampler(dataset, num_replicas=1, rank=0)."
    )


def _processes() -> int:
    return torch.distributed.get_world_size() if _is_joined() else launcher_number("WORLD_SIZE", 1, 1)


def _is_stateful(loader: Any) -> bool:
    """Say whether it can save its place. A loader that accelerate prepared has the methods also where it cannot."""
    able = getattr(loader, "use_stateful_dataloader", True)
    return bool(able) and all(callable(getattr(loader, name, None)) for name in _STATE)


def _verify(checks: list[tuple[Tensor, str]]) -> None:
    """Raise the first error whose condition does not hold; waits for the device."""
    for good, message in checks:
        if not bool(good):
            raise InputError(message[0].upper() + message[1:])


def _as_normalize(normalize: Any) -> tuple[Tensor, Tensor]:
    try:
        mean, std = (torch.as_tensor(numbers, dtype=torch.float32, device="cpu").reshape(-1) for numbers in normalize)
        good = len(mean) == len(std) and bool((mean.isfinite() & std.isfinite() & (std > 0)).all())
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise InputError(
            f"normalize must be (mean, std), a number a channel each, std positive. Got {normalize!r}: leave it out "
            "for images that are not normalised."
        )
    return mean, std


def _per_channel(numbers: Tensor, x: Tensor) -> Tensor:
    if len(numbers) not in (1, x.shape[-3]):
        raise InputError(f"normalize has {len(numbers)} channels, and the images {x.shape[-3]}. Got {tuple(x.shape)}.")
    return numbers.to(x.device, non_blocking=True)[:, None, None]


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _rank() -> int:
    """Return this process's rank: of torch.distributed where it runs, else of the environment, as torchrun sets it."""
    return torch.distributed.get_rank() if _is_joined() else launcher_number("RANK", 0)


def _is_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
