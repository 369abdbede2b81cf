"""Which folder a model's name or path means. Nothing here touches the network."""

from __future__ import annotations

import os
from pathlib import Path

from purifyloader.errors import CheckpointError, InputError

__all__ = ["CONFIG_FILE", "MODEL_FILE", "CARD_FILE", "available", "find"]

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
CARD_FILE = "README.md"

_SHIPPED = Path(__file__).parent
_CONVERT = (
    "Converting foreign checkpoints is not available yet: build the denoiser yourself, load its weights "
    "with torch.load(..., weights_only=True) and call purifyloader.pretrained.save."
)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def available() -> list[str]:
    """Names of the models that ship with this installation, sorted; `load` takes each."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG_FILE}"))


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that a shipped name or a path stands for.

    A shipped name comes before a folder of that name in the working directory; write `./name` for
    the folder.

    Raises:
        InputError: neither a string nor a path.
        CheckpointError: no such name or folder, or a file instead of a folder.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"A model is given by its name or by a path to its folder. Got {type(name_or_path).__name__}.")
    if isinstance(name_or_path, str) and name_or_path in available():
        return _SHIPPED / name_or_path
    path = Path(name_or_path)
    if path.is_dir():
        _check_not_pickled(path)
        return path
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"A checkpoint is a folder with {CONFIG_FILE} and {MODEL_FILE}. Got the pickle {path}, which "
            f"could run code when read. {_CONVERT}"
        )
    if path.is_file():
        raise CheckpointError(
            f"A checkpoint is a folder with {CONFIG_FILE} and {MODEL_FILE}. Got the file {path}. Give its folder."
        )
    names = ", ".join(available()) or "none in this installation"
    raise CheckpointError(
        f"A model must be a shipped name ({names}) or a path to a checkpoint folder. "
        f"Got {str(name_or_path)!r}, which is neither. "
        "Check the spelling, or give the folder that purifyloader.pretrained.save wrote."
    )


def _check_not_pickled(folder: Path) -> None:
    """A folder that holds only pickles gets an error about these, not about a missing file."""
    if (folder / MODEL_FILE).is_file():
        return
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLES):
        raise CheckpointError(
            f"A checkpoint folder holds {CONFIG_FILE} and {MODEL_FILE}. Got pickles in {folder}: "
            f"{', '.join(pickles[:4])}. {_CONVERT}"
        )
