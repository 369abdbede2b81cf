"""What each part of ECLIPSE does, over several seeds: tables of purifyloader/recipes/README.md.

    python examples/ablation.py
    python examples/ablation.py --readme purifyloader/recipes/README.md

Every cell is the mean accuracy on 1,000 clean test images of a ResNet-9 of width 16, trained for ten
epochs on 4,000 images. Finished cells are kept in the file, so a stopped run goes on. `--cells` takes a
part of the table, `clean:none,AR:25,AR:25+` for example: a defence is none, jpeg, compensation (both
without a denoiser), a noise level in pixels, or one with compensation (`25+`); `6.37x100` is 100 calls and
`6.37x100f` the same in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader import recipes
from purifyloader.bench.applying import compensation, purify_array
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.poisons import autoregressive, lsp
from purifyloader.transforms import Compensate
from purifyloader.victims.training import accuracy, train_victim

Images = NDArray[np.uint8]

CELLS = {
    "clean": "none jpeg compensation 12.75 12.75+ 25 25+",
    "AR": "none jpeg compensation 6.37 6.37+ 12.75 12.75+ 25 25+ "
    "6.37x1f 6.37x1f+ 6.37x4f 6.37x4f+ 6.37x100f 6.37x100f+",
    "LSP": "none jpeg compensation 6.37 6.37+ 12.75 12.75+ 25 25+ 40 40+",
}


def main() -> None:
    options = parse_arguments()
    if options.readme:
        text = with_tables(options.readme.read_text(), read(options.out), read(options.out.parent / "speed.json"))
        options.readme.write_text(text)
        return
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
        poisoned: Images | None = None
        done: dict[str, Images] = {}
        for defence in defences:
            level, compensated = defence.removesuffix("+"), defence.endswith("+") or defence == "compensation"
            entry = results.setdefault(f"{poison}:{defence}", {"accuracy": {}})
            for seed in range(options.seeds):
                if str(seed) in entry["accuracy"]:
                    continue
                if poisoned is None:
                    poisoned = poisons[poison]()
                if level not in done:
                    done[level] = prepare(level, poisoned, labels, options.model)
                victim, seconds = train_victim(
                    done[level],
                    labels,
                    seed=seed,
                    batch_transform=compensation(Compensate(), seed) if compensated else None,
                )
                entry["accuracy"][str(seed)] = round(100 * accuracy(victim, test_images, test_labels), 2)
                print(
                    f"{poison}:{defence} seed {seed}: {entry['accuracy'][str(seed)]:.1f} ({seconds:.0f} s)", flush=True
                )
                # another process may be filling other cells of the same file
                merged = {**read(options.out), f"{poison}:{defence}": entry}
                write_text(options.out, json.dumps(dict(sorted(merged.items())), indent=1) + "\n")


def prepare(level: str, poisoned: Images, labels: NDArray[np.int64], model: str) -> Images:
    """The training images as a defence leaves them, before compensation."""
    if level in ("none", "compensation"):
        return poisoned
    if level == "jpeg":
        return purify_array(poisoned, labels, recipes.jpeg(10)).images
    pixels, _, steps = level.removesuffix("f").partition("x")
    # 6.37 px is the published timestep, t = 100 of the cosine schedule
    where: dict[str, Any] = {"t": 100} if pixels == "6.37" else {"sigma": float(pixels) / 255}
    purifier = recipes.eclipse(model, **where, steps=int(steps or 1), fast=level.endswith("f"))
    return purify_array(poisoned, labels, purifier, progress=level).images


def cell(results: dict[str, Any], name: str) -> str:
    """Mean and, over several seeds, standard deviation."""
    if name not in results:
        return "–"
    values = list(results[name]["accuracy"].values())
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(text: str, results: dict[str, Any], speed: dict[str, Any]) -> str:
    """The README with the tables between its markers made from the results of this script and speed.py."""
    defences = {
        "none": "none",
        "JPEG-10": "jpeg",
        "compensation only": "compensation",
        "purified only": "12.75",
        "**ECLIPSE**": "12.75+",
    }
    parts = [[p, *(cell(results, f"{p}:{d}") for d in defences.values())] for p in CELLS]
    levels = ["6.37", "12.75", "25", "40"]
    noise = [[f"{v} px", *(cell(results, f"{p}:{v}{s}") for p in CELLS for s in ("", "+"))] for v in levels]
    rates = speed.get("purify_images_per_second", {})
    names = {"1": "1 call", "4": "4 calls", "100": "100 calls"}
    calls = [
        [
            n,
            *(cell(results, f"AR:6.37x{n}f{s}") for s in ("", "+")),
            *(str(rates.get(name + suffix, "–")) for suffix in ("", ", fast")),
        ]
        for n, name in names.items()
    ]
    tables = {
        "parts": table(["training data", *defences], parts),
        "noise": table(["noise", *(f"{p}, {w}" for p in CELLS for w in ("purified", "ECLIPSE"))], noise),
        "calls": table(
            ["network calls at 6.37 px", "AR, purified", "AR, ECLIPSE", "images/s", "images/s, `fast=True`"], calls
        ),
    }
    for name, made in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"The README must have one place for the table {name!r}. Got {found}.")
    return text


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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ablation.json")
    parser.add_argument("--readme", type=Path, help="write the results into this file's tables, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
