"""Keep purifiers what they were when they were made: their pixels are known by a configuration of that moment.

Nothing can be set on a purifier. What can be changed through it all the same (the weights, layers and settings of the
model inside, lists of stages) is noticed at the next call, by a look at every attribute and tensor: a millisecond for
100 layers. Only where something looks different, as after a move or in another process, is it hashed again.

Functions and objects that layers hold, hooks too, are looked into: defaults, closures and attributes, at most 6 levels
deep and 1,000 values of each.

Not noticed: the code of classes; attributes of modules whose names begin with an underscore, unless the configuration
shows them; global variables; the inside of objects written in C; single values of an array of numpy's over 4 kB;
weights that are changed through `.data`, of which torch keeps no count: on a GPU all of them, on the CPU a few single
ones, as 64 of each tensor are compared. What a network of the user's, a hook or an object changes during a call, such
as a counter, are its notes, and may change.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purifyloader.cache.format import differences
from purifyloader.core.checks import plain_number
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.objects import Walk, parts
from purifyloader.files.weights import HOOKS, public_attributes, structure, weights_sha256

__all__ = ["Freezing", "Seal", "check_move", "refuse_setting"]

_SAMPLED = 64  # values of each tensor on the CPU that are looked at
_WHOLE = 4096  # bytes of an array of numpy's that are compared one by one
_COMPARED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})
_OURS = ("purifyloader", "torch")  # packages whose modules change nothing of themselves when they are called


class Freezing(ABCMeta):
    """The class of classes whose objects are frozen when they are made: after the `__init__` of a subclass too.

    Numbers of numpy's among the arguments, as sweeps have them, are made Python's.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        plain = {name: plain_number(value) for name, value in kwargs.items()}
        made = super().__call__(*map(plain_number, args), **plain)
        if isinstance(made, nn.Module):
            made.eval()
            vars(made)["_seal"] = Seal(made)
        return made


