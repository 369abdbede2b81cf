"""Identify a network: by its weights, whatever file they came from, and by its structure."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.objects import Walk, code_sha256, original, parts


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU, contiguous, sorted by name, without the `_orig_mod.` of `torch.compile`."""
    named = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"Weights must be tensors. Got {type(value).__name__} for {name!r}. "
                "Keep other state out of the state dict (get_extra_state)."
            )
        named[name.replace("_orig_mod.", "")] = value.detach().cpu().contiguous()
    return dict(sorted(named.items()))


def weights_sha256(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256, in hex, of each weight's name, dtype, shape and values: what fingerprints call the weights.

    It depends on no file, device, memory format or compilation; a cast changes it: with `dtype` it is that of the
    weights cast to it. (The hash of a checkpoint's file, which guards against damage, is another number.)
    """
    sha = hashlib.sha256()
    for name, tensor in named_weights(module).items():
        tensor = tensor if dtype is None else tensor.to(dtype)
        # The line says how many bytes follow, so that no two states give the same stream.
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        sha.update(canonical_json(head).encode() + b"\n")
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


Known = Callable[[nn.Module], Any]


def structure(module: nn.Module, known: Known = lambda part: None) -> dict[str, Any]:
    """Describe what a network computes with beside its weights, as JSON, submodule by submodule.

    Of each: its class, its public attributes but for `training`, its hooks, and the values of tensors that are no
    weights. Functions count by their name, code, defaults and closure, those of torch and numpy by name; objects by
    their class and values (6 levels, 1,000 values); classes by name. Not seen: the code of classes, global variables,
    attributes of modules with a leading underscore, and values of objects written in C.

    A class may list attributes that are for people alone as `for_people`. What `known` gives for a submodule stands in
    the place of its description, unless it is None.
    """
    return _structure(module, set(), known)


def structure_sha256(module: nn.Module) -> str:
    """SHA-256, in hex, of `structure`. Another version of torch may give its own layers other attributes."""
    return hashlib.sha256(canonical_json(structure(module)).encode()).hexdigest()


_AS_THEY_ARE = (int, bool, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def public_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of one module that `structure` describes, in no certain order."""
    if isinstance(module, torch.jit.ScriptModule):  # what it has in Python is a copy, made when it is asked for
        return
    cls: Any = type(module)
    hidden = _hidden(cls)
    for name, value in vars(module).items():
        if name[0] != "_" and name not in hidden:
            yield name, value


@functools.cache
def _hidden(cls: type[Any]) -> frozenset[str]:
    """Name the attributes that decide nothing, or follow from others when they are first asked for."""
    members = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
    cached = (name for name, value in members.items() if isinstance(value, functools.cached_property))
    return frozenset({"training", *getattr(cls, "for_people", ()), *cached})


def _structure(module: nn.Module, seen: set[int], known: Known = lambda part: None) -> dict[str, Any]:
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    out: dict[str, Any] = {"class": _class_name(type(module))}
    if id(module) in seen:
        return {**out, "again": True}
    seen.add(id(module))
    walk = Walk(seen)
    out |= {name: described(value, walk) for name, value in public_attributes(module)}
    if isinstance(module, torch.jit.ScriptModule):
        out |= _script(module)
    volatile = module._non_persistent_buffers_set
    out |= {name: described(value, walk) for name, value in module._buffers.items() if name in volatile}
    hooks = {kind.strip("_"): [described(hook, walk) for hook in vars(module)[kind].values()] for kind in HOOKS}
    out |= {kind: names for kind, names in hooks.items() if names}
    for name, part in module._modules.items():
        if part is not None:
            short = known(part)
            out[name] = _structure(part, seen, known) if short is None else short
    return out


def _script(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Describe a module of TorchScript: its code, which it has with it, and the values that the code takes from it."""
    both = {str(name): module._c._get_method(name).code_with_constants for name in module._c._method_names()}
    code = {name: [_MANGLED.sub("", text), described(more)] for name, (text, more) in both.items()}
    names = sorted({name for text, _ in code.values() for name in _OF_ITSELF.findall(text)})
    values = {name: getattr(module, name) for name in names if name not in ("training", *code)}
    inside = (nn.Module, Tensor)  # which are described by themselves, or are weights
    plain = {name: described(value) for name, value in values.items() if not isinstance(value, inside)}
    return {"class": module.original_name, "code": code, **plain}


_MANGLED = re.compile(r"___torch_mangle_\d+\.")  # counts how many of a name there are in this process
_OF_ITSELF = re.compile(r"\bself\.(\w+)")


def _class_name(cls: type[Any]) -> str:
    """Name a class, with its package where that is one of ours: a `UNet` of the user's is another class."""
    package = cls.__module__.partition(".")[0]
    return f"{package}.{cls.__qualname__}" if package in ("purifyloader", "torch", "torchvision") else cls.__qualname__


def described(value: Any, walk: Walk | None = None) -> Any:
    """Describe a value as JSON, by what it is and never by where: no path, address or `repr`."""
    if type(value) in _AS_THEY_ARE:
        return value
    walk = Walk() if walk is None else walk
    if id(value) in walk.open:  # a value that holds itself
        return {**_named(value), "again": True}
    walk.open.add(id(value))
    try:
        return _described(value, walk)
    finally:
        walk.open.discard(id(value))


def _described(value: Any, walk: Walk) -> Any:
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str.__str__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return {"float": str(float(value))}
        return int(value) if value == int(value) else float(value)  # 1 and 1.0 are one number
    if isinstance(value, Mapping):
        return {_key(key, walk): described(part, walk) for key, part in walk.limited(value.items())}
    if isinstance(value, list | tuple):
        return [described(part, walk) for part in walk.limited(value)]
    if isinstance(value, set | frozenset):
        if walk.levels and len(value) > walk.left:  # which of them were left out would depend on their order
            return {"class": _class_name(type(value)), "values": len(value)}
        return sorted((described(part, walk) for part in walk.limited(value)), key=canonical_json)
    if isinstance(value, nn.Module):  # one that is not registered, and so in no state dict
        return _module_within(value, walk)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _array(value)
    if isinstance(value, functools.partial):
        return {"partial": [described(part, walk) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, complex):
        return {"complex": [described(part, walk) for part in (value.real, value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"class": _class_name(type(value)), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, types.CodeType):
        return code_sha256(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return {"class": _class_name(type(value)), **described(values, walk)}
    return _taken_apart(original(value), walk)


def _key(key: Any, walk: Walk) -> str:
    members = key if isinstance(key, tuple) else (key,)
    plain = all(isinstance(part, str | int | float | type | torch.dtype | enum.Enum | None) for part in members)
    return str(key) if plain else canonical_json(described(key, walk))


def _module_within(module: nn.Module, walk: Walk) -> dict[str, Any]:
    again = id(getattr(module, "_orig_mod", module)) in walk.modules
    structure = _structure(module, walk.modules)
    if again and walk.levels:  # its weights are hashed where it was described first
        return {"module": structure}
    return {"module": structure, "weights_sha256": weights_sha256(module)}


def _named(value: Any) -> dict[str, Any]:
    """Name a function or a class; an object has its class."""
    name = getattr(value, "__qualname__", None)
    return {"code": name} if isinstance(name, str) else {"class": _class_name(type(value))}


def _taken_apart(value: Any, walk: Walk) -> dict[str, Any]:
    name = _named(value)
    if not walk.enter():
        return name
    try:
        return name | {part: described(inner, walk) for part, inner in parts(value).items()}
    except Exception:  # objects of others may refuse to be read, or hold what has no description
        return name
    finally:
        walk.leave()


def _array(value: Any) -> dict[str, Any]:
    shape = list(value.shape)
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_meta:
            return {"dtype": dtype, "shape": shape}
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        dtype = str(value.dtype)
        if value.dtype.hasobject:  # whose bytes are addresses
            return {"dtype": dtype, "shape": shape}
        data = np.ascontiguousarray(value).tobytes()
    return {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(data).hexdigest()}
