"""A denoiser as a folder: config.json, model.safetensors and README.md, its card.

config.json is written last and names the SHA-256 of model.safetensors, so that a save which was killed,
over nothing or over an older checkpoint, is never read as whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from safetensors.torch import save_file
from torch import Tensor

from purifyloader.diffusion.denoiser import NetworkDenoiser, denoiser_from_config
from purifyloader.diffusion.weights import named_weights
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files import canonical_json, file_sha256, replacing, write_text
from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE, find

__all__ = ["FORMAT", "VERSION", "load", "read_config", "save"]

FORMAT = "purifyloader-denoiser"
VERSION = 1
_METADATA = "purifyloader"  # two metadata keys would be written in random order

_AGAIN = "Save or download the checkpoint again"


def save(
    denoiser: NetworkDenoiser,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    card: str | None = None,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a denoiser to a folder that `load` reads.

    Args:
        denoiser: its weights are stored as float32, wherever and whatever they are now.
        path: the folder; it is made where it is missing.
        name: what `load(path).name` will be.
        card: the text of README.md; None writes one with the facts that the denoiser knows.
        details: anything JSON that should stay with the model, such as how it was trained.
        overwrite: replace a checkpoint that stands there.

    Raises:
        InputError: not a `NetworkDenoiser`, a path to a file, weights that are not finite, details that
            are not JSON.
        CheckpointError: files of a checkpoint are there and `overwrite` is False, or writing failed.
    """
    if not isinstance(denoiser, NetworkDenoiser):
        raise InputError(f"Only a NetworkDenoiser can be saved. Got {type(denoiser).__name__}.")
    if not isinstance(name, str | None):
        raise InputError(f"The name of a model must be a string or None. Got {type(name).__name__}.")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"A checkpoint is saved to a folder. Got the file {folder}. Give another path.")
    found = [file for file in (CONFIG_FILE, MODEL_FILE, CARD_FILE) if (folder / file).exists()]
    if found and not overwrite:
        raise CheckpointError(
            f"A checkpoint is saved to a folder without one. Got {folder}, which has {', '.join(found)}. "
            "Give another path, or overwrite=True to replace these files."
        )
    weights = {key: tensor.float() for key, tensor in named_weights(denoiser.network).items()}
    if bad := _not_finite(weights):
        raise InputError(f"Weights must be finite to be saved. Got NaN or infinity in {_some(bad)}.")
    try:
        details = json.loads(canonical_json(dict(details or {})))
    except (TypeError, ValueError) as error:
        raise InputError(f"details must be a JSON object without NaN. Got {error}. Convert its values.") from None

    header = {"format": FORMAT, "version": VERSION, "denoiser": denoiser.config()}
    try:
        with replacing(folder / MODEL_FILE) as temporary:
            save_file(weights, temporary, metadata={_METADATA: canonical_json(header)})
    except SafetensorError as error:
        raise CheckpointError(f"Could not write {folder / MODEL_FILE}: {error}. Is the disk full?") from error
    write_text(folder / CARD_FILE, card if card is not None else _minimal_card(denoiser, name))
    config = {**header, "name": name, "model_sha256": file_sha256(folder / MODEL_FILE), "details": details}
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")


