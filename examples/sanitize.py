"""Is a back door with wrong labels found, and what is left of it once the suspects are dropped?

    python examples/sanitize.py --cifar10 FOLDER               # some hours of a core; several may run at once
    python examples/sanitize.py --readme purifyloader/sanitize/README.md

On 4,000 images of CIFAR-10 with a tenth of them poisoned (four fifths of a class by `sig`, which keeps labels): clean
accuracy of a ResNet-9 of width 16 on 1,000 test images, and the share of triggered test images of other classes that it
calls the target. It is trained on the set as it is, and on what each way leaves of it. The reference are the 2,000
images that the shipped denoisers learned from, which are in none of these. Finished cells are kept in the file, so a
stopped run goes on. Limits were chosen on other images: `--dev` looks at those, and trains no victims.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from purifyloader import poisons, recipes, sanitize
from purifyloader.bench.applying import purify_array
from purifyloader.certify.functions import DenoisedSet
from purifyloader.core import noise
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.files.locks import Lock
from purifyloader.poisons import Poisoned
from purifyloader.purifiers import Purifier
from purifyloader.sanitize import Verdict
from purifyloader.sanitize.scoring import default_training
from purifyloader.victims.training import accuracy, train_victim

TARGET = 0
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "badnets": ("badnets", {"target_class": TARGET}),
    "badnets, coloured": ("badnets", {"target_class": TARGET, "pattern": "dataelixir"}),
    "badnets 5 %": ("badnets", {"target_class": TARGET, "share": 0.05}),
    "badnets 1 %": ("badnets", {"target_class": TARGET, "share": 0.01}),
    "blended": ("blended", {"target_class": TARGET, "alpha": 0.2}),
    "wanet": ("wanet", {"target_class": TARGET}),
    "ftrojan": ("ftrojan", {"target_class": TARGET}),
    "sig": ("sig", {"target_class": TARGET}),
}
WAYS = ("as it is", "suspects dropped", "as many at random", "relabelled", "the poisons dropped", "purified", "JPEG-10")
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Results = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    if options.readme:
        options.readme.write_text(with_tables(options.readme.read_text(), read(options.out)))
        return
    torch.set_num_threads(options.threads)
    reference, others = of_cifar10(options.cifar10)
    train = remembered()
    for seed, attack in itertools.product(options.seeds, options.attacks):
        images, labels = load_sample(options.data, "train")
        if options.dev:
            images, labels = others.images[4000 * seed :][:4000], others.labels[4000 * seed :][:4000]
        poisoned = made(attack, (images, labels), seed)
        cell = f"{attack}: {seed}"
        purifier = recipes.eclipse("cifar10-fast", sigma=options.sigma) if options.rounds else None
        there = read(options.out).get(cell, {})
        if "found" not in there or not {*options.ways} <= {*there.get("ways", {})}:
            verdict = sanitize.sanitize(
                ArrayDataset(poisoned.images, poisoned.labels),
                purifier,
                reference=reference,
                rounds=max(1, options.rounds),
                train=train,
                progress=False,
            )
            keep(options.out, cell, "found", measured(verdict, poisoned, labels))
            for way in () if options.dev else options.ways:
                if way not in read(options.out)[cell].get("ways", {}):
                    keep(options.out, cell, "ways", {way: trained(way, verdict, poisoned, seed, options.data)})
        print(cell, json.dumps(read(options.out)[cell]), flush=True)


def of_cifar10(root: Path) -> tuple[ArrayDataset, ArrayDataset]:
    """The images that the shipped denoisers learned from; and others, which neither they nor the sample have."""
    whole = torchvision.datasets.CIFAR10(root, train=True)
    labels = np.array(whole.targets)
    order = noise.uniform(noise.image_keys(2026, 0, 0), (len(labels),))[0].argsort(stable=True).numpy()
    learned, others = order[:2000], order[6000:]  # as examples/data says
    return ArrayDataset(whole.data[learned], labels[learned]), ArrayDataset(whole.data[others], labels[others])


def remembered() -> Callable[[DenoisedSet, int], Any]:
    """The default training, which trains on the same images once."""
    train, networks = default_training(torch.device("cpu")), dict[Any, Any]()

    def remember(dataset: DenoisedSet, seed: int) -> Any:
        key = hash((dataset.data.tobytes(), tuple(dataset.targets), seed))
        if key not in networks:
            networks[key] = train(dataset, seed)
        return networks[key]

    return remember


def made(attack: str, clean: tuple[Images, Labels], seed: int) -> Poisoned:
    name, given = ATTACKS[attack]
    return Poisoned.of(*clean, "none", []) if name == "none" else poisons.make(name, clean, seed, **given)


def measured(verdict: Verdict, poisoned: Poisoned, labels: Labels) -> dict[str, Any]:
    """How well the classes and images that were poisoned are found."""
    of_target = poisoned.labels == TARGET
    bad = np.isin(np.arange(len(labels)), poisoned.poisoned) & of_target
    if poisoned.true_labels is not None:  # those of WaNet that keep their label are no poisons
        bad = poisoned.labels != poisoned.true_labels
    suspected = np.isin(np.arange(len(labels)), verdict.suspects)
    z = {kind: [row[kind]["z"] for row in verdict.rows] for kind in verdict.rows[0] if kind in sanitize.evidence.KINDS}
    right = [verdict.corrected.get(i) == labels[i] for i in np.flatnonzero(bad & suspected)]
    return {
        "targets": list(verdict.targets),
        "z": z,
        "poisons": int(bad.sum()),
        "poisons_found": round(float(suspected[bad].mean()), 4) if bad.any() else None,
        "clean_suspected": round(float(suspected[of_target & ~bad].mean()), 4),
        "relabelled_right": round(float(np.mean(right)), 4) if right else None,
    }


def trained(way: str, verdict: Verdict, poisoned: Poisoned, seed: int, data: Path) -> dict[str, float | None]:
    """Accuracy and success in % of a victim of what a way leaves."""
    images, labels = poisoned.images, poisoned.labels.copy()
    rows = np.arange(len(images))
    if way == "suspects dropped":
        rows = verdict.kept
    elif way == "as many at random":
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[len(verdict.suspects) :])
    elif way == "the poisons dropped":
        rows = np.setdiff1d(rows, poisoned.poisoned)
    elif way == "relabelled":
        for index, label in verdict.corrected.items():
            labels[index] = label
    elif way != "as it is":
        purifier: Purifier = recipes.jpeg(10) if way == "JPEG-10" else recipes.eclipse("cifar10-sparse", sigma=0.1)
        images, _ = purify_array(images, labels, purifier)
    victim = train_victim(images[rows], labels[rows], seed=seed, bfloat16=False).model
    test, test_labels = load_sample(data, "test")
    success = None
    if poisoned.trigger is not None:
        others = np.flatnonzero(test_labels != TARGET)
        shown = poisoned.trigger(test[others], others)
        success = round(100 * accuracy(victim, shown, np.full(len(shown), TARGET)), 1)
    return {"accuracy": round(100 * accuracy(victim, test, test_labels), 1), "success": success}


def read(path: Path) -> Results:
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, cell: str, part: str, values: Mapping[str, Any]) -> None:
    with Lock(path.parent, path.stem):  # several processes may write
        results = read(path)
        results.setdefault(cell, {}).setdefault(part, {}).update(values)
        write_text(path, json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def with_tables(text: str, results: Results) -> str:
    """The page with the tables between their markers made from the results."""
    for name, table in (("found", found_table(results)), ("left", left_table(results))):
        text, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", partial(_between, table), text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"The page must have one place for the table {name!r}. Got {count}.")
    return text


def _between(table: str, match: re.Match[str]) -> str:
    return f"{match[1]}{table}\n{match[2]}"


def cells_of(results: Results) -> dict[str, list[Any]]:
    """The cells of all seeds, by attack."""
    return {
        attack: cells
        for attack in ATTACKS
        if (cells := [cell for name, cell in results.items() if name.rpartition(": ")[0] == attack])
    }


def found_table(results: Results) -> str:
    heads = ("attack", "target found, no other", "z of the target", "largest other z", "poisons suspected")
    lines = ["| " + " | ".join([*heads, "clean images of the class suspected", "right label"]) + " |"]
    lines.append("| --- |" + " ---: |" * 6)
    for attack, cells in cells_of(results).items():
        found = [cell["found"] for cell in cells]
        wanted = [] if attack == "none" else [TARGET]
        right = sum(one["targets"] == wanted for one in found)
        z = [one["z"]["reference"] for one in found]
        others = [max(v for i, v in enumerate(row) if i != TARGET or attack == "none") for row in z]
        lines.append(
            f"| {attack} | {right} of {len(found)} | "
            + " | ".join(
                [
                    mean([row[TARGET] for row in z]),
                    f"{max(others):.1f}",
                    percent([one["poisons_found"] for one in found]),
                    percent([one["clean_suspected"] for one in found]),
                    percent([one["relabelled_right"] for one in found]),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def left_table(results: Results) -> str:
    measured = {
        attack: [cell["ways"] for cell in cells if "ways" in cell] for attack, cells in cells_of(results).items()
    }
    measured = {attack: cells for attack, cells in measured.items() if cells}
    ways = [way for way in WAYS if any(way in cell for cells in measured.values() for cell in cells)]
    lines = ["| attack | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for attack, cells in measured.items():
        row = []
        for way in ways:
            values = [cell[way] for cell in cells if way in cell]
            accuracies, success = ([v[key] for v in values if v[key] is not None] for key in ("accuracy", "success"))
            row.append(mean(accuracies) + (f" / {mean(success)}" if success else ""))
        lines.append(f"| {attack} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def percent(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    return f"{mean(known)} %" if known else "–"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--cifar10", type=Path, default=Path("data"), help="folder of torchvision's CIFAR10")
    parser.add_argument("--data", type=Path, default=here / "data")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=0, help="of purification, for the other kinds of evidence")
    parser.add_argument("--sigma", type=float, default=0.2, help="noise of a round, in image units")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dev", action="store_true", help="look at other images than the sample, on which limits were chosen"
    )
    parser.add_argument("--out", type=Path, default=here / "results" / "sanitize.json")
    parser.add_argument("--readme", type=Path, help="write the results into this page's tables, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
