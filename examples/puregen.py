"""PureGen, ECLIPSE and JPEG against availability poisons and a back door: tables of purifyloader/recipes/README.md.

    python examples/puregen.py --trigger narcissus_resnet18_trigger.npy
    python examples/puregen.py --readme purifyloader/recipes/README.md

A cell is a poison and a defence. Its figures are the mean over the seeds of the accuracy on 1,000 clean test images
of a ResNet-9 of width 16, trained for ten epochs on the purified images; for the back door also how many of the test
images of other classes are called the target when they carry the trigger; and how far the purified images are from
the clean ones. All of it is kept in the results file and in the caches of `--work`, so a stopped run goes on; several
processes may fill the table at once, each given its `--cells`.

Without a GPU the defences of many network calls are measured on fewer images, which costs the victim accuracy by
itself: the rows without a defence are there for each number of images.

The back door's trigger is the published one of Narcissus (reds-lab/Narcissus, `resnet18_trigger.npy`), within 16 px;
without the file that poison is left out. It is on three quarters of the images of its class, which is 7 % of the set,
and is tested three times as strong, as Narcissus does: a victim this small, trained for ten epochs, does not learn it
from the 1 % that PureGen poisons (9 to 13 % called the target, where 10 % is chance).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader import PurifiedDataset, pretrained, recipes
from purifyloader.audit import dataset_energies
from purifyloader.bench.applying import compensation
from purifyloader.core import noise
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.poisons import add_trigger, autoregressive, backdoor, lsp, read_trigger
from purifyloader.purifiers import Purifier
from purifyloader.results.values import auc
from purifyloader.transforms import Compensate
from purifyloader.victims.training import accuracy, train_victim

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

TARGET = 2  # bird, for which the published trigger was made
POISONED_SHARE = 0.75  # of the images of that class
TEST_STRENGTH = 3.0
ENERGY, MODEL, SPARSE = "cifar10-energy", "cifar10-puregen-ddpm", "cifar10-sparse"


class Defence(NamedTuple):
    """A column: how to purify, whether to compensate, and on how many images where there is no GPU."""

    make: Callable[[], Purifier] | None
    images: int
    compensated: bool = False


DEFENCES: dict[str, Defence] = {
    "none": Defence(None, 4000),
    "none, 2,000": Defence(None, 2000),
    "none, 1,000": Defence(None, 1000),
    "JPEG-10": Defence(lambda: recipes.jpeg(10), 4000),
    "ECLIPSE": Defence(lambda: recipes.eclipse(SPARSE, sigma=0.05, fast=True), 4000, True),
    "EBM": Defence(lambda: recipes.puregen_ebm(150, energy=ENERGY, fast=True), 4000),
    "DDPM": Defence(lambda: recipes.puregen_ddpm(75, model=MODEL, fast=True), 2000),
    "Naive": Defence(lambda: recipes.puregen_naive(150, 75, energy=ENERGY, model=MODEL, fast=True), 2000),
    "Reps": Defence(lambda: recipes.puregen_reps(10, 50, 5, energy=ENERGY, model=MODEL, fast=True), 1000),
    "Filt": Defence(lambda: recipes.puregen_filt(0.5, energy=ENERGY, model=MODEL, fast=True), 2000),
}


def main() -> None:
    options = parse_arguments()
    if options.readme:
        options.readme.write_text(with_tables(options.readme.read_text(), read(options.out)))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    here = Path(__file__).parent
    images, labels = load_sample(here / "data", "train")
    test = load_sample(here / "data", "test")
    trigger = None if options.trigger is None else read_trigger(options.trigger)
    if options.time:
        merge(options.out, {"seconds": seconds_per_thousand(images, options.time)})
        return
    if options.audit:
        merge(options.out, {"audit": audits(images, labels, test[0], trigger)})
        return
    for poison, defence in wanted(options.cells, trigger is not None):
        its = DEFENCES[defence]
        count = len(images) if options.all_images else its.images
        cell = f"{poison}:{defence}"
        entry = read(options.out).get("cells", {}).get(cell, {"images": count, "accuracy": {}, "success": {}})
        missing = [s for s in range(options.seeds) if str(s) not in entry["accuracy"]]
        if not missing:
            continue
        clean, y = images[:count], labels[:count]
        poisoned = {
            "clean": lambda clean=clean: clean,
            "LSP": lambda clean=clean, y=y: lsp(clean, y),
            "AR": lambda clean=clean, y=y: autoregressive(clean, y),
            "back door": lambda clean=clean, y=y: with_trigger(clean, y, trigger),
        }[poison]()
        purified = poisoned
        if its.make is not None:
            cache = options.work / re.sub(r"\W+", "-", f"{cell}-{count}".lower())
            purified = purify(poisoned, y, its.make(), cache)
        entry["distance_px"] = round(float(np.sqrt(np.mean((purified.astype(np.float64) - clean) ** 2))), 2)
        for seed in missing:
            corrupt = compensation(Compensate(), seed) if its.compensated else None
            victim, _ = train_victim(purified, y, seed=seed, batch_transform=corrupt)
            entry["accuracy"][str(seed)] = round(100 * accuracy(victim, *test), 2)
            if poison == "back door":
                others = test[1] != TARGET
                shown = add_trigger(test[0][others], trigger, TEST_STRENGTH)
                entry["success"][str(seed)] = round(100 * accuracy(victim, shown, np.full(len(shown), TARGET)), 2)
            print(
                f"{cell} seed {seed}: {entry['accuracy'][str(seed)]:.1f}",
                entry["success"].get(str(seed), ""),
                flush=True,
            )
            merge(options.out, {"cells": {cell: entry}})


def with_trigger(images: Images, labels: Labels, trigger: torch.Tensor) -> Images:
    return backdoor(images, labels, trigger, TARGET, round(POISONED_SHARE * int((labels == TARGET).sum())))[0]


def purify(images: Images, labels: Labels, purifier: Purifier, cache: Path) -> Images:
    """All images purified, through a cache in which a stopped run goes on."""
    dataset = PurifiedDataset(ArrayDataset(images, labels), purifier, cache=cache, missing="precompute")
    return np.stack([np.asarray(dataset[i][0]) for i in range(len(dataset))])


def audits(images: Images, labels: Labels, reference: Images, trigger: torch.Tensor | None) -> dict[str, Any]:
    """How well the energy finds a tenth of the images poisoned: AUC, its highest tenth, and above the clean 99 %."""
    energy = pretrained.load(ENERGY, kind="energy")
    chosen = np.arange(0, len(images), 10)
    poisoned = {"LSP": lsp(images, labels, indices=chosen), "AR": autoregressive(images, labels, indices=chosen)}
    if trigger is not None:
        poisoned["back door"] = add_trigger(images, trigger, indices=chosen)
    clean = dataset_energies(energy, ArrayDataset(reference, np.zeros(len(reference), np.int64)))
    found = {}
    for poison, its in poisoned.items():
        data = dataset_energies(energy, ArrayDataset(its, labels))
        values, bad = data.energies.double().numpy(), np.isin(np.arange(len(its)), chosen)
        highest = np.argsort(-values, kind="stable")[: len(chosen)]
        found[poison] = {
            "auc": round(auc(torch.from_numpy(values[~bad]), torch.from_numpy(values[bad])), 3),
            "of_the_highest_tenth": round(float(bad[highest].mean()), 3),
            "above_99_percent_of_clean": round(float((values > np.quantile(clean.energies.double(), 0.99)).mean()), 4),
        }
        print(poison, found[poison], flush=True)
    return found


def seconds_per_thousand(images: Images, count: int, rounds: int = 3) -> dict[str, float]:
    """Each defence in turn on the same few images, in one process; the median of some rounds after a first one."""
    x = torch.from_numpy(images[:count]).permute(0, 3, 1, 2).float() / 255
    keys = noise.image_keys(0, 0, range(count))
    taken: dict[str, list[float]] = {}
    # Filt purifies the half with the highest energies: with the energies, half the time of its diffusion
    purifiers = {name: its.make() for name, its in DEFENCES.items() if its.make is not None and name != "Filt"}
    purifiers["Filt"] = recipes.puregen_ddpm(125, model=MODEL, fast=True)
    for turn in range(rounds + 1):
        for name, purifier in purifiers.items():
            start = time.perf_counter()
            purifier(x, keys)
            if turn:
                taken.setdefault(name, []).append((time.perf_counter() - start) * 1000 / count)
    shares = {"Filt": 0.5}
    return {name: round(statistics.median(values) * shares.get(name, 1), 1) for name, values in taken.items()}


def mean(values: dict[str, float]) -> str:
    """Mean and, over several seeds, standard deviation."""
    if not values:
        return "–"
    numbers = list(values.values())
    spread = f" ± {np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.1f}{spread}"


def table(results: dict[str, Any]) -> str:
    cells, seconds = results.get("cells", {}), results.get("seconds", {})
    head = ["defence", "images", "clean", "LSP", "AR", "back door", "its success", "distance", "s / 1,000 images"]
    lines: list[Sequence[str]] = [head, ["---"] * len(head)]
    for name, its in DEFENCES.items():
        found = {poison: cells.get(f"{poison}:{name}", {}) for poison in ("clean", "LSP", "AR", "back door")}
        distances = [entry["distance_px"] for entry in found.values() if "distance_px" in entry]
        lines.append(
            [
                name.partition(",")[0],
                f"{next((e['images'] for e in found.values() if e), its.images):,}",
                *(mean(entry.get("accuracy", {})) for entry in found.values()),
                mean(found["back door"].get("success", {})),
                f"{np.mean(distances):.1f} px" if distances else "–",
                f"{seconds[name]:,.{0 if seconds[name] > 9 else 1}f}" if name in seconds else "–",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def audit_table(results: dict[str, Any]) -> str:
    head = ["a tenth poisoned with", "AUC", "of the highest tenth are", "above 99 % of clean ones"]
    lines: list[Sequence[str]] = [head, ["---"] * len(head)]
    for poison, its in results.get("audit", {}).items():
        shares = [f"{100 * its[name]:.0f} %" for name in ("of_the_highest_tenth",)]
        lines.append([poison, f"{its['auc']:.2f}", *shares, f"{100 * its['above_99_percent_of_clean']:.1f} %"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(text: str, results: dict[str, Any]) -> str:
    """The README with the tables between its markers made from the results; a table it has no place for is left out."""
    for name, made in {"puregen": table(results), "audit": audit_table(results)}.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
        if found > 1:
            raise SystemExit(f"The README must have one place for the table {name!r}. Got {found}.")
    return text


def wanted(cells: str | None, trigger: bool) -> list[tuple[str, str]]:
    poisons = ["clean", "LSP", "AR", *(["back door"] if trigger else [])]
    if cells is None:
        return [(poison, defence) for defence in DEFENCES for poison in poisons]
    chosen = []
    for cell in cells.split(";"):
        poison, _, defence = cell.partition(":")
        if poison not in poisons or defence not in DEFENCES:
            raise SystemExit(
                f"A cell is POISON:DEFENCE of {', '.join(poisons)} and {'; '.join(DEFENCES)}. Got {cell!r}"
                + ("." if trigger else ", and no --trigger.")
            )
        chosen.append((poison, defence))
    return chosen


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def merge(path: Path, new: dict[str, Any]) -> None:
    """Another process may be filling other cells of the same file."""
    before = read(path)
    after = {**before, **{part: {**before.get(part, {}), **values} for part, values in new.items()}}
    write_text(path, json.dumps(after, indent=1, sort_keys=True) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trigger", type=Path, help="the published trigger of Narcissus, .npy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", help="part of the table, such as 'AR:EBM;LSP:none, 2,000' (default: all of it)")
    parser.add_argument("--all-images", action="store_true", help="4,000 images for each defence: for a GPU")
    parser.add_argument("--audit", action="store_true", help="how well energies find the poisoned images, and stop")
    parser.add_argument("--time", type=int, metavar="N", help="time each defence on N images, and stop")
    parser.add_argument("--threads", type=int, help="of this process")
    parser.add_argument("--work", type=Path, default=Path("puregen-caches"), help="folder of the caches")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "puregen.json")
    parser.add_argument("--readme", type=Path, help="write the results into this file's table, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
