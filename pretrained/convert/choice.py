"""Choose the weights of one network among all that a training keeps in a file: raw ones, averages, and more.

Nothing is guessed: where one network's weights are there twice, the user chooses. Averages may have no names (a list,
in the order of the parameters) or names without dots; they get those of the raw weights beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from purifyloader.errors import CheckpointError
from purifyloader.pretrained.convert.mapping import unprefixed
from purifyloader.pretrained.registry import listed

__all__ = ["Taken", "says_average", "state_dict", "take"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "ema", "ema_state_dict")

_AVERAGE = re.compile(
    r"(?<![A-Za-z])(?<!non.)(?<!non)(?:ema|avg|averaged?|averages|shadow|swa|polyak)(?![A-Za-z])|(?<!non_)EMA(?![a-z])"
)
_DEEPEST = 5  # of dicts and lists in each other
_MOST = 20_000  # of these, in one file


class Taken(NamedTuple):
    """Weights by name, and for people where they were taken from."""

    weights: dict[str, Tensor]
    where: str


def says_average(name: str) -> bool:
    """Tell whether the name of a file or a folder says that averaged weights are in it.

    >>> from purifyloader.pretrained.convert.choice import says_average
    >>> [says_average(name) for name in ("ema_0.9999_100000.pt", "model-EMA.ckpt", "model.non_ema.bin", "schema.pt")]
    [True, True, False, False]
    """
    return _AVERAGE.search(name) is not None


def state_dict(read: Any, path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Find the weights by name in what `read_file` returned, as `take` does."""
    return take(read, path, key).weights


def take(read: Any, path: Path, key: str | None = None) -> Taken:
    """Find the weights by name in what `read_file` returned; `path` is for messages.

    A dict of tensors is taken as it is, without a prefix that all its names have, or the only one below a usual name
    (`state_dict`, `model`, `ema`, ...), or the one below `key`, with dots for one in another, or the tensors whose
    names begin with `key`. Where one network's weights are there twice, raw and averaged, `key` must choose.
    """
    found = list(_found(read))
    value, what, where = read, path.name, f"all of {path.name}"
    if key is not None:
        value = _below(read, key, key, path)
        if isinstance(value, Mapping) and not _is_weights(value) and len(inner := list(_found(value))) == 1:
            key, value = f"{key}.{inner[0][0]}", inner[0][1]  # an average beside its settings
        what, where = f"{path.name}, {key!r}", f"{key!r} of {path.name}"
        if _is_list(value):
            weights, raw = _by_order(value, found, path, key)
            return Taken(weights, f"{where}, a list that has its names from {raw!r}")
        if _is_weights(value) and (renamed := _renamed(value, found)) is not None:
            return Taken(_bare(renamed), where)
    if not isinstance(value, Mapping):
        hint = " Save its state_dict() alone." if isinstance(value, torch.nn.Module) else " Give a state dict."
        if _is_list(value):
            hint = " A list of tensors has no names: give a file that has the raw weights beside it."
        raise CheckpointError(f"{path} must hold a dict of weights. Got {type(value).__name__} in {what}.{hint}")
    if not value:
        raise CheckpointError(f"{path} must hold a dict of weights. Got an empty dict in {what}. Download it again.")
    if _is_weights(value):
        weights = _bare(value)
        _check_single(_groups(weights), len(weights), path, key)
        return Taken(weights, where)
    dicts = {name: inner for name, inner in value.items() if _is_weights(inner)}
    inside = [name for name in _WRAPPERS if name in dicts]
    if key is None and len(inside) == 1:
        own = inside[0]
        if twins := [n for n, v in found if n != own and not n.startswith(f"{own}.") and _is_twin(v, dicts[own])]:
            names = [n for n, _ in found if n == own or n in twins]
            raise _several(names, path)
        return take(read, path, own)
    if len(inside) > 1:
        raise _several(inside, path, key)
    raise _no_weights(value, what, path)


