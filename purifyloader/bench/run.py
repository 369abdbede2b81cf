"""Make one row of a bench: poison, purify, train a victim, test it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.bench import targeted, transfer
from purifyloader.bench.applying import compensation, per_epoch_transform
from purifyloader.bench.defences import Defence, Made, Models, find
from purifyloader.core import noise
from purifyloader.core.checks import as_path
from purifyloader.datasets.folders import files_below
from purifyloader.datasets.splits import Data
from purifyloader.errors import InputError
from purifyloader.files.atomic import file_sha256, writing
from purifyloader.files.hashes import image_hashes
from purifyloader.files.locks import Lock, is_held, lock_path
from purifyloader.poisons import reading
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.poisons.poisoned import Poisoned, Target
from purifyloader.poisons.reading import checks
from purifyloader.poisons.spec import CLEAN, AttackSpec
from purifyloader.poisons.writing import write_npz
from purifyloader.pretrained.kinds import identity_of
from purifyloader.pretrained.learned import check_disjoint, learned_from
from purifyloader.purified.dataset import PurifiedDataset
from purifyloader.purifiers import Purifier
from purifyloader.purifiers.base import models_in
from purifyloader.recipes.models import as_denoiser
from purifyloader.results import rows
from purifyloader.victims.presets import EXTRACTOR, TRAININGS, Transfer
from purifyloader.victims.training import BatchTransform, Normalised, accuracy, train_victim

__all__ = ["Bench"]

_TIMED = 32  # images: what every network call is padded to


class Bench:
    """Make rows of one setting, one for each (attack, defence, seed).

    With a training of transfer learning the training images are split (`transfer.split`). An extractor learns from the
    larger part, `rest`, which stays clean: one for each seed, which all attacks and defences share. The smaller part is
    poisoned, purified and trained on. An attack that takes networks is given the extractor that the victim starts from.

    The poison, the purification and the test images are the same for all seeds of a row: the attack draws from
    `attack_seed`, the victim and compensation from the row's. A targeted attack has a target and a poison for each
    seed, and so has an attack on the extractor of a seed. `data` are clean, and a poison file is of all the images that
    there were before some were chosen. Rows share the folder `work`, of poisoned sets, purified caches and extractors,
    in which a stopped run goes on. `fast` is bfloat16 in purifiers and victims.
    """

    def __init__(
        self,
        data: Data,
        models: Models,
        victim: str,
        training: str,
        work: str | Path,
        *,
        attack_seed: int = 0,
        device: str = "cpu",
        fast: bool = False,
        progress: bool = False,
    ) -> None:
        if training not in TRAININGS:
            raise InputError(f"A training is one of {', '.join(TRAININGS)}. Got {training!r}.")
        self.training, self.how = training, TRAININGS[training]
        self.data = data
        self.rest: Data | None = None
        if isinstance(self.how, Transfer):
            self.data, self.rest = transfer.split(data)
        self.models, self.victim = models, victim
        self.work, self.attack_seed, self.device = as_path(work), attack_seed, device
        self.fast, self.progress = fast, progress
        self._hashes = {"train": image_hashes(self.data.train), "test": image_hashes(data.test)}
        self._timed: dict[str, float] = {}
        self._found: dict[str, tuple[Defence, float | None]] = {}  # reads files
        self._made: dict[str, Made] = {}  # loads networks
        hashes = {split: values.tolist() for split, values in self._hashes.items()}
        labels = {"train": self.data.train_labels.tolist(), "test": data.test_labels.tolist()}
        self._identity = {"name": data.name, "sha": rows.fingerprint({"hashes": hashes, "labels": labels})}
        if self.rest is not None:
            self._hashes["rest"] = image_hashes(self.rest.train)
            rest = {"hashes": self._hashes["rest"].tolist(), "labels": self.rest.train_labels.tolist()}
            self._extractor = {"data": rows.fingerprint(rest), "training": asdict(EXTRACTOR)}

    def _find(self, defence: str) -> tuple[Defence, float | None]:
        if defence not in self._found:
            self._found[defence] = find(defence)
        return self._found[defence]

    def makes(self, defence: str) -> Made:
        """Return a defence by its spec, with its models loaded."""
        if defence not in self._made:
            definition, px = self._find(defence)
            self._made[defence] = definition.ready(self.models, px, self.fast)
        return self._made[defence]

    def label(self, defence: str) -> str:
        """Name a defence for tables: never by a path, and with its models where they are not the shipped ones."""
        definition, px = self._find(defence)
        name = definition.name if px is None else f"{definition.name}@{px:g}"
        others = [
            _model_label(m) for field in definition.uses if (m := getattr(self.models, field)) != getattr(Models, field)
        ]
        return f"{name} [{', '.join(others)}]" if others else name

    def settings(self, attack: AttackSpec, defence: str, seed: int) -> dict[str, Any]:
        """Collect all that decides the figures of a row, as JSON."""
        made = self.makes(defence)
        # rows that were there before transfer learning have no such entry, and their names must stay
        start = {} if self.rest is None else {"extractor": self._extractor}
        return {
            **start,
            "data": self._identity,
            "attack": self._settings_of(attack),
            "attack_seed": self.attack_seed,
            "purifier": None if made.purifier is None else _described(made.purifier),
            "compensate": None if made.compensate is None else [made.compensate.p, made.compensate.sigma],
            # of most defences there is none, and the names of their rows are without
            **({} if made.per_epoch is None else {"afresh": _described(made.per_epoch)}),
            "victim": self.victim,
            "training": asdict(self.how),
            "seed": seed,
            "fast": self.fast,
            "device": torch.device(self.device).type,
        }

    def _settings_of(self, attack: AttackSpec) -> str | dict[str, Any]:
        """Collect all that decides an attack's images beside the data, as JSON: all options, and never a path."""
        if attack.name == CLEAN:
            return CLEAN
        if attack.file is None and "model" in attacks.find(attack.name).options:  # an adaptive attack's denoiser
            attack = replace(attack, options={"model": self.models.denoiser, **attack.options})
        if attack.file is not None:
            content = file_sha256(attack.file) if attack.file.is_file() else _folder_sha256(attack.file)
            return {"file_sha256": content, "options": _plain(attack.options)}
        return {"name": attack.name, "options": _plain(attacks.resolved(attacks.find(attack.name), attack.options))}

    def row(self, attack: AttackSpec, defence: str, seed: int, backdoors: Sequence[AttackSpec] = ()) -> rows.Row:
        """Measure one row, with how often triggers of `backdoors` have victims of clean data err by chance.

        `InputError` where an image is in two sets (`check`), and for whatever attacks and purifiers refuse.
        """
        settings = self.settings(attack, defence, seed)
        made = self.makes(defence)
        poisoned = self.poisoned(attack, seed)
        compared = self.check(defence, poisoned)
        images, purifier = self.purified(poisoned, made)
        trained = train_victim(
            images,
            poisoned.labels,
            self.how,
            classes=self.data.classes,
            network=self.victim if self.rest is None else self.extractor(seed),
            batch_transform=self._batch_transform(made, seed),
            seed=seed,
            device=self.device,
            bfloat16=self.fast,
        )
        measured = {"accuracy": 100 * accuracy(trained.model, self.data.test, self.data.test_labels)}
        target = poisoned.target
        if attack.name == CLEAN and self.data.classes > 1:  # how often the targets of attacks are called so anyway
            target = targeted.target_of(self.data, self.attack_seed, seed)
        measured |= self._success(trained.model, poisoned, target)
        shown_target = target and {"index": target.index, "true": target.true_label, "wanted": target.label}
        by_chance: dict[str, float] = {}
        if attack.name == CLEAN:
            for spec in backdoors:
                success = self._success(trained.model, self.poisoned(spec, seed), None)
                by_chance |= {spec.label: round(success["success"], 2)} if success else {}
        moved, wrong = poisoned.moved(self.data.train), int((poisoned.labels != self.data.train_labels).sum())
        return {
            "schema": rows.SCHEMA,
            "fingerprint": rows.fingerprint(settings),
            "data": self.data.name,
            "images": len(poisoned),
            **({} if self.rest is None else {"extractor_images": len(self.rest.train)}),
            "test_images": len(self.data.test),
            "attack": attack.label or attack.name,
            "attack_moves": {"images": moved.images, "linf_px": moved.linf, "l2": round(moved.l2_mean / 255, 4)},
            **({"wrong_labels": wrong} if wrong else {}),
            "attack_made": {k: v for k, v in poisoned.settings.items() if k != "moved"},
            "defence": self.label(defence),
            "sigma_px": None if made.sigma_px is None else round(made.sigma_px, 2),
            "calls": 0 if made.purifier is None else made.purifier.calls,
            "distance_px": round(_rms(images, self.data.train), 2),
            "seed": seed,
            "victim": self.victim,
            "training": self.training,
            **{name: round(value, 2) for name, value in measured.items()},
            **({"clean_success": by_chance} if by_chance else {}),
            **({} if target is None else {"target": shown_target}),
            "seconds": {
                "purify_an_image": self._seconds_an_image(purifier, defence),
                "train": round(trained.seconds, 1),
            },
            "threads": torch.get_num_threads(),
            "disjoint": compared,
            "settings": settings,
            "versions": rows.versions(),
        }

    def _batch_transform(self, made: Made, seed: int) -> BatchTransform | None:
        if made.per_epoch is not None:
            return per_epoch_transform(made.per_epoch.to(self.device), seed)
        return None if made.compensate is None else compensation(made.compensate, seed)

    def check(self, defence: str, poisoned: Poisoned | None = None) -> dict[str, int]:
        """Refuse a row whose test images a model or the training set has; returns how many images were compared.

        The training set is the clean one, that of an extractor, and the poisoned one. A target is a test image.
        """
        used = self._find(defence)[0].models(self.models)
        shown = [_model_label(model) for model in used]
        # a row has no paths, and two folders may have one name
        names = [name if shown.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(shown)]
        learned = {name: learned_from(model, self.data.size) for name, model in zip(names, used, strict=True)}
        train = np.concatenate([hashes for split, hashes in self._hashes.items() if split != "test"])
        test = self._hashes["test"]
        if poisoned is not None:  # a file may hold anything
            train = np.concatenate([train, image_hashes(poisoned.images)])
            if poisoned.target is not None:
                test = np.union1d(test, image_hashes(poisoned.target.image[None]))
        return check_disjoint(train, test, learned)

    def poisoned(self, attack: AttackSpec, seed: int = 0) -> Poisoned:
        """Return the poisoned training set for the seed of a row, made once and kept."""
        data = self.data
        if attack.name == CLEAN:
            return Poisoned.of(data.train, data.train_labels, CLEAN, [])
        path = self._poison_path(attack, seed)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.parent, path.stem):  # another process waits for it, and then reads it
            if not path.exists():
                made = self._attacked(attack, seed) if attack.file is None else self._read(attack)
                try:
                    write_npz(made, path)
                except InputError:
                    if not path.exists():  # else another process has made it too, where there are no locks
                        raise
        poisoned = reading.read(path)
        if len(poisoned) != len(data.train):
            raise InputError(
                f"Expected a poison of the {len(data.train)} training images in {path}. Got one of {len(poisoned)}: "
                "delete it, and it is made again."
            )
        # the file may be another by now; how far an attack without a bound moves images was looked at where it was read
        if poisoned.bound is not None and poisoned.settings.get("checked", True):
            checks.check(poisoned, (data.train, data.train_labels), signed=False)
        return poisoned

    def _read(self, attack: AttackSpec) -> Poisoned:
        """Read the chosen training images of a poison file, which has all of them."""
        whole = self.data.whole or (self.data.train, self.data.train_labels)
        assert attack.file is not None
        poison = reading.read(attack.file, clean=whole, **attack.options)
        if len(poison) != len(whole[0]):
            raise InputError(
                f"Expected a poison of the {len(whole[0])} training images. Got one of {len(poison)}: give the data "
                "that it was made from, whole."
            )
        if self.data.chosen is None:
            return poison
        chosen = self.data.chosen
        some = poison.only(chosen)
        if not len(some.poisoned):
            raise InputError(
                f"Expected poisoned images among the {len(chosen)} training images of {len(poison)} that were chosen. "
                f"Got none of the {len(poison.poisoned)} of {attack.file}: choose more images, or take models that "
                "have learned from others."
            )
        return some

    def is_being_made(self, attack: AttackSpec, seed: int = 0) -> bool:
        """Tell whether another process is making the poison or the extractor: this one would only wait."""
        paths = [] if attack.name == CLEAN else [self._poison_path(attack, seed)]
        if self.rest is not None:
            paths.append(self._extractor_path(seed))
        return any(not path.exists() and is_held(lock_path(path.parent, path.stem)) for path in paths)

    def _attacked(self, attack: AttackSpec, seed: int) -> Poisoned:
        data, known = self.data, attacks.find(attack.name)
        targeted.check_options(known, attack.options)
        here = {"device": self.device, "progress": self.progress, "model": self.models.denoiser}
        options = {name: value for name, value in here.items() if name in known.options}
        attack_seed = self.attack_seed
        if known.kind == "targeted":
            options["target"] = targeted.target_of(data, self.attack_seed, seed)
            attack_seed = targeted.seed_of(self.attack_seed, seed)
        if self._knows_extractor(attack):
            options["networks"] = [Normalised(self.extractor(seed))]
        return attacks.make(attack.name, (data.train, data.train_labels), attack_seed, **{**options, **attack.options})

    def _knows_extractor(self, attack: AttackSpec) -> bool:
        return self.rest is not None and attack.file is None and "networks" in attacks.find(attack.name).options

    def _poison_path(self, attack: AttackSpec, seed: int) -> Path:
        known = {"data": self._identity, "attack": self._settings_of(attack), "seed": self.attack_seed}
        if attack.file is None:
            registered = attacks.find(attack.name)
            if registered.kind == "targeted":
                known["row_seed"] = seed
            if "device" in registered.options:  # GPU and CPU results differ in the last digits
                known["device"] = torch.device(self.device).type
        if self._knows_extractor(attack):
            known["extractor"] = self._extractor_path(seed).stem
        return self.work / "poisoned" / f"{rows.fingerprint(known)}.npz"

    def extractor(self, seed: int) -> torch.nn.Module:
        """Return the network that transfer learning starts from, trained once and kept; in evaluation mode."""
        assert self.rest is not None
        path = self._extractor_path(seed)
        return transfer.extractor(path, self.rest, self.victim, seed=seed, device=self.device, bfloat16=self.fast)

    def _extractor_path(self, seed: int) -> Path:
        known = {
            **self._extractor,
            "classes": self.data.classes,
            "victim": self.victim,
            "seed": seed,
            "fast": self.fast,
            "device": torch.device(self.device).type,
        }
        return self.work / "extractors" / f"{rows.fingerprint(known)}.safetensors"

    def purified(self, poisoned: Poisoned, made: Made) -> tuple[NDArray[np.uint8], Purifier | None]:
        """Return the purified training images, from a cache, and the purifier with its plan."""
        if made.purifier is None:
            return poisoned.images, None
        purifier = made.purifier.to(self.device)
        known = {
            "images": rows.fingerprint({"hashes": image_hashes(poisoned.images).tolist()}),
            "purifier": _described(purifier),
            "device": torch.device(self.device).type,
        }
        cache = self.work / "purified" / rows.fingerprint(known)
        dataset = PurifiedDataset(
            poisoned, purifier, cache=cache, missing="precompute", check_source=False, progress=self.progress
        )
        return np.stack([np.asarray(dataset[i][0]) for i in range(len(dataset))]), dataset.purifier

    def _success(self, model: torch.nn.Module, poisoned: Poisoned, target: Target | None) -> dict[str, float]:
        """Measure a back door's share of other classes' test images, and whether a targeted attack won, in percent."""
        shares = {}
        if poisoned.trigger is not None and poisoned.target_class is not None:
            others = np.flatnonzero(self.data.test_labels != poisoned.target_class)
            shown = poisoned.trigger(self.data.test[others], others)
            wanted = np.full(len(shown), poisoned.target_class)
            shares["success"] = 100 * accuracy(model, shown, wanted)
        if target is not None:
            shares["flipped"] = 100 * accuracy(model, target.image[None], [target.label])
        return shares

    def _seconds_an_image(self, purifier: Purifier | None, defence: str) -> float:
        """Time a full network batch after a first one, once per process: the median of three, or one of many calls."""
        if purifier is None:
            return 0.0
        if defence not in self._timed:
            count = min(_TIMED, len(self.data.train))
            x = torch.from_numpy(self.data.train[:count]).permute(0, 3, 1, 2).float() / 255
            purifier = purifier.to(self.device)
            keys = noise.image_keys(0, 0, range(count)).to(self.device)
            taken = []
            for _ in range(2 if purifier.calls > 10 else 4):
                start = time.perf_counter()
                purifier(x.to(self.device), keys).cpu()
                taken.append((time.perf_counter() - start) / count)
            self._timed[defence] = statistics.median(taken[1:])
        return float(f"{self._timed[defence]:.3g}")


