"""Write and read a model as a folder: config.json, model.safetensors and README.md, its card.

config.json is written last and names the SHA-256 of model.safetensors, so that a save which was killed,
over nothing or over an older checkpoint, is never read as whole. Its `format` names the kind of model
("purifyloader-denoiser", "purifyloader-energy"); the field named like the kind describes the model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as read_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from purifyloader.cache.format import differences
from purifyloader.core.checks import as_path
from purifyloader.errors import CacheError, CheckpointError, ConfigError, InputError
from purifyloader.files.atomic import canonical_json, file_sha256, replacing, write_text
from purifyloader.files.json import parse_json, read_json
from purifyloader.files.locks import Lock
from purifyloader.files.opening import check_file, opened
from purifyloader.files.weights import named_weights, weights_sha256
from purifyloader.pretrained.binding import bind, check_bound, remember
from purifyloader.pretrained.kinds import KINDS, ModelKind, identity_of, kind_of, kind_of_format
from purifyloader.pretrained.registry import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    available,
    check_not_foreign,
    find,
    listed,
)

if TYPE_CHECKING:
    from purifyloader.diffusion.denoiser import NetworkDenoiser
    from purifyloader.energy.network import EnergyNetwork

__all__ = ["VERSION", "Summary", "check_folder", "kind_of_folder", "load", "model_facts", "read_config", "save"]
__all__ += ["summary", "why_not_shipped"]

VERSION = 1
_METADATA = "purifyloader"  # two metadata keys would be written in random order

_AGAIN = "Save or download the checkpoint again"


def save(
    model: NetworkDenoiser | EnergyNetwork,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    card: str | None = None,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model to a folder that `load` reads.

    Args:
        model: its weights are stored as float32, wherever and whatever they are now.
        path: the folder; it is made where it is missing.
        name: what `load(path).name` will be.
        card: the text of README.md; None writes one with the facts that the model knows.
        details: anything JSON that should stay with the model, such as how it was trained. Those that name the images
            learned from (image_hashes) are stored with the hash of the weights, `weights_sha256`, and fit no others.
        overwrite: replace a checkpoint that stands there.

    Raises:
        InputError: no model that can be saved, a path to a file, weights that are not finite, details that are no JSON,
            or that name the images of other weights, or fewer than the model began with (see `binding`).
        CheckpointError: files of a checkpoint are there and `overwrite` is False, or writing failed.

    >>> import tempfile
    >>> from purifyloader import pretrained
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pretrained.save(EnergyNetwork(EnergyConfig(channels=4)), folder, name="tiny")
    ...     pretrained.load(folder, kind="energy").name
    'tiny'
    """
    kind = kind_of(model)
    if kind is None or not isinstance(model, kind.saved()):
        known = " or ".join(kind.saved().__name__ for kind in KINDS.values())
        raise InputError(f"A model that can be saved is a {known}. Got {type(model).__name__}. Wrap the network.")
    if not isinstance(name, str | None):
        raise InputError(f"The name of a model must be a string or None. Got {type(name).__name__}.")
    folder = as_path(path)
    check_folder(folder, overwrite)
    weights = {key: tensor.float() for key, tensor in named_weights(kind.network(model)).items()}
    if bad := [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise InputError(f"Weights must be finite to be saved. Got NaN or infinity in {listed(bad)}.")
    try:
        details = json.loads(canonical_json(dict(details or {})))
    except (TypeError, ValueError) as error:
        raise InputError(f"details must be a JSON object without NaN. Got {error}. Convert its values.") from None
    details = bind(details, model, kind.network(model))

    header = {"format": kind.format, "version": VERSION, kind.name: kind.config(model)}
    try:
        os.makedirs(folder, exist_ok=True)
        with Lock(folder, CONFIG_FILE, traceless=True):
            check_folder(folder, overwrite)  # another process may have saved one meanwhile
            with replacing(folder / MODEL_FILE) as temporary:
                save_file(weights, temporary, metadata={_METADATA: canonical_json(header)})
                sha256 = file_sha256(temporary)  # not of what another process may put in its place
            write_text(folder / CARD_FILE, card if card is not None else _minimal_card(kind, model, name))
            config = {**header, "name": name, "model_sha256": sha256, "details": details}
            write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")
    except (SafetensorError, OSError, CacheError) as error:
        raise CheckpointError(
            f"A checkpoint must be written to {folder}. Got: {error}. Make room on the disk or give another folder, "
            "one that you may write to, and save it again."
        ) from error


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a file in place of a folder, and a checkpoint that must not be overwritten."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"A checkpoint is saved to a folder. Got the file {folder}. Give another path.")
    files = [file for file in (CONFIG_FILE, MODEL_FILE, CARD_FILE) if os.path.exists(folder / file)]
    if files and not overwrite:
        raise CheckpointError(
            f"must be set to replace a checkpoint. Got {folder}, which has {', '.join(files)}. Give another folder, or "
            "replace these files.",
            argument="overwrite",
        )


@overload
def load(name_or_path: str | os.PathLike[str], kind: Literal["denoiser"] = "denoiser") -> NetworkDenoiser: ...


@overload
def load(name_or_path: str | os.PathLike[str], kind: Literal["energy"]) -> EnergyNetwork: ...


@overload
def load(name_or_path: str | os.PathLike[str], kind: str) -> Any: ...


def load(name_or_path: str | os.PathLike[str], kind: str = "denoiser") -> Any:
    """Load a model in eval mode, frozen, float32, on the CPU. torch's generator is left alone.

    Args:
        name_or_path: one of `list()`, the folder that `save` wrote, or, for such a folder on the Hugging Face hub,
            `"owner/name"` or `"owner/name@revision"`. Only the last touches the network, after a warning, and only
            where there is no folder of that name.
        kind: "denoiser", "energy", or another of `purifyloader.pretrained.kinds`: a model of another is an error.

    Raises:
        InputError: not a name, a path or a kind.
        CheckpointError: no such model, no hub, another kind of model, or files that are missing, damaged, newer than
            this version, or do not fit each other; details of other weights. The message names the file.

    >>> from purifyloader import pretrained
    >>> pretrained.load("cifar10-sparse").image_channels
    3
    """
    if kind not in KINDS:
        raise InputError(f"must be one of {', '.join(KINDS)}. Got {kind!r}.", argument="kind")
    what = KINDS[kind]
    folder = find(name_or_path)
    config = read_config(folder, kind)
    file = folder / MODEL_FILE
    if not file.exists():
        raise CheckpointError(f"A checkpoint holds {MODEL_FILE}. Got none in {folder}. {_AGAIN}.")
    model, why = _built(what, config[kind])
    # Read once: what is hashed is what is loaded, and nothing stays mapped to a file that may change.
    data = _read_weights(file, model)
    # Before the hash, because "truncated" says more than "another hash".
    try:
        weights = read_safetensors(data)
    except (SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} must be a whole safetensors file. Got {len(data)} bytes that are not "
            f"({error}): truncated or of another format. {_AGAIN}."
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != config["model_sha256"]:
        raise CheckpointError(
            f"{file} must have the SHA-256 that {CONFIG_FILE} names, {config['model_sha256']}. Got {digest}: "
            f"it is damaged, or a save over it was stopped. {_AGAIN}."
        )
    _check_unedited(_header(data), config, kind, folder, why)
    if model is None:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} must describe {what.words} that this version can build. "
            f"Got: {why}. {_AGAIN}, or update purifyloader."
        )
    network = what.network(model)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if wrong := misfits(expected, weights, torch.float32):
        wanted, got = sum(map(math.prod, expected.values())), sum(tensor.numel() for tensor in weights.values())
        raise CheckpointError(
            f"{file} must hold the {wanted:,} weights of the network in {CONFIG_FILE}, finite and in float32. Got "
            f"{len(weights)} tensors of {got:,} numbers, "
            f"{wrong}. {_AGAIN}."
        )
    network.load_state_dict(weights, assign=True)
    sha256 = weights_sha256(model)
    check_bound(config.get("details"), sha256, folder / CONFIG_FILE)
    remember(network, sha256, config.get("details"))
    model.name = config["name"]
    return model.eval().requires_grad_(False)


