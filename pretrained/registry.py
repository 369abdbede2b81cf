"""Which folder a model's name, path or hub id means. Only a hub id touches the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purifyloader.core.checks import as_path
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.json import read_json
from purifyloader.pretrained import hub
from purifyloader.pretrained.kinds import KINDS

__all__ = ["CARD_FILE", "CONFIG_FILE", "MODEL_FILE", "PICKLES", "available", "check_not_foreign", "find", "is_local"]
__all__ += ["listed"]

log = logging.getLogger("purifyloader")

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
CARD_FILE = "README.md"

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that are, or hold, pickles."""

_SHIPPED = Path(__file__).parent
_CONVERT = "Convert it once: purifyloader convert {source} OUT --format {format}."


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Join names for a message; those beyond the limit are only counted."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def available(kind: str | None = None) -> list[str]:
    """Name the models that ship with this installation, of one kind or all, sorted; `load(name, kind)` takes each.

    >>> from purifyloader import pretrained
    >>> pretrained.available("energy")
    ['cifar10-energy']
    """
    if kind is not None and kind not in KINDS:
        raise InputError(
            f"must be one of {', '.join(map(repr, KINDS))}, or None for all. Got {kind!r}.", argument="kind"
        )
    files = sorted(_SHIPPED.glob(f"*/{CONFIG_FILE}"), key=lambda file: file.parent.name)
    return [file.parent.name for file in files if kind is None or read_json(file)["format"] == KINDS[kind].format]


def is_local(name_or_path: str | os.PathLike[str]) -> bool:
    """Tell whether `find` would take this from this machine: a name that ships, or a folder that is there.

    It asks nobody and reads nothing, so it is safe for a name that a stranger wrote into a file.
    """
    return isinstance(name_or_path, str | os.PathLike) and _local(name_or_path) is not None


def _local(name_or_path: str | os.PathLike[str]) -> Path | None:
    if isinstance(name_or_path, str) and name_or_path in available():
        return _SHIPPED / name_or_path
    path = as_path(name_or_path)
    return path if str(name_or_path) and os.path.isdir(path) else None  # an empty name is no working directory


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """Find the checkpoint folder that a shipped name, a path or a hub id stands for.

    A shipped name comes before a folder of that name in the working directory (write `./name` for the folder), and a
    folder `owner/name` before that repository on the hub, which is downloaded after a warning.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"A model is given by its name or by a path to its folder. Got {type(name_or_path).__name__}.")
    if (folder := _local(name_or_path)) is not None:
        if not os.path.isfile(folder / MODEL_FILE):
            check_not_foreign(folder)
        return folder
    path = as_path(name_or_path)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"A checkpoint is a folder with {CONFIG_FILE} and {MODEL_FILE}. Got the pickle {path}, which could run "
            f"code when read. {_CONVERT.format(source=path, format='FORMAT')}"
        )
    if os.path.isfile(path):
        raise CheckpointError(
            f"A checkpoint is a folder with {CONFIG_FILE} and {MODEL_FILE}. Got the file {path}. Give its folder, or, "
            f"where it is from elsewhere, convert it once: purifyloader convert {path} OUT --format FORMAT."
        )
    if isinstance(name_or_path, str) and hub.is_hub_id(name_or_path):
        return _from_hub(name_or_path)
    names = ", ".join(available()) or "none in this installation"
    raise CheckpointError(
        f"A model must be a shipped name ({names}), a path to a checkpoint folder, or owner/name on the hub. "
        f"Got {str(name_or_path)!r}, which is none of these. "
        "Check the spelling, or give the folder that purifyloader.pretrained.save wrote."
    )


def check_not_foreign(folder: Path, config: Any = None) -> None:
    """Raise `CheckpointError` about somebody else's model, and how to convert it, not about a missing file or field.

    `config` is the folder's config.json, where that is JSON; None to look.
    """
    if config is None:
        try:
            config = read_json(folder / CONFIG_FILE)
        except (OSError, ValueError):
            config = None
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} must be a folder that can be read. Got: {error}. Check its rights.") from None
    if (described := foreign(names, config)) is not None:
        what, format_ = described
        raise CheckpointError(
            f"A checkpoint folder holds {CONFIG_FILE} and {MODEL_FILE}. Got {folder} with {what}. "
            f"{_CONVERT.format(source=folder, format=format_)}"
        )


def foreign(names: list[str], config: Any) -> tuple[str, str] | None:
    """Recognise the files of a folder or repository that are not of this library: a description, and their format.

    `names` are paths in it, and `config` is the content of its config.json, None where there is none.
    """
    fields = config if isinstance(config, dict) else {}
    if "model_index.json" in names or "_class_name" in fields or "unet" in names or "unet/config.json" in names:
        return "a diffusers model", "diffusers"
    if fields.get("format") is None and "nf" in fields:
        return "PureGen's energy network", "puregen-energy"
    if MODEL_FILE not in names and (pickles := [n for n in names if n.lower().endswith(PICKLES)]):
        return f"pickles: {listed(pickles, 4)}", "FORMAT"
    return None


def _from_hub(hub_id: str) -> Path:
    """Download the checkpoint, or take it from the hub's own cache: config.json first, which is small."""
    repository, revision = hub.parse(hub_id)
    hub.warn(hub_id)
    folder = hub.download(repository, revision, [CONFIG_FILE])
    commit = folder.name  # the branch may move on between two calls
    log.info("%s on the hub is commit %s", hub_id, commit)
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not str(config.get("format", "")).startswith("purifyloader-"):
        names = hub.files(repository, commit)
        what, format_ = foreign(names, config) or (", ".join(names[:6]) or "no files", "FORMAT")
        raise CheckpointError(
            f"A model on the hub holds {CONFIG_FILE} and {MODEL_FILE} as purifyloader.pretrained.save writes them. "
            f"Got {hub_id!r} with {what}. {_CONVERT.format(source=hub_id, format=format_)}"
        )
    return hub.download(repository, commit, [CONFIG_FILE, MODEL_FILE, CARD_FILE])
