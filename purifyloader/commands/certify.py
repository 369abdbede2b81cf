"""`purifyloader certify`: what nobody can change by changing the training images a little.

How many models are asked, how many of them select, and alpha are settings of a run, fixed before its first vote:
whoever looks at a certificate and then adds models until it is better has none at that alpha.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.certify import output, report
from purifyloader.certify.conditions import Condition, Knowledge, conditions, reasons
from purifyloader.certify.functions import named_training, training_settings
from purifyloader.certify.models import Voting, fill, voting_settings
from purifyloader.certify.protocols import Train
from purifyloader.certify.statistics import best_lower_bound, best_radius, fixed_draws, models_needed, radius_per_image
from purifyloader.certify.training import Training, with_classes
from purifyloader.certify.votes import VoteFolder, new_seed
from purifyloader.commands.processes import run_many
from purifyloader.core.devices import device_of_process
from purifyloader.datasets.arrays import as_arrays
from purifyloader.datasets.named import open_dataset
from purifyloader.datasets.samples import fields
from purifyloader.datasets.select import label_of, load_images
from purifyloader.datasets.splits import DATA, Data, load
from purifyloader.errors import ConfigError, InputError
from purifyloader.files.atomic import replacing, writing
from purifyloader.files.hashes import image_hashes
from purifyloader.files.locks import Lock, lock_path
from purifyloader.purified.filling import place
from purifyloader.results.rows import fingerprint
from purifyloader.victims.networks import VICTIMS

__all__ = ["DESCRIPTION", "add_options", "run"]

VOTES, START_FILE = "votes", "start.safetensors"
_BUILT_IN = ("network", "width", "pool", "pad", "epochs", "batch_size", "lr")
_TRAIN = "train"  # --warm-start: the training set itself


DESCRIPTION = (
    "Noise and denoise the training set once for each of many models, let them vote on test images, "
    "and say how far the training images could be changed without changing the vote (Hong, Carlini & Kurakin). "
    "Votes are kept as they are made: the same command goes on after a stop, and any number of processes may run "
    "it at once. On several GPUs: accelerate launch -m purifyloader certify, with the same options."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--out", type=Path, help=f"folder of the results: {output.RESULTS_FILE}, a page, a picture, and the votes")
    add("--plan", action="store_true", help="measure one model, say what all will take and could give, and stop")

    data = parser.add_argument_group("what is certified").add_argument
    data(
        "--data",
        default="sample",
        metavar="NAME",
        help=f"{', '.join(DATA)}, or package.module:function that returns a training and a test set (default: sample)",
    )
    data("--root", type=Path, help="where the data are (default: examples/data for the sample, else data)")
    data("--train", type=int, metavar="N", help="so many training images, drawn at random (default: all)")
    data("--test", type=int, metavar="N", help="so many test images (default: all)")

    noise = parser.add_argument_group("noise").add_argument
    noise("--sigma", type=float, nargs="+", help="levels, in units of [0, 1] images (default: 0.25, which is 63.75 px)")
    noise("--model", default="cifar10-sparse-wide", help="the denoiser (default: cifar10-sparse-wide)")
    noise("--plain", action="store_true", help="each level without denoising, too")
    noise("--recipe", type=Path, action="append", default=[], metavar="FILE", help="JSON of a purifier of your own")
    noise(
        "--draws", type=int, default=1, metavar="K", help="fixed draws of each image a model; costs sqrt(K) of a radius"
    )
    noise("--precise", action="store_true", help="float32 in denoiser and built-in training; default is bfloat16")

    votes = parser.add_argument_group("votes").add_argument
    votes("--models", type=int, default=100, metavar="M", help="whose votes are counted for the radius (default: 100)")
    votes("--selection", type=int, default=10, metavar="N", help="others, which choose the class (default: 10)")
    votes("--alpha", type=float, default=0.001, help="how often a certificate may be false (default: 0.001)")
    votes("--radius", type=float, help="with --plan: say how many models such a radius takes at least")
    votes("--triggered", action="store_true", help="test images may be changed too: no certificate covers that")
    votes("--learned-elsewhere", action="store_true", help="you know it of a model that does not say")
    votes("--empirical", action="store_true", help="train and vote where there is no certificate to be had, too")

    training = parser.add_argument_group("training").add_argument
    training(
        "--training",
        metavar="FUNCTION",
        help="yours, package.module:function of (training set, seed) that returns a predictor (default: built in)",
    )
    training("--network", choices=tuple(VICTIMS), help="(default: a ResNet-9 of --width)")
    training("--width", type=int, help="(default: 16)")
    training("--pool", type=int, metavar="PX", help="average squares of so many pixels (default: 2)")
    training("--pad", type=int, metavar="PX", help="furthest that a random crop moves (default: 1)")
    training("--epochs", type=int, help="(default: 10)")
    training("--batch-size", type=int, help="(default: 64)")
    training("--lr", type=float, help="highest learning rate of the cycle (default: 0.2)")
    training(
        "--warm-start",
        metavar="DATA",
        help="go on from a network that has learned from this: other images, as --dataset of precompute names them, or "
        "train, the training images themselves without noise, which leaves no certificate",
    )
    training("--warm-start-root", type=Path, default=Path("data"), help="where these are (default: data)")
    training("--warm-start-epochs", type=int, default=8, help="(default: 8)")

    place = parser.add_argument_group("where").add_argument
    place("--device", help="such as cpu or cuda (default: a GPU for each process, else the CPU)")
    place("--processes", type=int, default=1, metavar="N", help="so many on this machine (default: 1)")
    place("--threads", type=int, default=1, help="of the CPU, a process; decides the last bit of a model (default: 1)")
    place("--quiet", action="store_true", help="no progress")


@dataclass(frozen=True, eq=False)
class Run:
    """A command's options, made ready.

    Attributes:
        reasons: condition's folder → why it has no certificate.
    """

    options: argparse.Namespace
    data: Data
    conditions: list[Condition]
    train: Train
    reasons: Mapping[str, tuple[str, ...]]

    @property
    def models(self) -> int:
        """Of one condition, all that are trained."""
        return self.options.models + self.options.selection

    def voting(self, condition: Condition) -> Voting:
        data = self.data
        return Voting(
            data.train,
            data.train_labels,
            data.test,
            condition.purifier,
            self.train,
            max(2, data.classes),
            self.options.draws,
        )

    def settings(self) -> dict[str, Any]:
        """What all conditions have in common, for people: no path in it."""
        options, data = self.options, self.data
        return {
            "data": {
                "name": data.name,
                "train": len(data.train),
                "test": len(data.test),
                "values": math.prod(data.train.shape[1:]),
            },
            "training": training_settings(self.train),
            "draws": options.draws,
            "threads": options.threads,
            "warm_start": None if options.warm_start is None else [_told(options), options.warm_start_epochs],
            "stated": {"triggered": options.triggered, "learned_elsewhere": options.learned_elsewhere},
        }

    def folder(self, condition: Condition, voting: Voting) -> VoteFolder:
        options = self.options
        settings = {
            **voting_settings(voting),
            "selection": options.selection,
            "alpha": options.alpha,
            "threads": options.threads,
        }
        return VoteFolder(
            options.out / VOTES / condition.folder,
            settings,
            models=self.models,
            inputs=len(self.data.test),
            classes=voting.classes,
        )


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`. Returns 0."""
    if options.out is None and not options.plan:
        raise ConfigError("--out is required, or --plan.")
    _check(options)
    rank, world_size = place(None, None)
    if options.processes > 1 and world_size > 1:
        raise ConfigError("Expected --processes or a launcher. Got both: leave --processes out.")
    device, options.device = options.device, str(_device(options.device, rank))
    torch.set_num_threads(options.threads)
    run = _prepared(options)
    if options.plan:
        if rank == 0:
            print(_plan(run, max(options.processes, world_size)))
        return 0
    if options.processes > 1:
        _folders(run)  # other settings are said once, not by each process
        run_many(functools.partial(_worker, options, device), options.processes)
    _vote(run, shown=rank == 0 and not options.quiet)  # after other processes: what a dead one has left
    if rank == 0:
        _write(run)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("models", "selection", "draws", "processes", "threads", "warm_start_epochs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1. Got {getattr(options, name)}.")
    if not 0 < options.alpha < 1:
        raise ConfigError(f"--alpha must be above 0 and below 1, such as 0.001. Got {options.alpha}.")
    if options.radius is not None and not 0 <= options.radius < math.inf:
        raise ConfigError(f"--radius must be from 0, in units of [0, 1] images. Got {options.radius}.")
    given = [name for name in _BUILT_IN if getattr(options, name) is not None]
    if options.training is not None and (given or options.warm_start is not None):
        extra = given[0] if given else "warm_start"
        raise ConfigError(
            f"--training is a function that trains by itself. Got --{extra.replace('_', '-')} too, which is of the "
            "built-in training: leave one out."
        )
    if options.network is not None and options.width is not None:
        raise ConfigError("--width is of the ResNet-9 that is trained without --network. Got both: leave one out.")
    if options.sigma is None and not options.recipe:
        options.sigma = [0.25]