def _built(what: ModelKind, config: Mapping[str, Any]) -> tuple[Any, object]:
    """Build a model without memory for weights; None, and why, where its configuration builds none."""
    try:
        with torch.device("meta"):  # no memory, no time and no random numbers for weights thrown away
            return what.build(config), None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return None, error


_MOST_HEADER = 100_000_000  # bytes, by the format of safetensors


def _read_weights(file: Path, model: nn.Module | None) -> bytes:
    """Read the file of a model's weights, unless it is so long that it must be of another."""
    weights = 0 if model is None else sum(math.prod(tensor.shape) for tensor in model.state_dict().values())
    most = 8 + _MOST_HEADER + 8 * weights  # in float64, which is refused in words of its own
    try:
        if (size := file.stat().st_size) <= most:
            with opened(file) as stream:
                return stream.read()
    except OSError as error:
        raise _unreadable(file, error) from None
    raise CheckpointError(
        f"{file} must hold the {weights:,} weights of the model in {CONFIG_FILE}. Got {size:,} bytes. {_AGAIN}."
    )


def why_not_shipped(kind: str, entry: Mapping[str, Any]) -> str | None:
    """Say why a model, by its `identity_of`, is none of those that ship with the library; None where it is one."""
    others = [_shipped_identity(name, kind) for name in available(kind)]
    alike = [other for other in others if other["weights_sha256"] == entry["weights_sha256"]]
    noun, weights = KINDS[kind].noun, entry["weights_sha256"][:12]
    if not alike:
        return f"The {noun} {entry.get('name')!r} with the weights {weights} is none that ships with purifyloader."
    function = canonical_json(entry.get("function"))
    if any(canonical_json(other["function"]) == function for other in alike):
        return None
    changed = differences({"function": alike[0]["function"]}, {"function": entry.get("function")})
    return (
        f"The {noun} {entry.get('name')!r} has the weights of {alike[0]['name']!r}, which ships with purifyloader, and "
        f"computes otherwise (shipped → this one):\n{changed}\n"
    )


