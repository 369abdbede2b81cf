"""Run a certification: train models on noised copies of the data, keep their votes, and report certified radii.

How many models are asked, how many of them select, and alpha are settings of a run, fixed before its first vote:
whoever looks at a certificate and then adds models until it is better has none at that alpha.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.certify import output, report
from purifyloader.certify.conditions import Condition, Knowledge, conditions, reasons
from purifyloader.certify.functions import Train, named_training, training_settings
from purifyloader.certify.models import Voting, fill, voting_settings
from purifyloader.certify.statistics import (
    best_lower_bound,
    best_radius,
    fixed_draws,
    models_needed,
    radius_per_image,
    special_functions,
)
from purifyloader.certify.training import Training, with_classes
from purifyloader.certify.votes import START_FILE, VoteFolder, new_seed, tidy
from purifyloader.core.devices import device_of_process
from purifyloader.datasets import DATA
from purifyloader.datasets.arrays import as_arrays
from purifyloader.datasets.named import describe, open_dataset
from purifyloader.datasets.samples import fields
from purifyloader.datasets.select import label_of, load_images
from purifyloader.datasets.splits import Data, load
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.atomic import replacing, writing
from purifyloader.files.hashes import image_hashes
from purifyloader.files.locks import Lock
from purifyloader.files.opening import check_file
from purifyloader.results.rows import fingerprint

__all__ = ["BUILT_IN", "Run", "Settings", "estimate", "move_to", "prepare", "vote", "vote_folders", "write"]

VOTES = "votes"
BUILT_IN = ("victim", "width", "pool", "pad", "epochs", "batch_size", "learning_rate")
_TRAIN = "train"  # warm_start: the training set itself


@dataclass(frozen=True)
class Settings:
    """Options of `purifyloader certify`, whose help explains them; None for those that are not given."""

    data: str
    root: Path | None
    train: int | None
    test: int | None
    sigma: Sequence[float]
    model: str
    plain: bool
    recipe: Sequence[Path]
    draws: int
    fast: bool  # bfloat16 in the denoiser and the built-in training
    models: int
    selection: int
    alpha: float
    radius: float | None
    triggered: bool
    learned_elsewhere: bool
    empirical: bool
    train_function: str | None
    warm_start: str | None
    warm_start_root: Path
    warm_start_epochs: int
    threads: int
    device: str
    out: Path | None  # None only of an estimate
    built_in: Mapping[str, Any] = field(default_factory=dict)  # those of `BUILT_IN` that are given
    only_estimate: bool = False

    def __post_init__(self) -> None:
        for name in ("models", "selection", "draws", "threads", "warm_start_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1. Got {getattr(self, name)}.", argument=name)
        if not 0 < self.alpha < 1:
            raise ConfigError(f"must be above 0 and below 1, such as 0.001. Got {self.alpha}.", argument="alpha")
        if self.radius is not None and not 0 <= self.radius < math.inf:
            raise ConfigError(f"must be from 0, in units of [0, 1] images. Got {self.radius}.", argument="radius")
        extra = [*self.built_in, *["warm_start"] * (self.warm_start is not None)]
        if self.train_function is not None and extra:
            raise ConfigError(
                f"is of the built-in training. Got train_function={self.train_function!r} too, which trains by itself: "
                "leave one out.",
                argument=extra[0],
            )
        if {"victim", "width"} <= self.built_in.keys():
            raise ConfigError(
                "is of the ResNet-9 that is trained by default. Got a victim too: leave one out.", argument="width"
            )

    @property
    def folder(self) -> Path:
        assert self.out is not None
        return self.out


def move_to(name: str | None, rank: int) -> torch.device:
    """Return the device of a process, as `device_of_process` does, and make it the current one."""
    device = device_of_process(name, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a training function of the user's finds the right one as "cuda"
    return device


@dataclass(frozen=True, eq=False)
class Run:
    """A run made ready."""

    settings: Settings
    data: Data
    conditions: list[Condition]
    train: Train
    reasons: Mapping[str, tuple[str, ...]]  # a condition's folder → why it has no certificate

    @property
    def models(self) -> int:
        """Count the models of one condition, all that are trained."""
        return self.settings.models + self.settings.selection

    @property
    def classes(self) -> int:
        return max(2, self.data.classes)

    def voting(self, condition: Condition) -> Voting:
        data, draws = self.data, self.settings.draws
        return Voting(data.train, data.train_labels, data.test, condition.purifier, self.train, self.classes, draws)

    def in_common(self) -> dict[str, Any]:
        """Collect what all conditions have in common, for people: no path in it."""
        settings, data = self.settings, self.data
        return {
            "data": {
                "name": data.name,
                "train": len(data.train),
                "test": len(data.test),
                "values": math.prod(data.train.shape[1:]),
            },
            "training": training_settings(self.train),
            "draws": settings.draws,
            "threads": settings.threads,
            "warm_start": _describe_start(settings),
            "stated": {"triggered": settings.triggered, "learned_elsewhere": settings.learned_elsewhere},
        }

    def folder(self, condition: Condition, voting: Voting) -> VoteFolder:
        fixed = {name: getattr(self.settings, name) for name in ("selection", "alpha", "threads")}
        return VoteFolder(
            self.settings.folder / VOTES / condition.folder,
            {**voting_settings(voting), **fixed},
            models=self.models,
            inputs=len(self.data.test),
            classes=self.classes,
        )


def prepare(settings: Settings) -> Run:
    """Read the data, load the models, and refuse what could not end in certificates."""
    special_functions()  # missing, it would be missed after all models are trained
    asked = conditions(settings.sigma, settings.model, plain=settings.plain, files=settings.recipe, fast=settings.fast)
    train = _training(settings)
    data = _data(settings).some(settings.train, settings.test)
    hashes = image_hashes(data.train), image_hashes(data.test)
    if both := int(np.isin(hashes[1], hashes[0]).sum()):
        raise InputError(
            f"Expected test images that are not trained on. Got {both} of {len(data.test)} that are: leave them out of "
            "one of the two."
        )
    warm_start = _warm_start(settings, data)
    own, size = warm_start is not None and warm_start.own, (data.train.shape[1], data.train.shape[2])
    knowledge = Knowledge(settings.draws, own, settings.triggered, settings.learned_elsewhere, settings.model, size)
    why = {c.folder: reasons(c, knowledge, *hashes, settings.models, settings.alpha) for c in asked}
    if any(why.values()) and not (settings.empirical or settings.only_estimate):
        against = [f"{c.name}: {reason}" for c in asked for reason in why[c.folder]]
        raise ConfigError(
            "Expected a run that may end in certificates. Got reasons against it:\n  "
            + "\n  ".join(against)
            + "\nMend them, or ask for an empirical run: it trains and votes all the same, without a certificate."
        )
    if warm_start is not None and not settings.only_estimate:  # a plan's models take as long without a start
        assert isinstance(train, Training)
        start = _start(settings, train, warm_start, max(2, data.classes))
        train = replace(train, start=start, keep_head=warm_start.own_set)
    moved = [replace(c, purifier=c.purifier.to(settings.device)) for c in asked]
    return Run(settings, data, moved, train, why)


def _data(settings: Settings) -> Data:
    if settings.data in DATA:
        return load(settings.data, settings.root or Path("examples/data" if settings.data == "sample" else "data"))
    if ":" not in settings.data or settings.data.startswith("."):  # a path, or relative to nothing
        raise InputError(f"Expected {', '.join(DATA)}, or package.module:function. Got {settings.data!r}.")
    pair: Any = open_dataset(settings.data)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{settings.data!r} must return a training set and a test set. Got {type(pair).__name__}.")
    (train, train_labels), (test, test_labels) = as_arrays(pair[0]), as_arrays(pair[1])
    if train.shape[1:] != test.shape[1:]:
        raise InputError(f"Expected images of one size in both sets. Got {train.shape[1:]} and {test.shape[1:]}.")
    classes = 1 + max(int(train_labels.max()), int(test_labels.max()))
    return Data(settings.data, train, train_labels, test, test_labels, classes)


def _training(settings: Settings) -> Train:
    if settings.train_function is not None:
        return named_training(settings.train_function)
    names = {"victim": "network", "learning_rate": "lr"}
    built_in = {names.get(name, name): value for name, value in settings.built_in.items()}
    return Training(**built_in, bfloat16=settings.fast, device=settings.device)


@dataclass(frozen=True, eq=False)
class _WarmStart:
    """Images that all models have learned from before."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    own: bool  # some are to be certified
    own_set: bool = False  # they are the training set itself