def _no_weights(value: Mapping[Any, Any], what: str, path: Path) -> CheckpointError:
    other = [f"{name} ({type(inner).__name__})" for name, inner in value.items() if not isinstance(inner, Tensor)]
    if len(other) < len(value):
        return CheckpointError(
            f"{path} must hold tensors only, by name. Got {what} with {listed(other, 8)} among them. Save the state "
            "dict alone, or give the --key below which it lies."
        )
    return CheckpointError(
        f"{path} must hold a dict of tensors, or one under {', '.join(_WRAPPERS[:4])} or ema. Got {what} with the keys "
        f"{_keys(value)}. Give the --key below which the weights lie."
    )


def _found(read: Any, key: str = "", depth: int = 0, seen: list[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield each dict and each list of tensors in a file, with the key that leads to it."""
    seen = [0] if seen is None else seen
    seen[0] += 1
    if depth > _DEEPEST or seen[0] > _MOST:
        return
    if _is_list(read) or _is_weights(read):
        yield key, read
    elif isinstance(read, Mapping | list | tuple):
        items = read.items() if isinstance(read, Mapping) else enumerate(read)
        for name, value in items:
            yield from _found(value, f"{key}.{name}" if key else str(name), depth + 1, seen)


def _below(read: Any, key: str, whole: str, path: Path) -> Any:
    """Return what lies below a key with dots, or the tensors whose names begin with it."""
    if isinstance(read, list | tuple):
        first, _, rest = key.partition(".")
        if first.isdecimal() and int(first) < len(read):
            return _below(read[int(first)], rest, whole, path) if rest else read[int(first)]
        got = f"{_kind(read)}"
    elif not isinstance(read, Mapping):
        got = type(read).__name__
    else:
        # a name may have dots of its own
        for name in sorted((n for n in read if isinstance(n, str)), key=len, reverse=True):
            if key == name:
                return read[name]
            if key.startswith(f"{name}.") and isinstance(read[name], Mapping | list | tuple):
                return _below(read[name], key[len(name) + 1 :], whole, path)
        names = [name for name in read if isinstance(name, str) and name.startswith(f"{key}.")]
        if names:
            return {name.removeprefix(f"{key}."): read[name] for name in names}
        got = f"a dict with {_keys(read)}"
    raise CheckpointError(
        f"{path} must hold weights under --key {whole!r}. Got {got} where {key.partition('.')[0]!r} was looked for. "
        "Give another --key."
    )


def _groups(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort weights by what comes before the first dot of their names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = value
    return groups


def _bare(read: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what a training put before every name: its module's, DataParallel's, torch.compile's or an average's."""
    weights = unprefixed({str(name): value for name, value in read.items()})
    # an average counts its updates beside the weights
    counted = {name: value for name, value in weights.items() if "." in name or value.ndim}
    if (named := unprefixed(counted)).keys() != counted.keys():
        weights = named
    while len(groups := _groups(named)) == 1:
        inner = next(iter(groups.values()))
        below = _groups(inner)
        if not any("." in name for name in inner) or any(not name or name.isdecimal() for name in below):
            break
        weights = named = unprefixed(inner)
    return weights


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in _bare(weights).items()}


def _is_twin(value: Any, weights: Mapping[str, Tensor]) -> bool:
    """Tell whether a dict or a list holds the weights of the same network, all of them or most."""
    if isinstance(value, Mapping):
        own, other = _shapes(weights), _shapes(value)
        return (2 * len(other) > len(own) and other.items() <= own.items()) or _dotted(value, weights) is not None
    own_shapes = iter([tensor.shape for tensor in weights.values()])
    return 2 * len(value) > len(weights) and all(tensor.shape in own_shapes for tensor in value)  # in this order


def _check_single(groups: Mapping[str, Mapping[str, Tensor]], total: int, path: Path, key: str | None = None) -> None:
    """Refuse weights of which several groups are those of one network of nested modules.

    They are more than half of all, or the name of one says that it is an average.
    """
    nested = {name: group for name, group in groups.items() if any("." in inner for inner in group)}
    shapes = {name: _shapes(group) for name, group in nested.items()}
    for name, group in nested.items():
        names = [n for n in groups if shapes.get(n) == shapes[name] or _dotted(groups[n], group) is not None]
        size = sum(len(groups[n]) for n in names)
        if len(names) > 1 and (size > total / 2 or any(map(says_average, names))):
            raise _several(names, path, key)


def _dotted(value: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Give names without dots, as buffers have them, the dots of the raw weights' names; None where they differ."""
    if any("." in name for name in value):
        return None
    names = {name.replace(".", ""): name for name in raw}
    named = {names[name]: tensor for name, tensor in value.items() if name in names}
    counts = [name for name, tensor in value.items() if name not in names and tensor.ndim]
    fits = 2 * len(named) > len(raw) == len(names) and all(raw[n].shape == t.shape for n, t in named.items())
    return named if fits and not counts and any("." in name for name in named) else None


def _renamed(value: Mapping[str, Tensor], found: Sequence[tuple[str, Any]]) -> dict[str, Tensor] | None:
    """Find the raw weights whose names these are, without dots, in the file."""
    for _, weights in found:
        if isinstance(weights, Mapping):
            for raw in (weights, *_groups(weights).values()):
                if (named := _dotted(value, raw)) is not None:
                    return named
    return None


def _by_order(
    values: Sequence[Tensor], found: Sequence[tuple[str, Any]], path: Path, key: str
) -> tuple[dict[str, Tensor], str]:
    """Give a list of tensors the names of the raw weights beside it, which have its shapes in its order."""
    shapes = [tensor.shape for tensor in values]
    fitting: dict[tuple[str, ...], str] = {}
    for where, weights in found:
        if not isinstance(weights, Mapping):
            continue
        bare = _bare(weights)
        floating = {name: tensor for name, tensor in bare.items() if tensor.is_floating_point()}  # without counters
        for named in (bare, floating):
            if [tensor.shape for tensor in named.values()] == shapes:
                fitting.setdefault(tuple(named), where)
    if len(fitting) == 1:
        names, where = next(iter(fitting.items()))
        return dict(zip(names, values, strict=True)), where
    several = f"{', '.join(map(repr, fitting.values()))}, which all have these" if fitting else "none that has these"
    raise CheckpointError(
        f"{path} must hold raw weights with the shapes of the {len(values)} tensors in {key!r}, in their order: a list "
        f"has no names of its own. Got {several}. Save the average as a state dict where it was trained."
    )


_WRITERS = {  # names that mislead
    "current_model_state": "Lightning's WeightAveraging writes the average as state_dict.",
    "ema_state_dict": "MMEngine's EMAHook writes the average as state_dict; others, as ema_state_dict.",
    "collected_params": "shadow_params are the average, and collected_params the raw weights put aside.",
}


def _several(names: Sequence[str], path: Path, key: str | None = None) -> CheckpointError:
    notes = [note for name, note in _WRITERS.items() if any(n.rpartition(".")[2] == name for n in names)]
    note = " ".join(["The averaged ones, often called ema, are what denoises best.", *notes])
    return CheckpointError(
        f"{path} must say which of its weights to take. Got {', '.join(map(repr, names))} beside each other: give "
        f"one with --key{'' if key is None else f', such as {key}.{names[-1]}'}. ({note})"
    )


def _is_weights(value: Any) -> TypeGuard[Mapping[str, Tensor]]:
    if not isinstance(value, Mapping):
        return False
    return bool(value) and all(isinstance(name, str) and isinstance(v, Tensor) for name, v in value.items())


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(v, Tensor) for v in value)


def _keys(value: Mapping[Any, Any]) -> str:
    return listed([f"{name} ({_kind(inner)})" for name, inner in value.items()], 12)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
