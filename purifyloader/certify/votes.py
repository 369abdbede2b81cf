"""Keep votes on disk: one small file a model, so that none is lost and none is counted twice.

A folder holds the votes of one condition:

    settings.json    all that decides the votes but the secret: votes of other settings are never mixed with them
    secret.json      the seed of all noise, from the operating system, readable by its owner alone
    00017.json       what model 17 says of each test input, with a checksum

A model's votes follow from the settings, the secret and its number alone. Whoever makes the file makes the same one, in
any order, in any number of processes and after any number of kills; it is renamed into place, so half of one is never
seen. A lock by the model's name only saves work.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.core.checks import as_path
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.atomic import canonical_json, write_new, write_text, writing
from purifyloader.files.json import parse_json, read_json, read_text
from purifyloader.files.locks import Lock, lock_path

__all__ = ["START_FILE", "VoteFolder", "new_seed", "tidy"]

SCHEMA = 1
SETTINGS_FILE, SECRET_FILE = "settings.json", "secret.json"
MOST_CLASSES = 2**16
_SEED_BITS = 63
START_FILE = "start.safetensors"
_HIDDEN = re.compile(r"\.(\d{5,}|settings|secret|start\.safetensors)(\.json)?\.(?:.*\.tmp|lock)")


def new_seed() -> int:
    """Draw a seed that nobody can foresee, from the operating system's entropy."""
    return secrets.randbits(_SEED_BITS)


class VoteFolder:
    """Votes of `models` models on `inputs` test inputs, in a folder, which is made if it is not there.

    `settings` are JSON of all that decides the votes beside the secret `seed` of all noise and training. The number of
    models is added: it is decided before the first vote is seen. A folder with votes of other settings is refused.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], *, models: int, inputs: int, classes: int
    ) -> None:
        self.folder = as_path(folder)
        self.models, self.inputs, self.classes = models, inputs, classes
        self.settings = {"models": models, "inputs": inputs, "classes": classes, **settings}
        if not 2 <= classes <= MOST_CLASSES:
            raise InputError(f"Expected from 2 to {MOST_CLASSES:,} classes. Got {classes}.")
        self._type = np.dtype("<u1" if classes <= 2**8 else "<u2")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with Lock(self.folder, "settings"):
            self._check_settings()
            self.seed = self._secret()

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS_FILE
        try:
            own = json.loads(canonical_json({"schema": SCHEMA, **self.settings}))
        except (TypeError, ValueError) as error:
            raise InputError(f"Expected settings that JSON can hold. Got: {error}.") from None
        if not path.exists():
            with writing(path):
                write_new(path, canonical_json(own) + "\n")  # or another process just has, where there are no locks
        try:
            there = read_json(path)
        except OSError as error:
            raise InputError(f"{path} must be a file that can be read. Got: {error}. Give another folder.") from None
        except ValueError:
            there = None
        if there != own:
            raise ConfigError(
                f"Expected votes of these settings in {self.folder}. Got others: {_difference(there, own)}. Votes of "
                "different settings are no votes of one kind of model, and how many models are asked is decided before "
                "the first is seen. Give the settings of before, or another folder."
            )

    def _secret(self) -> int:
        path = self.folder / SECRET_FILE
        if path.exists():
            try:
                seed = read_json(path)["seed"]
            except (OSError, ValueError, KeyError, TypeError):
                seed = None
            if type(seed) is not int or not 0 <= seed < 2**_SEED_BITS:
                raise InputError(
                    f"Expected the seed of {self.folder} in {path}. Got something else, and without it the votes "
                    "cannot be gone on with: bring the file back, or begin in another folder."
                )
            return seed
        if any(self._path(model).exists() for model in range(self.models)):
            raise InputError(
                f"Expected the seed that the votes in {self.folder} were made with, in {path}. Got no such file: bring "
                "it back, or begin in another folder."
            )
        with writing(path):
            write_new(path, canonical_json({"seed": new_seed()}) + "\n", private=True)
        return self._secret()  # which another process may have written, where there are no locks

    def _path(self, model: int) -> Path:
        return self.folder / f"{model:05d}.json"

    def lock(self, model: int) -> Lock:
        return Lock(self.folder, f"{model:05d}")

    def has(self, model: int) -> bool:
        return self.read(model) is not None

    def read(self, model: int) -> NDArray[np.int64] | None:
        """Read the votes of a model, (T,); None where there is no whole file, and it is to be made again."""
        try:
            text = read_text(self._path(model))
            data = base64.b64decode(parse_json(text)["votes"], validate=True)
            whole = text == self._text(model, data)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return np.frombuffer(data, self._type).astype(np.int64) if whole else None

    def write(self, model: int, votes: NDArray[np.integer]) -> None:
        """Write the votes of a model, (T,), from 0 to K - 1."""
        if votes.shape != (self.inputs,) or votes.dtype.kind not in "iu":
            raise InputError(f"Expected votes on {self.inputs} inputs. Got {votes.dtype} {votes.shape}.")
        if int(votes.min()) < 0 or int(votes.max()) >= self.classes:
            raise InputError(f"Expected votes from 0 to {self.classes - 1}. Got {votes.min()} to {votes.max()}.")
        with writing(self._path(model)):
            write_text(self._path(model), self._text(model, votes.astype(self._type).tobytes()))

    def _text(self, model: int, data: bytes) -> str:
        if len(data) != self.inputs * self._type.itemsize:
            raise ValueError("cut off")
        # the settings and the number are in the checksum, so that a file from elsewhere is no vote here
        scope = canonical_json([self.settings, self.seed, model]).encode()
        entry = {
            "model": model,
            "votes": base64.b64encode(data).decode("ascii"),
            "sha256": hashlib.sha256(scope + data).hexdigest(),
        }
        return canonical_json(entry) + "\n"

    def done(self) -> int:
        """Count the models whose files are there, by their names alone."""
        names = {path.name for path in self.folder.glob("[0-9]*.json")}
        return sum(self._path(model).name in names for model in range(self.models))

    def all(self) -> NDArray[np.int64]:
        """Read the votes of all models, (models, T); none may be missing."""
        there = [votes for model in range(self.models) if (votes := self.read(model)) is not None]
        if len(there) < self.models:
            raise InputError(
                f"Expected the votes of {self.models} models in {self.folder}. Got {len(there)}: run the same again, "
                "what is there is kept."
            )
        return np.stack(there)

    def tidy(self) -> None:
        tidy(self.folder)


def tidy(folder: Path) -> None:
    """Remove what locks and kills have left of votes and of a start, but not what another process has in work."""
    for path in folder.glob(".*"):
        if match := _HIDDEN.fullmatch(path.name):
            lock = Lock(folder, match[1])
            if lock.acquire(wait=False) and lock.real:
                path.unlink(missing_ok=True)
                lock_path(folder, match[1]).unlink(missing_ok=True)
            lock.release()


def _difference(there: Any, own: Mapping[str, Any]) -> str:
    if not isinstance(there, dict):
        return "a settings.json that is no such file"
    return "; ".join(f"{name} was {_short(old)} and is {_short(new)}" for name, old, new in _differing(there, own))


def _differing(there: Mapping[str, Any], own: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any, Any]]:
    """List the innermost values that differ, by name: those of a whole training would be too long."""
    for key in sorted({*there, *own}):
        old, new = there.get(key), own.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{before}{key}.")
        elif old != new:
            yield f"{before}{key}", old, new


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."