def _warm_start(settings: Settings, data: Data) -> _WarmStart | None:
    if settings.warm_start is None:
        return None
    if settings.warm_start == _TRAIN:
        return _WarmStart(data.train, data.train_labels, own=True, own_set=True)
    images, labels = _other_images(settings.warm_start, settings.warm_start_root, data)
    hashes = image_hashes(images)
    if both := int(np.isin(hashes, image_hashes(data.test)).sum()):
        raise InputError(
            f"Expected a warm start from images that are not tested on. Got {both} of {len(images)} that are: "
            "leave them out."
        )
    return _WarmStart(images, labels, own=bool(np.isin(hashes, image_hashes(data.train)).any()))


def _other_images(spec: str, root: Path, data: Data) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images and labels for a warm start, brought to the size of the training images."""
    dataset = open_dataset(spec, root)
    height, width = data.train.shape[1:3]
    every = range(len(dataset))  # type: ignore[arg-type]
    images = load_images(dataset, every, size=height if height == width else None, channels=3)
    if images.shape[2:] != (height, width):
        raise InputError(
            f"Expected images for a warm start of {height} x {width}, as the training images. Got "
            f"{images.shape[2]} x {images.shape[3]}: bring them to that size first."
        )
    labels = [label_of(fields(dataset[index], None)) for index in every]
    if bad := [index for index, label in enumerate(labels) if label is None]:
        raise InputError(f"Expected (image, class) of the images for a warm start. Got no class in item {bad[0]}.")
    return images.permute(0, 2, 3, 1).contiguous().numpy(), np.asarray(labels, np.int64)


def _start(settings: Settings, training: Training, warm_start: _WarmStart, classes: int) -> torch.nn.Module:
    """Train the network that all models go on from, or load it: it is made once, and kept beside the votes."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    path = settings.folder / START_FILE
    with writing(path):
        settings.folder.mkdir(parents=True, exist_ok=True)
    training = replace(training, epochs=settings.warm_start_epochs)
    # in the file itself: one from other images must not be taken for this one, which a certificate may rest on
    made_from = fingerprint(
        {
            "hashes": image_hashes(warm_start.images).tolist(),
            "labels": warm_start.labels.tolist(),
            "training": training.settings(),
            "classes": classes,
        }
    )
    with Lock(settings.folder, START_FILE):
        if not path.exists():
            own_classes = max(2, int(warm_start.labels.max()) + 1)
            network = training.warm_start(warm_start.images, warm_start.labels, own_classes, seed=0)
            weights = with_classes(network, classes, seed=0).state_dict()
            weights = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
            with writing(path), replacing(path) as temporary:
                save_file(weights, temporary, {"made_from": made_from})
    start = training.empty(classes)
    try:
        check_file(path)
        with safe_open(path, "pt") as file:
            kept_from = (file.metadata() or {}).get("made_from")
        if kept_from != made_from:
            raise InputError("one that was made from other images, or otherwise.")
        start.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"Expected in {path} the network that this run begins with. Got: {got} Give the settings of before, or "
            "another folder."
        ) from None
    return start


