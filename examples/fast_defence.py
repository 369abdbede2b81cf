"""Does a denoiser of a tenth of the arithmetic defend as well, and what does noise that is new in every epoch buy?

    python examples/fast_defence.py                        # some hours of a core; several may run at once
    python examples/fast_defence.py --readme purifyloader/recipes/README.md

Accuracy in % on 1,000 clean test images of a ResNet-9 of width 16, trained for ten epochs in float32 on 4,000 images
with compensation, by seed. The images are purified at 25 px in one network call: once, by `cifar10-sparse` and by
`cifar10-fast`, or by `cifar10-fast` afresh in every epoch, as `PurifiedLoader` does it. Finished cells are kept in the
file, so a stopped run goes on, and attacks are kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader import poisons, recipes
from purifyloader.bench.applying import compensation, per_epoch_transform, purify_array
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.files.locks import Lock
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.transforms import Compensate
from purifyloader.victims.training import BatchTransform, accuracy, train_victim

SIGMA = 0.1
WAYS = {
    "cifar10-sparse": "`cifar10-sparse`, once",
    "cifar10-fast": "`cifar10-fast`, once",
    "afresh": "`cifar10-fast`, in every epoch",
}
ATTACKS: dict[str, dict[str, Any]] = {
    "clean": {},
    "lsp": {},
    "ar": {},
    **{name: {"bfloat16": False} for name in ("em", "tap", "sep")},
}
ATTACK_SEED = 1000  # as the bench has it
Results = dict[str, dict[str, float]]


def main() -> None:
    options = parse_arguments()
    if options.readme:
        options.readme.write_text(with_table(options.readme.read_text(), read(options.out)))
        return
    torch.set_num_threads(options.threads)
    images, labels = load_sample(options.data, "train")
    test = load_sample(options.data, "test")
    for attack in options.attacks:
        poisoned = attacked(attack, images, labels, options.work)
        for way in options.ways:
            once: NDArray[np.uint8] | None = None
            for seed in options.seeds:
                if str(seed) in read(options.out).get(f"{attack}:{way}", {}):
                    continue
                if way != "afresh" and once is None:
                    once, _ = purify_array(poisoned, labels, recipes.eclipse(way, sigma=SIGMA))
                shown = poisoned if once is None else once
                victim = train_victim(
                    shown, labels, seed=seed, batch_transform=transform(way, seed), bfloat16=False
                ).model
                found = round(100 * accuracy(victim, *test), 1)
                keep(options.out, f"{attack}:{way}", seed, found)
                print(f"{attack:6} {WAYS[way]:32} seed {seed}: {found:.1f} %", flush=True)


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


def transform(way: str, seed: int) -> BatchTransform:
    """What is done to a batch after crop and flip, drawn anew in every epoch."""
    compensate = compensation(Compensate(), seed)
    if way != "afresh":
        return compensate
    purify = per_epoch_transform(recipes.eclipse("cifar10-fast", sigma=SIGMA), seed)

    def both(x_BCHW: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        return compensate(purify(x_BCHW, index_B, epoch), index_B, epoch)

    return both


def read(path: Path) -> Results:
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, cell: str, seed: int, value: float) -> None:
    with Lock(path.parent, path.stem):  # several processes may write
        results = read(path)
        results.setdefault(cell, {})[str(seed)] = value
        write_text(path, json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def with_table(text: str, results: Mapping[str, Mapping[str, float]]) -> str:
    """The page with the table between its markers made from the results."""
    names = [name for name in ATTACKS if f"{name}:cifar10-sparse" in results]
    lines = ["| purified by | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for way, words in WAYS.items():
        cells = [mean(results.get(f"{name}:{way}", {})) for name in names]
        if {*cells} == {"–"}:
            continue
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return re.sub(
        r"<!-- fast -->\n.*?<!-- end -->", lambda _: f"<!-- fast -->\n{table}\n<!-- end -->", text, flags=re.DOTALL
    )


def mean(values: Mapping[str, float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.1f}{spread}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--data", type=Path, default=here / "data")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/fast_defence"), help="folder of the attacks")
    parser.add_argument("--out", type=Path, default=here / "results" / "fast_defence.json")
    parser.add_argument("--readme", type=Path, help="write the results into this page's table, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