def load(name_or_path: str | os.PathLike[str]) -> NetworkDenoiser:
    """A denoiser in eval mode, frozen, float32, on the CPU. Offline; torch's generator is left alone.

    Args:
        name_or_path: one of `available()`, or the folder that `save` wrote.

    Raises:
        CheckpointError: no such model, or files that are missing, damaged, newer than this version
            of purifyloader, or do not fit each other. The message names the file.
    """
    folder = find(name_or_path)
    config = read_config(folder)
    file = folder / MODEL_FILE
    if not file.is_file():
        raise CheckpointError(f"A checkpoint holds {MODEL_FILE}. Got none in {folder}. {_AGAIN}.")
    # Read once: what is hashed is what is loaded, and nothing stays mapped to a file that may change.
    data = file.read_bytes()
    # Before the hash, because "truncated" says more than "another hash".
    try:
        weights = read_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
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
    if _header(data).get("denoiser") != config["denoiser"]:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} must describe the denoiser that {MODEL_FILE} was saved from. "
            f"Got another description: it was edited. {_AGAIN}."
        )
    try:
        with torch.device("meta"):  # no memory, no time and no random numbers for weights thrown away
            denoiser = denoiser_from_config(config["denoiser"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} must describe a denoiser that this version can build. "
            f"Got: {error}. {_AGAIN}, or update purifyloader."
        ) from None
    _check_fit(file, denoiser.network.state_dict(), weights)
    denoiser.network.load_state_dict(weights, assign=True)
    denoiser.name = config["name"]
    return denoiser.eval().requires_grad_(False)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, its format, version and fields checked.

    Raises:
        CheckpointError: it is missing, not JSON, of another format or a newer version.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"A checkpoint holds {CONFIG_FILE}, written last. Got none in {folder}: this is no "
            f"checkpoint, or saving it was stopped. {_AGAIN}."
        ) from None
    except ValueError as error:  # also text that is not UTF-8
        raise CheckpointError(f"{file} must be JSON. Got {error}. {_AGAIN}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = repr(config.get("format")) if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{file} must be an object with the format {FORMAT!r}. Got {got}. "
            "Give the folder of a checkpoint that purifyloader.pretrained.save wrote."
        )
    version = config.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{file} must have a version from 1 to {VERSION}. Got {version!r}. Update purifyloader to read a newer one."
        )
    for field, kinds in {"name": str | None, "denoiser": dict, "model_sha256": str}.items():
        if field not in config or not isinstance(config[field], kinds):
            got = type(config[field]).__name__ if field in config else "nothing"
            raise CheckpointError(f"{file} must have a field {field!r} ({kinds}). Got {got}. {_AGAIN}.")
    return config


def _header(data: bytes) -> dict[str, Any]:
    """What `save` put into the metadata of model.safetensors; {} where it is not from `save`."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_METADATA])
    except (ValueError, KeyError, TypeError):
        return {}
    return header if isinstance(header, dict) else {}


def _check_fit(file: Path, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    complaints = []
    if missing := sorted(set(expected) - set(got)):
        complaints.append(f"without {_some(missing)}")
    if unexpected := sorted(set(got) - set(expected)):
        complaints.append(f"with the unknown {_some(unexpected)}")
    both = [key for key in sorted(expected) if key in got]
    if shapes := [
        f"{key} (expected {tuple(expected[key].shape)}, got {tuple(got[key].shape)})"
        for key in both
        if expected[key].shape != got[key].shape
    ]:
        complaints.append(f"with other shapes: {_some(shapes)}")
    if dtypes := [f"{key} ({got[key].dtype})" for key in both if got[key].dtype != torch.float32]:
        complaints.append(f"not in float32: {_some(dtypes)}")
    if bad := _not_finite(got):
        complaints.append(f"with NaN or infinity in {_some(bad)}")
    if complaints:
        raise CheckpointError(
            f"{file} must hold the finite float32 weights of the network in {CONFIG_FILE}. "
            f"Got weights {'; '.join(complaints)}. {_AGAIN}."
        )


def _not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    return [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _minimal_card(denoiser: NetworkDenoiser, name: str | None) -> str:
    low, high = denoiser.sigma_range
    schedule = canonical_json(denoiser.schedule.config()) if denoiser.schedule is not None else "none"
    count = sum(math.prod(p.shape) for p in denoiser.network.parameters())
    return (
        f"# {name or 'A denoiser'}\n\n"
        "A denoiser saved by `purifyloader.pretrained.save`. Read it with\n"
        "`purifyloader.pretrained.load(path_to_this_folder)`.\n\n"
        "| | |\n|---|---|\n"
        f"| Parameters | {count:,} |\n"
        f"| Parameterization | {denoiser.parameterization} |\n"
        f"| Noise it was trained for | {255 * low:.3g} to {255 * high:.3g} px "
        f"(sigma {low:.4g} to {high:.4g}) |\n"
        f"| Schedule | `{schedule}` |\n"
        f"| Image channels | {denoiser.image_channels} |\n"
        f"| Learned variance | {'yes' if denoiser.learned_variance else 'no'} |\n"
    )