@functools.lru_cache(maxsize=64)
def _shipped_identity(name: str, kind: str) -> dict[str, Any]:
    return identity_of(load(name, kind))


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file} must be a file that can be read. Got: {error}. Check the rights and the disk.")


@dataclass(frozen=True)
class Summary:
    """Kind (a key of `KINDS`), number of parameters and purpose, in a few words, of a checkpoint."""

    kind: str
    parameters: int
    words: str


def kind_of_folder(folder: Path) -> ModelKind:
    """Read the kind of a checkpoint from its config.json."""
    kind = kind_of_format(read_config(folder, None)["format"])
    assert kind is not None
    return kind


def summary(folder: Path) -> Summary:
    """Read the `Summary` of a checkpoint from config.json and the header of model.safetensors, without its weights.

    That config.json is what was saved with the weights is checked; their hash and fit are left to `load`.
    """
    kind, config = kind_of_folder(folder), read_config(folder, None)
    file = folder / MODEL_FILE
    try:
        check_file(file)
        with safe_open(file, "pt") as weights:
            parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
            header = _saved_with(weights.metadata())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} must be a whole safetensors file. Got: {error}. {_AGAIN}.") from None
    try:
        words = kind.describe(config[kind.name])
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} must describe {kind.words}. {error} {_AGAIN}.") from None
    _check_unedited(header, config, kind.name, folder)
    return Summary(kind.name, parameters, words)


def read_config(folder: Path, kind: str | None = "denoiser") -> dict[str, Any]:
    """Read config.json of a checkpoint folder of a kind, None for any, and check its format, version and fields."""
    file = folder / CONFIG_FILE
    try:
        config = read_json(file)
    except FileNotFoundError:
        check_not_foreign(folder)
        raise CheckpointError(
            f"A checkpoint holds {CONFIG_FILE}, written last. Got none in {folder}: this is no "
            f"checkpoint, or saving it was stopped. {_AGAIN}."
        ) from None
    except OSError as error:
        raise _unreadable(file, error) from None
    except ValueError as error:  # also text that is not UTF-8
        raise CheckpointError(f"{file} must be JSON. Got {error}. {_AGAIN}.") from None
    named = config.get("format") if isinstance(config, dict) else None
    other = kind_of_format(named)
    if other is None:
        check_not_foreign(folder, config)
        got = repr(named) if isinstance(config, dict) else type(config).__name__
        wanted = KINDS.values() if kind is None else [KINDS[kind]]
        formats = " or ".join(repr(one.format) for one in wanted)
        raise CheckpointError(
            f"{file} must be an object with the format {formats}. Got {got}. "
            "Give the folder of a checkpoint that purifyloader.pretrained.save wrote."
        )
    kind = other.name if kind is None else kind
    if other.name != kind:
        words = KINDS[kind].words
        raise CheckpointError(
            f"{folder} must hold {words}. Got {other.words} (format {named!r}). Give {words} here; "
            f"purifyloader.pretrained.load(..., kind={other.name!r}) reads this one."
        )
    version = config.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{file} must have a version from 1 to {VERSION}. Got {version!r}. Update purifyloader to read a newer one."
        )
    for field, kinds in {"name": str | None, kind: dict, "model_sha256": str}.items():
        if field not in config or not isinstance(config[field], kinds):
            got = type(config[field]).__name__ if field in config else "nothing"
            raise CheckpointError(f"{file} must have a field {field!r} ({kinds}). Got {got}. {_AGAIN}.")
    return config


