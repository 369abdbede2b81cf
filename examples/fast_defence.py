"""Does a denoiser of a tenth of the arithmetic defend as well, and what does noise that is new in every epoch buy?

    python examples/fast_defence.py                                                 # some hours of a core
    python examples/fast_defence.py --models cifar10-fast --afresh --attacks clean tap
    python examples/fast_defence.py --models cifar10-fast runs/another --sigma 0.07 --attacks clean lsp ar
    python examples/fast_defence.py --readme purifyloader/recipes/README.md

Accuracy in % on 1,000 clean test images of a ResNet-9 of width 16, trained for ten epochs in float32 on 4,000 images
with compensation, by seed. The images are purified in one network call: once, or afresh in every epoch, as
`PurifiedLoader` does it. Finished cells are kept in the file, so a stopped run goes on, several runs may write to it at
once, and attacks are kept in `--work`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from purifyloader import poisons, pretrained, recipes
from purifyloader.bench.applying import compensation, per_epoch_transform, purify_array
from purifyloader.datasets.splits import load_sample
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.files.atomic import write_text
from purifyloader.files.locks import Lock
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.purifiers import Purifier
from purifyloader.transforms import Compensate
from purifyloader.victims.training import BatchTransform, accuracy, train_victim

AFRESH = "in every epoch"
ATTACKS: dict[str, dict[str, Any]] = {
    "clean": {},
    "lsp": {},
    "ar": {},
    **{name: {"bfloat16": False} for name in ("em", "tap", "sep")},
}
ATTACK_SEED = 1000  # as the bench has it


class Row(NamedTuple):
    """A way to purify, as the results name it."""

    model: str  # name, or folder's name
    sigma: float
    drawn: str  # "once" or AFRESH


def main() -> None:
    options = parse_arguments()
    if options.readme:
        options.readme.write_text(with_table(options.readme.read_text(), read(options.out)))
        return
    torch.set_num_threads(options.threads)
    images, labels = load_sample(options.data, "train")
    test = load_sample(options.data, "test")
    for attack, model in itertools.product(options.attacks, options.models):
        poisoned = attacked(attack, images, labels, options.work)
        denoiser = pretrained.load(model)
        row = Row(Path(model).name, options.sigma, AFRESH if options.afresh else "once")
        purifier = recipes.eclipse(denoiser, sigma=row.sigma)
        once: NDArray[np.uint8] | None = None
        for seed in options.seeds:
            if str(seed) in read(options.out)["cells"].get(cell(attack, row), {}):
                continue
            if not options.afresh and once is None:
                once, _ = purify_array(poisoned, labels, purifier)
            shown = poisoned if once is None else once
            transform = drawn_anew(purifier if options.afresh else None, seed)
            victim = train_victim(shown, labels, seed=seed, batch_transform=transform, bfloat16=False).model
            found = round(100 * accuracy(victim, *test), 1)
            keep(options.out, cell(attack, row), seed, found, {row.model: told(denoiser)})
            print(f"{cell(attack, row)}, seed {seed}: {found:.1f} %", flush=True)


def cell(attack: str, row: Row) -> str:
    return f"{attack}: {row.model} at {row.sigma}, {row.drawn}"


def told(denoiser: Denoiser) -> dict[str, float]:
    """What a denoiser costs, in billions of additions and multiplications an image of 32 x 32 pixels."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(torch.zeros(1, 3, 32, 32), torch.full((1,), 0.1))
    return {"gflop": round(counter.get_total_flops() / 1e9, 4)}


def attacked(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], work: Path) -> NDArray[np.uint8]:
    """Poison the images, or read what a run before has kept."""
    if name == "clean":
        return images
    path = work / f"{name}.npz"
    work.mkdir(parents=True, exist_ok=True)
    with Lock(work, name):  # another process waits for it, and then reads it
        if not path.exists():
            poisons.write(attacks.make(name, (images, labels), ATTACK_SEED, **ATTACKS[name]), path)
    return poisons.read(path, clean=(images, labels)).images


def drawn_anew(purifier: Purifier | None, seed: int) -> BatchTransform:
    """What is done to a batch after crop and flip, with other draws in every epoch."""
    compensate = compensation(Compensate(), seed)
    if purifier is None:
        return compensate
    purify = per_epoch_transform(purifier, seed)

    def both(x_BCHW: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        return compensate(purify(x_BCHW, index_B, epoch), index_B, epoch)

    return both


def read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(path.read_text()) if path.exists() else {"cells": {}, "models": {}}


def keep(path: Path, name: str, seed: int, value: float, models: dict[str, dict[str, float]]) -> None:
    with Lock(path.parent, path.stem):  # several processes may write
        results = read(path)
        results["cells"].setdefault(name, {})[str(seed)] = value
        results["models"] |= models
        write_text(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def with_table(text: str, results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The page with the table between its markers made from the results."""
    cells, models = results["cells"], results["models"]
    rows = {Row(m, float(s), d) for m, s, d in (re.split(" at |, ", name.split(": ")[1]) for name in cells)}
    attacks = [name for name in ATTACKS if any(found.startswith(f"{name}:") for found in cells)]
    lines = ["| model | GFLOP | noise | drawn | " + " | ".join([*attacks, "beside the first"]) + " |"]
    lines.append("| --- | ---: | ---: | --- |" + " ---: |" * (len(attacks) + 1))
    ordered = sorted(rows, key=lambda row: (row.drawn != "once", -models[row.model]["gflop"], -row.sigma))
    for row in ordered:
        found = {name: cells.get(cell(name, row), {}) for name in attacks}
        against = {name: cells.get(cell(name, ordered[0]), {}) for name in attacks}
        difference = "–" if row == ordered[0] else paired(found, against)
        head = [f"`{row.model}`", f"{models[row.model]['gflop']:.3f}", f"{255 * row.sigma:.3g} px", row.drawn]
        lines.append("| " + " | ".join([*head, *map(mean, found.values()), difference]) + " |")
    table = "\n".join(lines)
    return re.sub(
        r"<!-- fast -->\n.*?<!-- end -->", lambda _: f"<!-- fast -->\n{table}\n<!-- end -->", text, flags=re.DOTALL
    )


def mean(values: Mapping[str, float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.1f}{spread}"


def paired(found: Mapping[str, Mapping[str, float]], against: Mapping[str, Mapping[str, float]]) -> str:
    """The mean difference over all trainings of the same attack and seed, with its standard error."""
    both = [
        values[seed] - against[name][seed] for name, values in found.items() for seed in values.keys() & against[name]
    ]
    if len(both) < 2:
        return "–"
    return f"{statistics.fmean(both):+.1f} ± {statistics.stdev(both) / len(both) ** 0.5:.1f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--data", type=Path, default=here / "data")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--models", nargs="+", default=["cifar10-sparse", "cifar10-fast"], help="names or folders")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise, in image units")
    parser.add_argument("--afresh", action="store_true", help="purify in every epoch")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/fast_defence"), help="folder of the attacks")
    parser.add_argument("--out", type=Path, default=here / "results" / "fast_defence.json")
    parser.add_argument("--readme", type=Path, help="write the results into this page's table, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
