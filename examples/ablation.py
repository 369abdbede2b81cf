"""What each part of ECLIPSE does, over several seeds: the table of the README.

    python examples/ablation.py --seeds 3 --out examples/results/ablation.json

Every cell is the mean accuracy on 1,000 clean test images of a ResNet-9 of width 16, trained for ten
epochs on 4,000 images. Finished cells are kept in the file, so a stopped run goes on. `--cells` takes a
part of the table, `clean:none,AR:25,AR:25+` for example: a defence is none, jpeg, compensation (both
without a denoiser), a noise level in pixels, or one with compensation (`25+`); `6.37x100` is 100 calls and
`6.37x100f` the same in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader import recipes
from purifyloader.bench.defence import Purified, compensation, purify_array
from purifyloader.bench.sample import load_sample
from purifyloader.bench.training import accuracy, train_victim
from purifyloader.files import write_text
from purifyloader.poisons import autoregressive, lsp
from purifyloader.transforms import Compensate

Images = NDArray[np.uint8]

CELLS = {
    "clean": "none jpeg compensation 12.75 12.75+ 25 25+",
    "AR": "none jpeg compensation 6.37 6.37+ 12.75 12.75+ 25 25+",
    "LSP": "none jpeg compensation 6.37 6.37+ 12.75 12.75+ 25 25+ 40 40+",
}


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    here = Path(__file__).parent
    images, labels = load_sample(here / "data", "train")
    test_images, test_labels = load_sample(here / "data", "test")
    poisons: dict[str, Callable[[], Images]] = {
        "clean": lambda: images,
        "AR": lambda: autoregressive(images, labels),
        "LSP": lambda: lsp(images, labels),
    }
    results = read(options.out)
    for poison, defences in wanted(options.cells).items():
        poisoned = poisons[poison]()
        done: dict[str, Purified] = {}
        for defence in defences:
            level, compensated = defence.removesuffix("+"), defence.endswith("+") or defence == "compensation"
            cell = results.setdefault(f"{poison}:{defence}", {"accuracy": {}})
            for seed in range(options.seeds):
                if str(seed) in cell["accuracy"]:
                    continue
                if level not in done:
                    done[level] = prepare(level, poisoned, labels, options.model)
                    cell["purify_images_per_second"] = round(len(images) / done[level].seconds, 1)
                victim, seconds = train_victim(
                    done[level].images,
                    labels,
                    seed=seed,
                    batch_transform=compensation(Compensate(), seed) if compensated else None,
                )
                cell["accuracy"][str(seed)] = round(100 * accuracy(victim, test_images, test_labels), 2)
                print(
                    f"{poison}:{defence} seed {seed}: {cell['accuracy'][str(seed)]:.1f} ({seconds:.0f} s)", flush=True
                )
                # another process may be filling other cells of the same file
                merged = {**read(options.out), f"{poison}:{defence}": cell}
                write_text(options.out, json.dumps(dict(sorted(merged.items())), indent=1) + "\n")


def prepare(level: str, poisoned: Images, labels: NDArray[np.int64], model: str) -> Purified:
    if level in ("none", "compensation"):
        return Purified(poisoned, float("inf"))
    if level == "jpeg":
        return purify_array(poisoned, labels, recipes.jpeg(10))
    pixels, _, steps = level.removesuffix("f").partition("x")
    # 6.37 px is the published timestep, t = 100 of the cosine schedule
    where: dict[str, Any] = {"t": 100} if pixels == "6.37" else {"sigma": float(pixels) / 255}
    return purify_array(
        poisoned, labels, recipes.eclipse(model, **where, steps=int(steps or 1), fast=level[-1] == "f"), progress=level
    )


def wanted(cells: str | None) -> dict[str, list[str]]:
    if cells is None:
        return {poison: names.split() for poison, names in CELLS.items()}
    chosen: dict[str, list[str]] = {}
    for cell in cells.split(","):
        poison, _, defence = cell.partition(":")
        if poison not in CELLS or not defence:
            raise SystemExit(f"A cell is POISON:DEFENCE with a poison of {', '.join(CELLS)}. Got {cell!r}.")
        chosen.setdefault(poison, []).append(defence)
    return chosen


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", help="part of the table (default: all of it)")
    parser.add_argument("--model", default="cifar10-sparse")
    parser.add_argument("--threads", type=int, help="of this process")
    parser.add_argument("--out", type=Path, default=Path("ablation.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