def _describe_start(settings: Settings) -> list[Any] | None:
    """Say where a warm start comes from, without a path, and how long it was trained."""
    if settings.warm_start is None:
        return None
    name = "the training set" if settings.warm_start == _TRAIN else describe(settings.warm_start)
    return [name, settings.warm_start_epochs]


def estimate(run: Run, processes: int) -> str:
    """Measure one model of each condition, and say what all will take and could give."""
    settings = run.settings
    lines = [
        f"{len(run.data.train):,} training images of {run.data.name}, {len(run.data.test):,} test images; "
        f"{settings.selection} + {settings.models} models for each condition, alpha {settings.alpha:g}"
    ]
    total = 0.0
    for condition in run.conditions:
        voting, seed = run.voting(condition), new_seed()
        begun = time.perf_counter()
        dataset = voting.noised(0, seed)
        made = time.perf_counter()
        voting.train_and_ask(dataset, 0, seed)
        seconds = time.perf_counter() - begun
        total += seconds * run.models
        lines.append(
            f"{condition.name}: a model takes {seconds:.1f} s, {made - begun:.1f} of them to make its training set; "
            f"all {run.models} take {_time(seconds * run.models / processes)}"
        )
        lines += [f"  no certificate: {reason}" for reason in run.reasons[condition.folder]]
        if not run.reasons[condition.folder]:
            lines += _reach(run, condition)
    share = f" in {processes} processes" if processes > 1 else ""
    lines.append(f"all together: {_time(total / processes)}{share}")
    return "\n".join(lines)


