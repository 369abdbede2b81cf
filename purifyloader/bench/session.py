"""Run a bench: every attack against every defence, in rows that are kept as they are done, a table and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from purifyloader.bench import pictures, targeted
from purifyloader.bench.defences import ROWS_FILE, TABLE_FILE, Models, find
from purifyloader.bench.report import markdown, settings_of
from purifyloader.bench.run import Bench
from purifyloader.datasets.splits import Data, load
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.files.atomic import write_text, writing
from purifyloader.files.hashes import image_hashes
from purifyloader.files.locks import Lock
from purifyloader.poisons.attacks import registry
from purifyloader.poisons.spec import CLEAN, AttackSpec, parse
from purifyloader.pretrained.learned import learned_from
from purifyloader.results import rows
from purifyloader.results.claims import make_missing
from purifyloader.results.folder import check_out

__all__ = ["Session", "Settings", "make_rows", "picture_images", "prepare", "report"]

ACCURACY_FILE, COST_FILE, NOISE_FILE, IMAGES_FILE = "accuracy.png", "cost.png", "noise.png", "images.png"
_SHOWN = 4  # images of a picture, for each attack


@dataclass(frozen=True)
class Settings:
    """Settings of a bench."""

    out: Path
    data: str  # a name of `DATA`, and its `root`
    root: Path
    train: int | None  # so many images of each split; None for all
    test: int | None
    leave_out: bool  # leave the images that models learned from out of the training set
    attacks: Sequence[str]  # as `poisons.spec.parse` reads them; clean data are always among them
    preset: str  # of attacks with presets
    defences: Sequence[str]  # as `bench.defences.find` reads them
    seeds: Sequence[int]  # of victims
    attack_seed: int  # for all rows
    victim: str
    training: str
    models: Models
    work: Path  # folder of poisoned and purified sets, kept for other runs
    device: str
    fast: bool
    progress: bool


Cell = tuple[AttackSpec, str, int]  # attack, defence and seed: a row


@dataclass(frozen=True, eq=False)
class Session:
    """A bench made ready, and the rows that are wanted of it."""

    settings: Settings
    bench: Bench
    wanted: list[Cell]

    @property
    def first_seed(self) -> int:
        return self.settings.seeds[0]

    @property
    def attacks(self) -> list[AttackSpec]:
        return list({spec.label: spec for spec, _, _ in self.wanted}.values())


def prepare(settings: Settings) -> Session:
    """Read the data and the attacks, load the models, and refuse what could not be measured, before hours of work."""
    specs = [parse(text, settings.preset) for text in settings.attacks]
    specs = [AttackSpec(CLEAN), *(spec for spec in specs if spec.name != CLEAN)]
    if twice := _first_twice([spec.label or spec.name for spec in specs]):
        raise ConfigError(
            f"Expected attacks of different names. Got {twice} twice: give the other a folder of results of its own."
        )
    defences = list(dict.fromkeys(settings.defences))
    if "none" not in defences:
        defences.insert(0, "none")
    seeds = list(settings.seeds)
    if seeds != list(dict.fromkeys(seeds)) or min(seeds) < 0:
        raise ConfigError(f"must be different numbers from 0. Got {seeds}.", argument="seeds")
    for defence in defences:
        find(defence)
    check_out(settings.out, (), False, "results")
    data = load(settings.data, settings.root)
    if settings.leave_out:
        data = _left_out(data, settings.models, defences)
    bench = Bench(
        data.some(settings.train, settings.test),
        settings.models,
        settings.victim,
        settings.training,
        settings.work,
        attack_seed=settings.attack_seed,
        device=settings.device,
        fast=settings.fast,
        progress=settings.progress,
    )
    if twice := _first_twice([bench.label(defence) for defence in defences]):
        raise ConfigError(f"Expected defences of different names. Got {twice} twice: name files apart.")
    for defence in defences:
        bench.makes(defence)
        bench.check(defence)
    for spec in specs:
        _check_attack(bench, spec, defences, seeds[0])
    # a seed of everything first, so that there is something to look at early
    return Session(settings, bench, [(spec, defence, seed) for seed in seeds for spec in specs for defence in defences])


def _first_twice(names: Sequence[str]) -> str | None:
    return min((name for name in names if names.count(name) > 1), default=None)


def _check_attack(bench: Bench, spec: AttackSpec, defences: Sequence[str], seed: int) -> None:
    """Refuse a bad attack before hours of work: read it, or make it where that takes no network."""
    if spec.name == CLEAN:
        return
    if spec.file is not None:
        poisoned = bench.poisoned(spec, seed)
        for defence in defences:  # a file may hold any images
            bench.check(defence, poisoned)
        return
    attack = registry.find(spec.name)
    targeted.check_options(attack, spec.options)
    target = spec.options.get("target_class")
    if target is not None and (type(target) is not int or not 0 <= target < bench.data.classes):
        raise ConfigError(f"target_class must be from 0 to {bench.data.classes - 1}. Got {target!r}.")
    if "preset" not in attack.options:
        bench.poisoned(spec, seed)


def _left_out(data: Data, models: Models, defences: Iterable[str]) -> Data:
    """Drop images that any of the models learned from, used or not, so that all defences are measured on the same data.

    `InputError` where a model that is used does not say.
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