def _described(purifier: Purifier) -> dict[str, Any]:
    """Describe a purifier as rows have it. One without a model is described as by schema 1, so that they keep names."""
    values: dict[str, Any] = json.loads(purifier.to_json())
    return values if any(True for _ in models_in(values)) else {**values, "schema": 1}


def _model_label(model: str) -> str:
    """Name a model without a path, as a row travels: the name, the id, or the name of its folder."""
    return as_path(model).name if as_path(model).is_dir() else model


def _rms(images: NDArray[np.uint8], clean: NDArray[np.uint8]) -> float:
    """Compute the root mean square distance, in levels of 0 to 255."""
    total = sum(
        float(((images[i : i + 1024].astype(np.float32) - clean[i : i + 1024]) ** 2).sum(dtype=np.float64))
        for i in range(0, len(images), 1024)
    )
    return float(np.sqrt(total / images.size))


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without paths: a file is what is in it, a model its weights and its function."""
    plain: dict[str, Any] = {}
    for name, value in options.items():
        if name in attacks.FILES and isinstance(value, str | os.PathLike) and as_path(value).is_file():
            plain[name] = {"sha256": file_sha256(as_path(value))}
        elif name == "model":
            plain[name] = identity_of(as_denoiser(value))
        else:
            plain[name] = value
    return plain


def _folder_sha256(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise InputError(f"Expected a poison file or folder. Got {folder}, which is not there.")
    files = {*files_below(folder), *folder.rglob("*")}  # the first through links, as they are read
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(files) if p.is_file()}