def _header(data: bytes) -> dict[str, Any]:
    """Return what `save` put into the metadata of model.safetensors; {} where it is not from `save`."""
    size = int.from_bytes(data[:8], "little")
    try:
        return _saved_with(parse_json(data[8 : 8 + size])["__metadata__"])
    except (ValueError, LookupError, TypeError):
        return {}


def _saved_with(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        header = parse_json((metadata or {})[_METADATA])
    except (ValueError, LookupError, TypeError):
        return {}
    return header if isinstance(header, dict) else {}


def _check_unedited(
    header: Mapping[str, Any], config: Mapping[str, Any], kind: str, folder: Path, why: object = None
) -> None:
    """Raise `CheckpointError` where a model is described otherwise than it was saved; `why` it cannot be built."""
    if header.get(kind) == config[kind]:
        return
    changed = differences({kind: header.get(kind)}, {kind: config[kind]}).splitlines()
    because = "" if why is None else f" No model can be built of it: {str(why)[:300].rstrip('.')}."
    raise CheckpointError(
        f"{folder / CONFIG_FILE} must describe the model that {MODEL_FILE} was saved from. Got another description, "
        f"first in (saved → here) {changed[0].strip() if changed else kind}: it was edited.{because} {_AGAIN}."
    )


def misfits(
    expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> str:
    """List the weights that are missing, left over, of another shape or type, or not finite; "" where all fit.

    `expected` maps names to shapes. All must be of `dtype`, or of any floating type if None.
    """
    there = {name: got[name] for name in expected if name in got}
    floating = {name: tensor for name, tensor in there.items() if tensor.is_floating_point()}
    typed = floating if dtype is None else {name for name, tensor in there.items() if tensor.dtype == dtype}
    complaints = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in got],
        "left over": [f"{name} {tuple(tensor.shape)}" for name, tensor in got.items() if name not in expected],
        "of another shape": [
            f"{name} (expected {expected[name]}, got {tuple(tensor.shape)})"
            for name, tensor in there.items()
            if tuple(tensor.shape) != expected[name]
        ],
        f"not {'of a floating type' if dtype is None else f'in {dtype}'.replace('torch.', '')}": [
            f"{name} ({tensor.dtype})" for name, tensor in there.items() if name not in typed
        ],
        "with NaN or infinity": [name for name in floating if not bool(floating[name].float().isfinite().all())],
    }
    return "; ".join(f"{len(names)} {kind}: {listed(names, 20)}" for kind, names in complaints.items() if names)


def model_facts(model: NetworkDenoiser | EnergyNetwork) -> dict[str, str]:
    """List what a model knows of itself, as the rows of its card."""
    kind = kind_of(model)
    assert kind is not None
    return {"Parameters": f"{sum(math.prod(p.shape) for p in model.parameters()):,}", **kind.facts(model)}


def _minimal_card(kind: ModelKind, model: Any, name: str | None) -> str:
    """Write a card. The text is a promise: a denoiser saved without a card has the same bytes for ever."""
    words = kind.words[0].upper() + kind.words[1:]
    rows = "".join(f"| {key} | {value} |\n" for key, value in model_facts(model).items())
    return (
        f"# {name or words}\n\n"
        f"{words} saved by `purifyloader.pretrained.save`. Read it with\n"
        f"`purifyloader.pretrained.load(path_to_this_folder{kind.load_argument})`.\n\n"
        f"| | |\n|---|---|\n{rows}"
    )
