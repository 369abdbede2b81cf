"""`purifyloader bench`: every attack against every defence, in rows that can be trusted and gone on with."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from purifyloader.bench import report, targeted
from purifyloader.bench.defences import DEFENCES, Models, find
from purifyloader.bench.run import Bench
from purifyloader.commands.options import add_device
from purifyloader.commands.processes import run_many
from purifyloader.core.devices import device_of_process
from purifyloader.datasets.splits import DATA, Data, load
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.files.atomic import write_text, writing
from purifyloader.files.hashes import image_hashes
from purifyloader.files.locks import Lock
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.poisons.spec import CLEAN, AttackSpec, parse
from purifyloader.pretrained.learned import learned_from
from purifyloader.results import rows
from purifyloader.results.claims import make_missing
from purifyloader.victims.networks import VICTIMS
from purifyloader.victims.presets import TRAININGS

__all__ = ["DESCRIPTION", "add_options", "run"]

ROWS_FILE, TABLE_FILE = "rows.jsonl", "README.md"
ACCURACY_FILE, COST_FILE, NOISE_FILE, IMAGES_FILE = "accuracy.png", "cost.png", "noise.png", "images.png"
_SHOWN = 4  # images of a picture, for each attack
_ATTACK_SEED = 1000
_SAFER = "eclipse@25"  # the noise to take where the poison is not known
_DENOISERS = {"tiny-imagenet": "tiny-imagenet-sparse"}  # of a data set's own kind


@dataclass(frozen=True)
class Scale:
    """A preset: what is not said on the command line."""

    data: str
    victim: str
    training: str
    preset: str  # of attacks with a surrogate
    defences: tuple[str, ...]


SCALES = {
    "cpu": Scale("sample", "resnet9", "short", "cpu", (*(d.name for d in DEFENCES.values() if not d.slow), _SAFER)),
    "full": Scale("cifar10", "resnet18", "paper", "full", (*DEFENCES, _SAFER)),
}


DESCRIPTION = (
    "Train victims on poisoned data, with and without defences, and test them on clean images. Rows "
    "are kept as they are done: the same command goes on, and any number of processes may run it at once."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--out", type=Path, help=f"folder of the results: {ROWS_FILE}, {TABLE_FILE} and pictures")
    add("--scale", choices=tuple(SCALES), default="cpu", help="preset of all that is not given (default: cpu)")
    add("--data", choices=DATA, help="(default: of the scale: sample, or cifar10)")
    add("--root", type=Path, help="where the data are (default: examples/data for the sample, else data)")
    add("--train", type=int, metavar="N", help="so many training images, drawn at random (default: all)")
    add("--test", type=int, metavar="N", help="so many test images (default: all)")
    add(
        "--leave-out",
        action="store_true",
        help="leave the images that the models learned from out of the training set, rather than to refuse it",
    )
    add(
        "--attack",
        action="append",
        metavar="ATTACK",
        help=f"none, {', '.join(attacks.ATTACKS)}, or a poison file; with options, NAME:OPTION=VALUE,...; several "
        "times (default: none, lsp, ar). none, the clean data, is always among them",
    )
    add(
        "--defence",
        action="append",
        metavar="NAME[@PX]",
        help="with another noise level, in levels of 0 to 255; or FILE.json, a purifier of your own, and FILE.json+B, "
        "+C, +B+C with compensation; several times (default: of the scale; --list)",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="of victims (default: 0)")
    add(
        "--attack-seed",
        type=int,
        default=_ATTACK_SEED,
        help="of what an attack draws, for all rows; a targeted one has another target for each of --seeds (default: "
        f"{_ATTACK_SEED}, so that no attacker's network starts as a victim of --seeds does)",
    )
    add("--victim", choices=tuple(VICTIMS), help="(default: of the scale: resnet9, or resnet18)")
    add(
        "--training",
        choices=tuple(TRAININGS),
        help="transfer-...: on a few images of each class, which are poisoned, from an extractor that has learned from "
        "the others, which are clean; attacks that take networks know it (default: of the scale: short, or paper)",
    )
    its_own = ", ".join(f"{model} for {data}" for data, model in _DENOISERS.items())
    add("--denoiser", help=f"ECLIPSE's (default: {Models.denoiser}; {its_own})")
    for field, what in (
        ("energy", "PureGen's energy model"),
        ("ddpm", "PureGen's diffusion model"),
    ):
        add(f"--{field}", default=getattr(Models, field), help=f"{what} (default: {getattr(Models, field)})")
    add("--work", type=Path, help="folder of poisoned and purified sets, kept for other runs (default: OUT/work)")
    add_device(parser)
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic of purifiers and victims (default: float32; bfloat16 is faster and gives other pixels)",
    )
    add("--processes", type=int, default=1, metavar="N", help="so many on this machine (default: 1)")
    add("--report", action="store_true", help="write the table and pictures of the rows there are, and stop")
    add("--list", action="store_true", help="list attacks and defences, and stop")


def run(options: argparse.Namespace) -> int:
    """Run the bench, or list or report."""
    if options.list:
        print("\n".join(_listed()))
        return 0
    if options.out is None:
        raise ConfigError("--out is required, or --list.")
    if options.processes < 1:
        raise ConfigError(f"--processes must be at least 1. Got {options.processes}.")
    device_of_process(options.device, 0)
    options.work = options.work or options.out / "work"
    path = options.out / ROWS_FILE
    if options.report:
        if not rows.read(path):
            raise InputError(f"Expected rows in {path}. Got none: run a bench into {options.out} first.")
    else:
        bench, wanted = _prepared(options)
        if options.processes == 1:
            _run(bench, wanted, path)
        else:
            threads = max(1, (os.cpu_count() or 1) // options.processes)
            run_many(functools.partial(_worker, options, threads), options.processes)
        _pictures_of_images(options.out, bench, wanted)
    _report(options.out)
    return 0


_Wanted = list[tuple[AttackSpec, str, int]]


def _prepared(options: argparse.Namespace) -> tuple[Bench, _Wanted]:
    scale = SCALES[options.scale]
    options.data = options.data or scale.data
    root = options.root or Path("examples/data" if options.data == "sample" else "data")
    specs = [parse(text, scale.preset) for text in options.attack or ("lsp", "ar")]
    specs = [AttackSpec(CLEAN), *(spec for spec in specs if spec.name != CLEAN)]
    labels = [spec.label or spec.name for spec in specs]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(
            f"Expected attacks of different names. Got {sorted(twice)[0]} twice: give the other an --out of its own."
        )
    defences = list(dict.fromkeys(options.defence or scale.defences))
    if "none" not in defences:
        defences.insert(0, "none")
    if options.seeds != list(dict.fromkeys(options.seeds)) or min(options.seeds) < 0:
        raise ConfigError(f"--seeds must be different numbers from 0. Got {options.seeds}.")
    models = _models(options)
    data = load(options.data, root)
    if options.leave_out:
        data = _left_out(data, models, defences)
    data = data.some(options.train, options.test)
    bench = Bench(
        data,
        models,
        options.victim or scale.victim,
        options.training or scale.training,
        options.work,
        attack_seed=options.attack_seed,
        device=str(device_of_process(options.device, 0)),
        fast=options.dtype == "bfloat16",
        progress=options.processes == 1 and sys.stderr.isatty(),
    )
    names = [bench.label(defence) for defence in defences]
    if same := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"Expected defences of different names. Got {sorted(same)[0]} twice: name files apart.")
    for defence in defences:  # before hours of work
        bench.check(defence)
    for spec in specs:
        _check_attack(bench, spec, defences, options.seeds[0])
    # a seed of everything first, so that there is something to look at early
    return bench, [(spec, defence, seed) for seed in options.seeds for spec in specs for defence in defences]


def _models(options: argparse.Namespace) -> Models:
    denoiser = options.denoiser or _DENOISERS.get(options.data, Models.denoiser)
    return Models(denoiser, options.energy, options.ddpm)


def _check_attack(bench: Bench, spec: AttackSpec, defences: Sequence[str], seed: int) -> None:
    """Find what is wrong with an attack before hours of work: read it, or make it where that takes no network.

    Raises:
        InputError, ConfigError: what it refuses, and a class that there is not.
    """
    if spec.name == CLEAN:
        return
    if spec.file is None:
        targeted.check_options(attacks.find(spec.name), spec.options)
    if spec.file is None and spec.options.get("target_class") is not None:
        wanted = spec.options["target_class"]
        if type(wanted) is not int or not 0 <= wanted < bench.data.classes:
            raise ConfigError(f"target_class must be from 0 to {bench.data.classes - 1}. Got {wanted!r}.")
    if spec.file is not None or "preset" not in attacks.find(spec.name).options:
        poisoned = bench.poisoned(spec, seed)
        if spec.file is not None:  # which may hold any images
            for defence in defences:
                bench.check(defence, poisoned)


def _left_out(data: Data, models: Models, defences: Iterable[str]) -> Data:
    """Without what any of the models has learned from, used or not: other defences are then measured on the same data.

    Raises:
        InputError: a model that is used does not say.
    """
    used = {model for spec in defences for model in find(spec)[0].models(models)}
    learned = [np.empty(0, np.uint64)]
    for model in sorted({*used, *astuple(models)}):
        try:
            learned.append(learned_from(model, data.size))
        except PurifyError:
            if model in used:
                raise
    return data.only(~np.isin(image_hashes(data.train), np.concatenate(learned)))


def _run(bench: Bench, wanted: _Wanted, path: Path) -> None:
    """Make every row that is not there yet; leave to other processes what they are making."""
    claims = bench.work / "claims"
    with writing(claims):
        claims.mkdir(parents=True, exist_ok=True)
    left = [(cell, rows.fingerprint(bench.settings(*cell))) for cell in wanted]
    specs = list({spec.label: spec for spec, _, _ in wanted}.values())
    backdoors = [spec for spec in specs if _is_backdoor(bench, spec, wanted[0][2])]
    beside = _Beside(any(_kind(spec) == "targeted" for spec in specs), [spec.label for spec in backdoors])

    def is_there(item: tuple[tuple[AttackSpec, str, int], str]) -> bool:
        cell, name = item
        return _is_there(path, name, cell[0].name == CLEAN, beside)

    def make(item: tuple[tuple[AttackSpec, str, int], str]) -> None:
        cell, name = item
        row = bench.row(*cell, backdoors)
        for old in rows.read(path):  # triggers that it was shown in other runs
            if old["fingerprint"] == name and "clean_success" in old:
                row["clean_success"] = {**old["clean_success"], **row.get("clean_success", {})}
        rows.add(path, row)
        print(_in_words(row), flush=True)

    make_missing(
        left,
        is_done=is_there,
        lock=lambda item: Lock(claims, item[1]),
        make=make,
        is_busy=lambda item: bench.is_being_made(item[0][0], item[0][2]),
    )


class _Beside(NamedTuple):
    """What the rows of clean data are to say of the attacks beside them: how often they succeed by chance."""

    targets: bool
    triggers: list[str]


def _kind(spec: AttackSpec) -> str:
    return "" if spec.file is not None or spec.name == CLEAN else attacks.find(spec.name).kind


def _is_backdoor(bench: Bench, spec: AttackSpec, seed: int) -> bool:
    if spec.file is None:
        return _kind(spec) == "backdoor"
    poisoned = bench.poisoned(spec, seed)
    return poisoned.trigger is not None and poisoned.target_class is not None


def _is_there(path: Path, name: str, clean: bool, beside: _Beside) -> bool:
    """Whether the row is there, of clean data with all that it is to say."""
    found = next((row for row in rows.read(path) if row["fingerprint"] == name), None)
    if found is None or not clean:
        return found is not None
    return (not beside.targets or "flipped" in found) and {*beside.triggers} <= {*found.get("clean_success", {})}


def _worker(options: argparse.Namespace, threads: int, number: int) -> None:
    torch.set_num_threads(threads)
    options.device = str(device_of_process(options.device, number))  # of several GPUs each has one
    bench, wanted = _prepared(options)
    _run(bench, wanted, options.out / ROWS_FILE)


def _in_words(row: rows.Row) -> str:
    clean = row["attack"] == CLEAN
    also = "".join(f", {name} {row[name]:.1f} %" for name in ("success", "flipped") if name in row and not clean)
    attack = "clean" if clean else row["attack"]
    return f"{attack:<18} {row['defence']:<18} seed {row['seed']}: accuracy {row['accuracy']:.1f} %{also}"


def _pictures_of_images(out: Path, bench: Bench, wanted: _Wanted) -> None:
    """A few images before and after the strongest of ECLIPSE's kind that was asked for."""
    from purifyloader.bench.pictures import images

    defences = [defence for _, defence, _ in wanted if bench.makes(defence).purifier is not None]
    chosen = next((d for d in defences if d.partition("@")[0] == "eclipse"), defences[0] if defences else None)
    specs = {spec.label: spec for spec, _, _ in wanted if spec.name != CLEAN}
    seed = wanted[0][2]
    if chosen is None or not specs:
        return
    shown = {}
    for label, spec in specs.items():
        poisoned = bench.poisoned(spec, seed)
        which = poisoned.poisoned[:_SHOWN]
        if not len(which):
            continue
        after, _ = bench.purified(poisoned, bench.makes(chosen))
        shown[label] = bench.data.train[which], poisoned.images[which], after[which]
    if shown:
        images(shown, bench.label(chosen), out / IMAGES_FILE)