def _device(name: str | None, rank: int) -> torch.device:
    device = device_of_process(name, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a training function of the user's finds the right one as "cuda"
    return device


# -- before anything is trained ------------------------------------------------------------------------


def _prepared(options: argparse.Namespace) -> Run:
    data = _data(options).some(options.train, options.test)
    found = conditions(
        options.sigma or (), options.model, plain=options.plain, files=options.recipe, fast=not options.precise
    )
    hashes = image_hashes(data.train), image_hashes(data.test)
    if both := int(np.isin(hashes[1], hashes[0]).sum()):
        raise InputError(
            f"Expected test images that are not trained on. Got {both} of {len(data.test)} that are: leave them out of "
            "one of the two."
        )
    train, begins = _training(options), _beginning(options, data)
    known = Knowledge(
        options.draws,
        begins is not None and begins.own,
        options.triggered,
        options.learned_elsewhere,
        options.model,
        (data.train.shape[1], data.train.shape[2]),
    )
    why = {c.folder: reasons(c, known, *hashes, options.models, options.alpha) for c in found}
    if any(why.values()) and not (options.empirical or options.plan):
        told = [f"{c.name}: {reason}" for c in found for reason in why[c.folder]]
        raise ConfigError(
            "Expected a run that may end in certificates. Got reasons against it:\n  "
            + "\n  ".join(told)
            + "\nMend them, or give --empirical to train and vote all the same, without a certificate."
        )
    if begins is not None and not options.plan:  # a plan's models take as long without a start
        assert isinstance(train, Training)
        train = replace(train, start=_start(options, train, begins, data.classes), keep_head=begins.own_set)
    moved = [replace(c, purifier=c.purifier.to(options.device)) for c in found]
    return Run(options, data, moved, train, why)


def _data(options: argparse.Namespace) -> Data:
    if options.data in DATA:
        return load(options.data, options.root or Path("examples/data" if options.data == "sample" else "data"))
    if ":" not in options.data or options.data.startswith("."):  # a path, or relative to nothing
        raise InputError(f"Expected {', '.join(DATA)}, or package.module:function. Got {options.data!r}.")
    pair: Any = open_dataset(options.data)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{options.data!r} must return a training set and a test set. Got {type(pair).__name__}.")
    (train, train_labels), (test, test_labels) = as_arrays(pair[0]), as_arrays(pair[1])
    if train.shape[1:] != test.shape[1:]:
        raise InputError(f"Expected images of one size in both sets. Got {train.shape[1:]} and {test.shape[1:]}.")
    classes = 1 + max(int(train_labels.max()), int(test_labels.max()))
    return Data(options.data, train, train_labels, test, test_labels, classes)


def _training(options: argparse.Namespace) -> Train:
    if options.training is not None:
        return named_training(options.training)
    given = {name: getattr(options, name) for name in _BUILT_IN if getattr(options, name) is not None}
    return Training(**given, bfloat16=not options.precise, device=options.device)


@dataclass(frozen=True, eq=False)
class _Beginning:
    """What a warm start has learned from.

    Attributes:
        own: some of it is what is to be certified.
        own_set: it is the training set itself.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    own: bool
    own_set: bool = False


def _beginning(options: argparse.Namespace, data: Data) -> _Beginning | None:
    if options.warm_start is None:
        return None
    if options.warm_start == _TRAIN:
        return _Beginning(data.train, data.train_labels, own=True, own_set=True)
    images, labels = _others(options, data)
    hashes = image_hashes(images)
    if both := int(np.isin(hashes, image_hashes(data.test)).sum()):
        raise InputError(
            f"Expected a warm start from images that are not tested on. Got {both} of {len(images)} that are: "
            "leave them out."
        )
    return _Beginning(images, labels, own=bool(np.isin(hashes, image_hashes(data.train)).any()))


def _others(options: argparse.Namespace, data: Data) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels for a warm start, brought to the size of the training images."""
    dataset = open_dataset(options.warm_start, options.warm_start_root)
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


def _start(options: argparse.Namespace, training: Training, begins: _Beginning, classes: int) -> torch.nn.Module:
    """The network that all models go on from: made once, and kept beside the votes."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    path = options.out / START_FILE
    with writing(path):
        options.out.mkdir(parents=True, exist_ok=True)
    its, classes = replace(training, epochs=options.warm_start_epochs), max(2, classes)
    # in the file itself: one from other images must not be taken for this one, which a certificate may rest on
    made_from = fingerprint(
        {
            "hashes": image_hashes(begins.images).tolist(),
            "labels": begins.labels.tolist(),
            "training": its.settings(),
            "classes": classes,
        }
    )
    with Lock(options.out, START_FILE):
        if not path.exists():
            own_classes = max(2, int(begins.labels.max()) + 1)
            network = with_classes(its.warm_start(begins.images, begins.labels, own_classes, seed=0), classes, seed=0)
            weights = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
            with writing(path), replacing(path) as temporary:
                save_file(weights, temporary, {"made_from": made_from})
    start = its.empty(classes)
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("made_from")
        if found != made_from:
            raise InputError("one that was made from other images, or otherwise.")
        start.load_state_dict(load_file(path))
    except (InputError, RuntimeError, SafetensorError, OSError) as error:
        raise InputError(
            f"Expected in {path} the network that this run begins with. Got: {str(error).splitlines()[0]} Give the "
            "settings of before, or another --out."
        ) from None
    return start


def _tidy_start(out: Path) -> None:
    """Remove what the lock of `_start` and kills have left, but not what another process has in work."""
    if not (path := lock_path(out, START_FILE)).exists():
        return
    lock = Lock(out, START_FILE)
    if lock.acquire(wait=False) and lock.real:
        for left in (*out.glob(f".{START_FILE}.*.tmp"), path):
            left.unlink(missing_ok=True)
    lock.release()


def _told(options: argparse.Namespace) -> str:
    """Where a warm start comes from, without a path."""
    from purifyloader.datasets.named import describe

    return "the training set" if options.warm_start == _TRAIN else describe(options.warm_start)


def _plan(run: Run, processes: int) -> str:
    """One model of each condition, measured, and what follows from it."""
    options = run.options
    lines = [
        f"{len(run.data.train):,} training images of {run.data.name}, {len(run.data.test):,} test images; "
        f"{options.selection} + {options.models} models for each condition, alpha {options.alpha:g}"
    ]
    total = 0.0
    for condition in run.conditions:
        voting, seed = run.voting(condition), new_seed()
        begun = time.perf_counter()
        dataset = voting.noised(0, seed)
        made = time.perf_counter()
        voting.asked(dataset, 0, seed)
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
    options, values = run.options, math.prod(run.data.train.shape[1:])
    assert condition.noised.sigma is not None
    sigma = fixed_draws(condition.noised.sigma, options.draws)
    radius = best_radius(sigma, options.models, options.alpha)
    lines = [
        f"  at most, if all agree: p_A {best_lower_bound(options.models, options.alpha):.4f}, radius {radius:.3g} over "
        f"the whole training set; one image by {255 * radius / math.sqrt(values):.2f} levels of 255 in every value, 10 "
        f"images by {255 * float(radius_per_image(radius, 10)) / math.sqrt(values):.2f}"
    ]
    if options.radius is not None:
        needed = models_needed(sigma, options.radius, options.alpha)
        lines.append(f"  a radius of {options.radius:g} takes at least {needed:,} models")
    return lines


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# -- votes -----------------------------------------------------------------------------------------------


def _folders(run: Run) -> list[tuple[Condition, VoteFolder, Voting]]:
    votings = [run.voting(condition) for condition in run.conditions]
    return [(c, run.folder(c, voting), voting) for c, voting in zip(run.conditions, votings, strict=True)]


def _vote(run: Run, shown: bool) -> None:
    folders = _folders(run)
    cells = [(folder, voting, model) for model in range(run.models) for _, folder, voting in folders]
    fill(cells, _progress([folder for _, folder, _ in folders], run.models) if shown else _nothing)


def _nothing(folder: VoteFolder, model: int) -> None:
    pass


def _progress(folders: Sequence[VoteFolder], models: int) -> Callable[[VoteFolder, int], None]:
    """Says after each model made here how many are there, made by whom ever, and how long the rest will take."""
    before, begun = sum(folder.done() for folder in folders), time.monotonic()

    def seen(folder: VoteFolder, model: int) -> None:
        done, total = sum(its.done() for its in folders), models * len(folders)
        left = (time.monotonic() - begun) / max(1, done - before) * (total - done)
        print(f"{done} of {total} models, {_time(left)} left", file=sys.stderr, flush=True)

    return seen


def _worker(options: argparse.Namespace, device: str | None, number: int) -> None:
    options.device = str(_device(device, number))
    torch.set_num_threads(options.threads)
    _vote(_prepared(options), shown=number == 0 and not options.quiet)


# -- what comes of them --------------------------------------------------------------------------------


def _write(run: Run) -> None:
    outcomes = []
    for condition, folder, _ in _folders(run):
        votes = folder.all()
        outcomes.append(
            report.Outcome(
                condition.name,
                condition.noised.sigma,
                run.options.draws,
                condition.plain,
                condition.purifier.config(),
                tuple(run.reasons[condition.folder]),
                votes[: run.options.selection],
                votes[run.options.selection :],
            )
        )
        folder.tidy()
    _tidy_start(run.options.out)
    found = report.results(
        outcomes, run.data.test_labels, max(2, run.data.classes), run.options.alpha, settings=run.settings()
    )
    written = output.write(found, run.options.out)
    print("\n".join([*map(str, written.paths), *([written.note] if written.note else [])]))
