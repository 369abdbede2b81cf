"""A poison ruins training on real images, and ECLIPSE brings the accuracy back: a table and a picture.

    python examples/quickstart.py

Eight minutes on two CPU cores: as many networks are trained at a time as there are cores. 4,000 CIFAR-10
images are poisoned twice: with AR, a pattern of high frequencies, and with LSP, one of low frequencies. The
same small network is trained on each of them bare, after JPEG-10, with compensation only (grayscale and
noise, fresh in every epoch), purified only (noise, then one call of a denoiser that saw 2,000 other images)
and with both, which is ECLIPSE. Accuracy is on 1,000 clean test images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader import pretrained, recipes
from purifyloader.bench.applying import compensation, purify_array
from purifyloader.core import noise
from purifyloader.datasets.splits import load_sample
from purifyloader.poisons import autoregressive, lsp
from purifyloader.transforms import Compensate
from purifyloader.victims.presets import TRAININGS
from purifyloader.victims.training import accuracy, train_victim

Images = NDArray[np.uint8]

DEFENCES = ("none", "JPEG-10", "compensation only", "purified only", "ECLIPSE")
COMPENSATED = ("compensation only", "ECLIPSE")


def main() -> None:
    options = parse_arguments()
    import matplotlib.figure  # noqa: F401  # now, and not after minutes of training

    options.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    images, labels = (a[: options.images] for a in load_sample(options.data, "train"))
    test_images, test_labels = load_sample(options.data, "test")
    sigma = options.sigma_px / 255
    purifier = recipes.eclipse(options.model, sigma=sigma, steps=options.steps)

    poisons: dict[str, Callable[[], Images]] = {
        "clean": lambda: images,
        "AR": lambda: autoregressive(images, labels),
        "LSP": lambda: lsp(images, labels),
    }
    print(f"{len(images):,} training images, {len(test_images):,} clean test images, seed {options.seed}.")
    print(f"Purifying at {options.sigma_px:g} px in {options.steps} network call(s) an image.\n")

    variants: dict[str, tuple[Images, ...]] = {}
    seconds = 0.0
    for poison, make in poisons.items():
        poisoned = make()
        purified, took = purify_array(poisoned, labels, purifier, progress=f"purifying {poison}")
        squeezed, _ = purify_array(poisoned, labels, recipes.jpeg(10))
        variants[poison] = (poisoned, squeezed, poisoned, purified, purified)
        seconds += took
    count = len(images) * len(poisons)
    print(f"Purified {count:,} images in {seconds:.0f} s: {count / seconds:.0f} images/s.")
    table = train_all(variants, labels, test_images, test_labels, options)
    explain(table)
    print(f"\nAll: {time.perf_counter() - start:.0f} s.")
    shown = {poison: (row[0], row[-1]) for poison, row in variants.items()}
    draw(options.out, images, shown, sigma, table, options.sigma_px)
    print(f"Picture: {options.out}")


def train_all(
    variants: dict[str, tuple[Images, ...]],
    labels: NDArray[np.int64],
    test_images: Images,
    test_labels: NDArray[np.int64],
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Train a network on every poison after every defence, several at a time, and print its accuracy in %."""
    start = time.perf_counter()
    print(f"\n{'training data':<15}" + "".join(f"{name:>19}" for name in DEFENCES))
    table: dict[str, dict[str, float]] = {}
    pool: Executor = ThreadPoolExecutor(1)
    if options.processes > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(options.processes, spawn, torch.set_num_threads, (1,))
    with pool:
        cells = {
            (poison, defence): pool.submit(
                train, images, labels, test_images, test_labels, defence in COMPENSATED, options
            )
            for poison, row in variants.items()
            for defence, images in zip(DEFENCES, row, strict=True)
        }
        for poison in variants:
            print(f"{poison:<15}", end="", flush=True)
            table[poison] = {}
            for defence in DEFENCES:
                table[poison][defence], seconds = cells[poison, defence].result()
                print(f"{table[poison][defence]:>11.1f} ({seconds:>3.0f} s)", end="", flush=True)
            print()
    print(f"Trained {len(cells)} networks, {options.processes} at a time, in {time.perf_counter() - start:.0f} s.")
    return table