def _reach(run: Run, condition: Condition) -> list[str]:
    settings, values = run.settings, math.prod(run.data.train.shape[1:])
    assert condition.noised.sigma is not None
    sigma = fixed_draws(condition.noised.sigma, settings.draws)
    radius = best_radius(sigma, settings.models, settings.alpha)
    bound = best_lower_bound(settings.models, settings.alpha)
    lines = [
        f"  at most, if all agree: p_A {bound:.4f}, radius {radius:.3g} over "
        f"the whole training set; one image by {255 * radius / math.sqrt(values):.2f} levels of 255 in every value, 10 "
        f"images by {255 * float(radius_per_image(radius, 10)) / math.sqrt(values):.2f}"
    ]
    if settings.radius is not None:
        needed = models_needed(sigma, settings.radius, settings.alpha)
        lines.append(f"  a radius of {settings.radius:g} takes at least {needed:,} models")
    return lines


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def vote_folders(run: Run) -> list[tuple[Condition, VoteFolder, Voting]]:
    votings = [run.voting(condition) for condition in run.conditions]
    return [(c, run.folder(c, voting), voting) for c, voting in zip(run.conditions, votings, strict=True)]


def vote(run: Run, shown: bool) -> None:
    """Train what models are missing, and keep their votes; `shown` prints progress."""
    folders = vote_folders(run)
    cells = [(folder, voting, model) for model in range(run.models) for _, folder, voting in folders]
    fill(cells, _progress([folder for _, folder, _ in folders], run.models) if shown else None)


def _progress(folders: Sequence[VoteFolder], models: int) -> Callable[[VoteFolder, int], None]:
    """Print after each model made here how many are there, made by whomever, and how long the rest will take."""
    before, begun = sum(folder.done() for folder in folders), time.monotonic()

    def seen(_: VoteFolder, model: int) -> None:
        done, total = sum(folder.done() for folder in folders), models * len(folders)
        left = (time.monotonic() - begun) / max(1, done - before) * (total - done)
        print(f"{done} of {total} models, {_time(left)} left", file=sys.stderr, flush=True)

    return seen


def write(run: Run) -> list[str]:
    """Write the results, and return the paths and what should be noted."""
    outcomes = []
    for condition, folder, _ in vote_folders(run):
        outcomes.append(
            report.Outcome(
                condition.name,
                condition.noised.sigma,
                run.settings.draws,
                condition.plain,
                condition.purifier.config(),
                tuple(run.reasons[condition.folder]),
                *np.split(folder.all(), [run.settings.selection]),
            )
        )
        folder.tidy()
    tidy(run.settings.folder)
    results = report.results(outcomes, run.data.test_labels, run.classes, run.settings.alpha, settings=run.in_common())
    written = output.write(results, run.settings.folder)
    return [*map(str, written.paths), *([written.note] if written.note else [])]