def make_rows(session: Session) -> None:
    """Make every row that is not there yet; leave to other processes what they are making."""
    bench, path = session.bench, session.settings.out / ROWS_FILE
    claims = bench.work / "claims"
    with writing(claims):
        claims.mkdir(parents=True, exist_ok=True)
    backdoors = [spec for spec in session.attacks if _is_backdoor(bench, spec, session.first_seed)]
    triggers = {spec.label for spec in backdoors}
    targets = any(_kind(spec) == "targeted" for spec in session.attacks)

    def is_there(item: tuple[Cell, str]) -> bool:
        (spec, _, _), name = item
        row = next((row for row in rows.read(path) if row["fingerprint"] == name), None)
        if row is None or spec.name != CLEAN:
            return row is not None
        # clean data also say how often the attacks beside them succeed by chance
        return (not targets or "flipped" in row) and triggers <= {*row.get("clean_success", {})}

    def make(item: tuple[Cell, str]) -> None:
        cell, name = item
        row = bench.row(*cell, backdoors)
        for old in rows.read(path):  # triggers that it was shown in other runs
            if old["fingerprint"] == name and "clean_success" in old:
                row["clean_success"] = {**old["clean_success"], **row.get("clean_success", {})}
        rows.add(path, row)
        print(_in_words(row), flush=True)

    make_missing(
        [(cell, rows.fingerprint(bench.settings(*cell))) for cell in session.wanted],
        is_done=is_there,
        lock=lambda item: Lock(claims, item[1]),
        make=make,
        is_busy=lambda item: bench.is_being_made(item[0][0], item[0][2]),
    )


def _kind(spec: AttackSpec) -> str:
    return "" if spec.file is not None or spec.name == CLEAN else registry.find(spec.name).kind


def _is_backdoor(bench: Bench, spec: AttackSpec, seed: int) -> bool:
    if spec.file is None:
        return _kind(spec) == "backdoor"
    poisoned = bench.poisoned(spec, seed)
    return poisoned.trigger is not None and poisoned.target_class is not None


def _in_words(row: rows.Row) -> str:
    clean = row["attack"] == CLEAN
    also = "".join(f", {name} {row[name]:.1f} %" for name in ("success", "flipped") if name in row and not clean)
    attack = "clean" if clean else row["attack"]
    return f"{attack:<18} {row['defence']:<18} seed {row['seed']}: accuracy {row['accuracy']:.1f} %{also}"


def picture_images(session: Session) -> None:
    """Draw a few images before and after the strongest of ECLIPSE's kind that was asked for."""
    bench = session.bench
    defences = [defence for _, defence, _ in session.wanted if bench.makes(defence).purifier is not None]
    chosen = next((d for d in defences if d.partition("@")[0] == "eclipse"), defences[0] if defences else None)
    if chosen is None:
        return
    shown = {}
    for spec in session.attacks:
        if spec.name == CLEAN:
            continue
        poisoned = bench.poisoned(spec, session.first_seed)
        which = poisoned.poisoned[:_SHOWN]
        if len(which):
            after, _ = bench.purified(poisoned, bench.makes(chosen))
            shown[spec.label] = bench.data.train[which], poisoned.images[which], after[which]
    if shown:
        pictures.images(shown, bench.label(chosen), session.settings.out / IMAGES_FILE)


def report(out: Path) -> list[Path]:
    """Write the table and the pictures of the rows, and return the paths; `InputError` where there are no rows."""
    measured = rows.read(out / ROWS_FILE)
    if not measured:
        raise InputError(f"Expected rows in {out / ROWS_FILE}. Got none: run a bench into {out} first.")
    with writing(out / TABLE_FILE):
        write_text(out / TABLE_FILE, markdown(measured))
    # the setting with most rows: bars of two would not compare
    settings = [settings_of(row) for row in measured]
    most = max(dict.fromkeys(settings), key=settings.count)
    alike = [row for row in measured if settings_of(row) == most]
    pictures.accuracies(alike, out / ACCURACY_FILE)
    pictures.costs(alike, out / COST_FILE)
    files = [ROWS_FILE, TABLE_FILE, ACCURACY_FILE, COST_FILE]
    if pictures.noise(alike, out / NOISE_FILE):
        files.append(NOISE_FILE)
    return [out / name for name in files]