def _report(out: Path) -> None:
    from purifyloader.bench.pictures import accuracies, costs, noise

    found = rows.read(out / ROWS_FILE)
    with writing(out / TABLE_FILE):
        write_text(out / TABLE_FILE, report.markdown(found))
    # the setting with most rows: bars of two would not compare
    settings = [report.settings_of(row) for row in found]
    most = max(dict.fromkeys(settings), key=settings.count)
    its = [row for row in found if report.settings_of(row) == most]
    accuracies(its, out / ACCURACY_FILE)
    costs(its, out / COST_FILE)
    written = [ROWS_FILE, TABLE_FILE, ACCURACY_FILE, COST_FILE]
    if noise(its, out / NOISE_FILE):
        written.append(NOISE_FILE)
    print("\n".join(str(out / name) for name in written))


def _listed() -> list[str]:
    lines = ["attacks (for testing defences), and any poison file that poisons.read knows:"]
    lines += [f"  {name:<18} {attack.description}" for name, attack in attacks.ATTACKS.items()]
    lines.append("defences, and a purifier's FILE.json; with @PX another noise level where it says so:")
    for its in DEFENCES.values():
        more = " (@PX)" if its.takes_sigma else " (many calls)" if its.slow else ""
        lines.append(f"  {its.name:<18} {its.description}{more}")
    return lines