class _Is:
    """An object that is equal to itself alone. It holds the object, so that no other can come to lie at its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _mark(value: Any, walk: Walk) -> Any:
    """Return what tells quickly whether a value has changed."""
    if type(value) in _PLAIN:
        return value
    if not walk.levels:
        return _mark_of(value, walk)
    if id(value) in walk.open:  # an object that holds itself
        return _Is(value)
    walk.open.add(id(value))
    try:
        return _mark_of(value, walk)
    finally:
        walk.open.discard(id(value))


def _mark_of(value: Any, walk: Walk) -> Any:
    if isinstance(value, list | tuple):
        values = walk.limited(value) if walk.levels else value
        return [part if type(part) in _PLAIN else _mark(part, walk) for part in values]
    if isinstance(value, dict):
        return {key: _mark(part, walk) for key, part in walk.limited(list(value.items()))}
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, Tensor):
        return _tensor_mark(value)
    if isinstance(value, np.ndarray):
        return _array_mark(value)
    if isinstance(value, nn.Module):  # of a list or an object, which torch does not know of
        if walk.levels and id(value) in walk.modules:
            return _Is(value)
        return [_Is(value), *_Look(value, modules=walk.modules).marks()]
    if isinstance(value, functools.partial):
        return [_Is(value), *(_mark(part, walk) for part in (value.func, value.args, value.keywords))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_Is(value), *(_mark(getattr(value, field.name, None), walk) for field in dataclasses.fields(value))]
    return _mark_within(value, walk)


def _mark_within(value: Any, walk: Walk) -> Any:
    """Return the mark of a function or an object: itself, and what it computes with."""
    with suppress(Exception):  # objects of others may refuse to be read
        inner = parts(value)
        if inner and walk.enter():
            walk.open.add(id(value))
            try:
                return [_Is(value), _mark(inner, walk)]
            finally:
                walk.open.discard(id(value))
                walk.leave()
    return _Is(value)


def _array_mark(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    values = array if array.nbytes <= _WHOLE else array.reshape(-1)[:: array.size // _SAMPLED]
    return _Is(array), array.dtype, array.shape, None if array.dtype.hasobject else values.tobytes()


def _tensor_mark(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    place: Any = None
    if tensor.layout == torch.strided:
        place = tensor.data_ptr(), tensor.stride()
    return _Is(tensor), version, tensor.dtype, tensor.device, tensor.shape, place


class _Look:
    """A quick look at a part of a purifier: at all of its modules but those that have a seal of their own."""

    def __init__(self, root: nn.Module, skipped: frozenset[str] = frozenset(), modules: set[int] | None = None) -> None:
        self._walk = Walk(modules)
        self.sealed: list[nn.Module] = []
        self.attributes: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}
        self.training: list[str] = []
        self.foreign = False
        self._samples: dict[torch.dtype, list[Tensor]] = {}
        for path, module in self._modules(root):
            self._add(path, module, skipped)
        # Functions and objects may keep notes, as a hook that collects outputs does, in networks of ours too.
        self.foreign = self.foreign or self._walk.entered

    def _modules(self, module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, part in module._modules.items():
            if part is None:
                continue
            if "_seal" in part.__dict__:
                self.sealed.append(part)
            else:
                yield from self._modules(part, f"{path}{name}.")

    def _add(self, path: str, module: nn.Module, skipped: frozenset[str]) -> None:
        cls, values, walk = type(module), module.__dict__, self._walk
        walk.modules.add(id(module))
        attributes = self.attributes
        attributes[f"{path}class"] = cls
        self.foreign = (
            self.foreign or isinstance(module, torch.jit.ScriptModule) or cls.__module__.partition(".")[0] not in _OURS
        )
        if module.training:
            self.training.append(path)
        for name, value in public_attributes(module):
            key = path + name
            if key not in skipped:
                attributes[key] = value if type(value) in _PLAIN else _mark(value, walk)
        for kind in HOOKS:
            if values[kind]:
                hooks = list(values[kind].values())
                attributes[path + kind] = [_Is(hook) for hook in hooks]
                for i, hook in enumerate(hooks):
                    key = f"{path}{kind.strip('_')}.{i}"
                    if key not in skipped:
                        attributes[key] = _mark(hook, walk)
        attributes[f"{path}modules"] = [_Is(part) for part in values["_modules"].values()]
        for name, tensor in chain(values["_parameters"].items(), values["_buffers"].items()):
            if tensor is not None:
                self.tensors[path + name] = _tensor_mark(tensor)

    def marks(self) -> tuple[Any, ...]:
        return self.attributes, self.tensors, self.training

    def sample(self) -> None:
        """Remember some values of each tensor on the CPU, for a change that torch does not count."""
        for mark in self.tensors.values():
            tensor = mark[0].value.detach()
            dense = tensor.layout == torch.strided and (
                tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
            )
            if dense and tensor.device.type == "cpu" and tensor.numel() and tensor.dtype in _COMPARED:
                step = max(1, tensor.numel() // _SAMPLED)
                view = tensor.as_strided((tensor.numel() // step,), (step,))
                self._samples.setdefault(tensor.dtype, []).append(view)
        self._sampled = self._values()

    def _values(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._samples.values()]

    def sees_the_same_values(self) -> bool:
        return all(torch.equal(old, new) for old, new in zip(self._sampled, self._values(), strict=True))


class Seal:
    """The record of what a purifier, or a condition, was when it was made.

    Attributes:
        made: its description then, in which those parts that have a seal are described by theirs.
        identity: the part of its configuration that decides the pixels; None where it has no configuration.
    """

    def __init__(self, root: nn.Module) -> None:
        self._volatile: frozenset[str] = frozenset()  # attributes that its own calls change
        self._look: _Look | None = self._looked(root)
        hashes = vars(root).pop("_hashes", {})
        self.made: dict[str, Any] = self._described(root, self._look, hashes)
        self.identity = _identity(root)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or another process, whose tensors are elsewhere."""
        return {**self.__dict__, "_look": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Seal:
        copied = Seal.__new__(Seal)
        copied.__dict__.update(self.__getstate__())  # of what is never changed
        return copied

    def _looked(self, root: nn.Module) -> _Look:
        look = _Look(root, self._volatile)
        look.sample()
        return look

    def _described(self, root: nn.Module, look: _Look, hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
        described = structure(root, lambda part: part.__dict__["_seal"].made if "_seal" in part.__dict__ else None)
        described |= {f"{name}.weights": sha256 for name, sha256 in _weights(root, hashes or {}).items()}
        described["in training mode"] = [path.rstrip(".") for path in look.training]
        types = [str(mark[2]).removeprefix("torch.") for mark in look.tensors.values()]
        described["types"] = {name: types.count(name) for name in sorted(set(types))}
        described["strides"] = {path: strides for path, mark in look.tensors.items() if (strides := _strides(mark))}
        return described

    def check(self, root: nn.Module, outermost: bool = True) -> None:
        """Raise `ConfigError`, with what differs, where it is no longer what was made."""
        look = _Look(root, self._volatile)
        old = self._look
        if old is None or old.marks() != look.marks() or not old.sees_the_same_values():
            now = self._described(root, look)
            made, now = (_without(values, self._volatile) for values in (self.made, now))
            if changed := differences(made, now):
                raise _changed(root, changed)
            look.sample()
            self._look = look
        if (agreed := vars(root).get("_agreed")) != (planned := vars(root).get("planned")):
            raise _changed(root, differences({"planned": agreed}, {"planned": planned}))
        for part in look.sealed:
            part.__dict__["_seal"].check(part, outermost=False)
        if outermost and self.identity is not None and (identity := _identity(root)) != self.identity:
            raise _changed(root, differences(self.identity, identity or {}))

    def settle(self, root: nn.Module) -> None:
        """After a call: what it has changed in a network of the user's is from now on for the network to change."""
        old = self._look
        if old is None:
            return
        for part in old.sealed:
            part.__dict__["_seal"].settle(part)
        if not old.foreign:
            return
        look = _Look(root, self._volatile)
        keys = {*old.attributes, *look.attributes}
        if notes := {key for key in keys if old.attributes.get(key) != look.attributes.get(key)}:
            self._volatile |= notes
            for key in notes:
                old.attributes.pop(key, None)


def _identity(root: Any) -> dict[str, Any] | None:
    try:
        identity: dict[str, Any] = root._identity()
        return identity
    except Exception:  # a plugin's may have no configuration, and works without a cache
        return None


def _weights(root: nn.Module, hashes: Mapping[str, str], path: str = "") -> dict[str, str]:
    """Hash the weights of each submodule without a seal inside, and what others have of their own; `hashes` are known.

    None is there of one whose state are other things than tensors.
    """
    found: dict[str, str] = {}
    for name, part in root._modules.items():
        if part is None or "_seal" in part.__dict__:
            continue
        if any("_seal" in module.__dict__ for module in part.modules()):
            found |= _weights(part, {}, f"{path}{name}.")
        elif any(True for _ in chain(part.parameters(), part.buffers())):
            with suppress(InputError):
                found[path + name] = hashes.get(name) or weights_sha256(part)
    if root._parameters or root._buffers:
        own = nn.Module()
        own._parameters, own._buffers = root._parameters, root._buffers
        own._non_persistent_buffers_set = root._non_persistent_buffers_set
        found[f"{path}its own"] = weights_sha256(own)
    return found


def _strides(mark: tuple[Any, ...]) -> list[int] | None:
    """Say how a tensor lies in memory, by which kernels are chosen; None where it lies in the order of its axes."""
    tensor: Tensor = mark[0].value
    if mark[5] is None or tensor.is_contiguous():
        return None
    return [stride for stride, count in zip(tensor.stride(), tensor.shape, strict=True) if count > 1]


def _without(values: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Return a description without some attributes, by their paths."""
    out = dict(values)
    for key in keys:
        first, _, rest = key.partition(".")
        if not rest:
            out.pop(first, None)
        elif isinstance(out.get(first), dict):
            out[first] = _without(out[first], frozenset({rest}))
        elif isinstance(out.get(first), list):  # hooks, of which the names stay
            names = ("code", "class", "body")
            out[first] = [
                {name: hook[name] for name in names if name in hook} if str(i) == rest else hook
                for i, hook in enumerate(out[first])
            ]
    return out


def _changed(root: Any, changed: str) -> ConfigError:
    return ConfigError(
        f"A {type(root).__name__} stays what it was when it was made, for its configuration, and every cache, says "
        f"that. Got one that was changed since (then → now):\n{changed}\nMake a new one, of the model as it is now."
    )


def refuse_setting(owner: Any, name: str) -> ConfigError:
    kind = type(owner).__name__
    return ConfigError(
        f"A {kind} stays what it was when it was made, for its configuration says that. Got a change of {name}: make a "
        f"new {kind} with what you want."
    )


def check_move(root: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Raise `ConfigError` unless `function`, which torch applies to every tensor, does no more than move it."""
    tensors = [*root.parameters(), *root.buffers()]
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    device = tensors[0].device if tensors else torch.device("cpu")
    for dtype in types:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            probe = torch.zeros(2, 2, 2, 2, dtype=dtype, device=device).contiguous(memory_format=memory_format)
            moved = function(probe)
            if moved.dtype != dtype or moved.stride() != probe.stride():
                name = type(root).__name__
                what = "another type" if moved.dtype != dtype else "another memory format"
                raise ConfigError(
                    f"The type and the memory format of a {name} decide its pixels, and so they are those that it was "
                    f"made with. Got a conversion to {what}: make a new {name}, with dtype= where it has a network. To "
                    "move it to a device is no conversion."
                )
