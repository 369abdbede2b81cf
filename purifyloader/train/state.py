"""Keep the state of a training run on disk: one safetensors file, replaced as a whole, readable after any stop."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from purifyloader.errors import CheckpointError, TrainingError
from purifyloader.files.atomic import canonical_json, replacing
from purifyloader.files.json import parse_json
from purifyloader.files.opening import check_file
from purifyloader.train.fields import TrainingFields

__all__ = ["STATE_FILE", "Groups", "check_header", "identity", "images_sha256", "load_state", "save_state", "tidy"]
__all__ += ["writing"]

STATE_FILE = "training-state.safetensors"

_SECONDS = 1e12

Groups = dict[str, dict[str, Tensor]]


def images_sha256(images_NCHW: Tensor) -> str:
    """Hash the bytes of the images in their order: SHA-256, in hex."""
    return hashlib.sha256(images_NCHW.contiguous().numpy().tobytes()).hexdigest()


def identity(config: TrainingFields, images_NCHW: Tensor) -> dict[str, Any]:
    """Return what must be the same for a stopped run to go on: configuration and images."""
    return {"config": config.identity(), "images_sha256": images_sha256(images_NCHW), "count": len(images_NCHW)}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a `TrainingError` for an error of the disk, most often no room, in writing the file or folder."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"Could not write {path} ({error}). The state before it, if any, is kept: make room, and run the same "
            "command again."
        ) from None


def save_state(path: Path, header: dict[str, Any], groups: Groups) -> None:
    """Write the tensors of each group, and a JSON header; without room the state that stands there is kept."""
    tensors = {f"{group}/{k}": v.detach().cpu().contiguous() for group, d in groups.items() for k, v in d.items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # in a folder of its own, named as `replacing` names its files: save_file writes to a temporary file beside,
        # which a kill leaves under a random name
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            whole = Path(folder, path.name)
            with replacing(whole) as temporary:
                save_file(tensors, temporary, metadata={"purifyloader": canonical_json(header)})
            _check_same_run(path, header)
            os.replace(whole, path)


def _check_same_run(path: Path, header: dict[str, Any]) -> None:
    """Refuse to replace the state of another run, which a file system without locks has let into the folder."""
    try:
        check_file(path)
        with safe_open(path, "pt") as file:
            there = parse_json((file.metadata() or {})["purifyloader"])["identity"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # missing, or damaged
        return
    if there != header.get("identity"):
        raise TrainingError(
            f"{path} was written meanwhile by a run with another configuration or other images. Two runs cannot train "
            "into one folder: stop one of them, and give it another output folder."
        )


def tidy(folder: Path, files: Iterable[str]) -> None:
    """Remove the leftovers of killed saves of these files; nobody may be writing them."""
    for name in files:
        for path in folder.glob(f".{name}.*.tmp"):
            with suppress(OSError):  # no reason not to train
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_header(header: Mapping[str, Any]) -> None:
    """Raise an error for values that no run writes; the curves and what was watched are for the task to check."""
    step, plan = header["step"], header["plan"]
    numbers = [value for part in plan.values() for value in (part if isinstance(part, list) else [part])]
    if any(type(value) is not int or value < 0 for value in [step, *numbers]) or step > plan["steps"]:
        raise ValueError(f"its step is {step!r:.40}, of a plan of {plan!r:.80}")
    if type(header["seconds"]) not in (int, float) or not 0 <= header["seconds"] < _SECONDS:
        raise ValueError(f"its seconds are {header['seconds']!r:.80}")
    warnings = header["warnings"]
    if not isinstance(warnings, list) or not all(isinstance(warning, str) for warning in warnings):
        raise ValueError(f"its warnings are {warnings!r:.80}")


def load_state(path: Path, expected: dict[str, Any]) -> tuple[dict[str, Any], Groups]:
    """Read the header and the tensors of each group, of a run whose `identity` is the expected one."""
    try:
        check_file(path)
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {})["purifyloader"])
            flat = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (a safe_open handle is no mapping)
        saved = header["identity"]
        differing = [k for k in expected["config"] if saved["config"].get(k) != expected["config"][k]]
        if any(saved[k] != expected[k] for k in ("images_sha256", "count")):
            differing.append("set of images")
        groups: Groups = {}
        for name, tensor in flat.items():
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = tensor
    except (SafetensorError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole training state ({error}). Delete it to train from the start."
        ) from None
    if differing:
        raise TrainingError(
            f"{path} belongs to a run with another {', '.join(differing)}. Got a configuration that cannot "
            "go on from it. Give the same one, or another output folder."
        )
    return header, groups