def train(
    images: Images,
    labels: NDArray[np.int64],
    test_images: Images,
    test_labels: NDArray[np.int64],
    compensated: bool,
    options: argparse.Namespace,
) -> tuple[float, float]:
    """Train one network; returns its accuracy in % and the seconds of its training."""
    victim, seconds = train_victim(
        images,
        labels,
        replace(TRAININGS["short"], epochs=options.epochs),
        width=options.width,
        seed=options.seed,
        batch_transform=compensation(Compensate(), options.seed) if compensated else None,
        bfloat16=False,  # which a CPU without it computes eight times as slowly
    )
    return 100 * accuracy(victim, test_images, test_labels), seconds


def explain(table: dict[str, dict[str, float]]) -> None:
    ar, low, clean = table["AR"], table["LSP"], table["clean"]
    print(
        f"\nAgainst AR, purification: {ar['none']:.0f} -> {ar['purified only']:.0f} % (compensation alone "
        f"{ar['compensation only']:.0f} %). Against LSP, compensation: {low['none']:.0f} -> "
        f"{low['compensation only']:.0f} % (purification alone {low['purified only']:.0f} %).\n"
        f"ECLIPSE does both: {ar['ECLIPSE']:.0f} and {low['ECLIPSE']:.0f} %. Its price on clean data: "
        f"{clean['none']:.0f} -> {clean['ECLIPSE']:.0f} %."
    )


def draw(
    out: Path,
    clean: Images,
    shown: dict[str, tuple[Images, Images]],
    sigma: float,
    table: dict[str, dict[str, float]],
    sigma_px: float,
) -> None:
    """One image of each poison in every state, and the accuracies as bars."""
    from matplotlib.figure import Figure

    index = min(17, len(clean) - 1)  # a horse
    titles = (
        "clean",
        "poison ×10",
        "poisoned",
        f"noised ({sigma_px:g} px)",
        "purified",
        "left of poison ×10\npurified − purified clean",
        "error ×3\npurified − clean",
        "change ×3\npurified − poisoned",
    )

    def difference(a: Images, b: Images, factor: float = 10) -> NDArray[np.float64]:
        return np.clip(0.5 + factor * (a.astype(np.float64) - b) / 255, 0, 1)

    figure = Figure(figsize=(14, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    axes = top.subplots(2, len(titles))
    for row, poison in zip(axes, ("AR", "LSP"), strict=True):
        poisoned, purified = (a[index] for a in shown[poison])
        x = torch.from_numpy(poisoned).permute(2, 0, 1).float() / 255
        key = noise.fold_in(noise.image_keys(0, 0, index), 0)  # the very noise that was purified away
        noised = (x + sigma * noise.normal(key, x.shape)[0]).clamp(0, 1).permute(1, 2, 0).numpy()
        states = (
            clean[index],
            difference(poisoned, clean[index]),
            poisoned,
            noised,
            purified,
            difference(purified, shown["clean"][1][index]),  # both washed with the same noise
            difference(purified, clean[index], 3),
            difference(purified, poisoned, 3),
        )
        for axis, state, title in zip(row, states, titles, strict=True):
            axis.imshow(state, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if poison == "AR":
                axis.set_title(title, fontsize=10)
        row[0].set_ylabel(poison, fontsize=13, rotation=0, labelpad=22, va="center")

    axis = bottom.subplots()
    colours = ("#9aa0a6", "#f2b134", "#7fb7be", "#5b8def", "#1a3f8f")
    for k, (defence, colour) in enumerate(zip(DEFENCES, colours, strict=True)):
        heights = [table[poison][defence] for poison in table]
        bars = axis.bar(np.arange(len(table)) + 0.16 * (k - 2), heights, 0.15, color=colour, label=defence)
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
    axis.set_xticks(
        range(len(table)), [f"trained on {p} images" if p == "clean" else f"trained on {p} poison" for p in table]
    )
    axis.set(ylabel="accuracy on clean test images (%)", ylim=(0, 82))
    axis.axhline(10, color="#cccccc", lw=0.8, zorder=0)
    axis.text(-0.5, 10.8, "chance", color="#888888", fontsize=8)
    axis.legend(ncols=len(DEFENCES), frameon=False, loc="upper center")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    shipped = ", ".join(pretrained.available("denoiser"))
    parser.add_argument("--model", default="cifar10-sparse", help=f"one of {shipped}, or a folder")
    parser.add_argument("--sigma-px", type=float, default=12.75, help="noise of the purification on the 0-255 scale")
    parser.add_argument("--steps", type=int, default=1, help="network calls an image")
    parser.add_argument("--images", type=int, help="take only the first of the training images")
    parser.add_argument("--width", type=int, default=8, help="of the ResNet-9 that is trained")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="networks that are trained at a time")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
