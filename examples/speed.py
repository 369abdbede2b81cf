"""How fast: purifying in images per second, and a loader over the raw data, the cache, and with compensation.

    python examples/speed.py --out examples/results/speed.json
    python examples/speed.py --threads        # network calls side by side, beside calls with all threads each

All candidates take turns in one process, several rounds, and the medians are compared: the ratios hold on a
machine whose speed drifts, the absolute numbers are this machine's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from purifyloader import PurifiedDataset, pretrained, recipes
from purifyloader.core import noise
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.purifiers import DenoiseOnce, Purifier
from purifyloader.transforms import Compensate

PURIFIERS: dict[str, tuple[Callable[[], Purifier], int]] = {  # and images a round
    "JPEG-10": (lambda: recipes.jpeg(10), 512),
    "1 call": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=1), 256),
    "1 call, fast": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=1, fast=True), 256),
    "4 calls": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=4), 128),
    "4 calls, fast": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=4, fast=True), 128),
    "100 calls": (lambda: recipes.eclipse("cifar10-sparse", t=100), 32),
    "100 calls, fast": (lambda: recipes.eclipse("cifar10-sparse", t=100, fast=True), 32),
}


BATCH = 32  # images of a network call


class Pictures(ArrayDataset):
    """The sample as torchvision's CIFAR10 would hand it out: PIL, then the user's transform."""

    def __init__(self, folder: Path, transform: Callable | None = None) -> None:
        super().__init__(*load_sample(folder, "train"))
        self.transform = transform

    def __getitem__(self, index: int) -> tuple:
        image = transforms.functional.to_pil_image(self.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def take_turns(work: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median images per second of each, after one round that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, function in work.items():
            start = time.perf_counter()
            images = function()
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def compare_threads(x_BCHW: torch.Tensor, keys_B: torch.Tensor, rounds: int) -> None:
    """Print what it costs that a network call on a CPU has one thread, and several calls run side by side."""
    purifier = DenoiseOnce(pretrained.load("cifar10-sparse"), 0.1, compute_batch=BATCH)

    def call_by_call(count: int) -> int:
        with torch.no_grad():
            for x in x_BCHW[:count].split(BATCH):
                purifier.denoiser(x, torch.full((len(x),), 0.1, dtype=torch.float64))
        return count

    for calls in (1, 2, 8):
        count = calls * BATCH
        work = {
            "side by side": partial(lambda n: len(purifier(x_BCHW[:n], keys_B[:n])), count),
            "all threads in each": partial(call_by_call, count),
        }
        for name, rate in (rates := take_turns(work, rounds)).items():
            ratio = rates["all threads in each"] / rate
            print(f"{calls} calls, {name:>20}: {rate:>8.1f} images/s, {ratio:.2f} of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", action="store_true", help="only compare ways to use the threads of a CPU")
    options = parser.parse_args()
    folder = Path(__file__).parent / "data"
    images, _ = load_sample(folder, "train")
    x = torch.from_numpy(images[:512]).permute(0, 3, 1, 2).float() / 255
    keys = noise.image_keys(0, 0, range(512))

    if options.threads:
        compare_threads(x, keys, options.rounds)
        return

    def purifying(purifier: Purifier, count: int) -> Callable[[], int]:
        return lambda: len(purifier(x[:count], keys[:count]))

    purify = take_turns({n: purifying(make(), count) for n, (make, count) in PURIFIERS.items()}, options.rounds)

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
        ]
    )
    raw = Pictures(folder)
    with tempfile.TemporaryDirectory() as cache:

        def reading(dataset: torch.utils.data.Dataset) -> Callable[[], int]:
            return lambda: sum(len(y) for _, y in DataLoader(dataset, batch_size=128))

        def cached(compensate: Compensate | None) -> PurifiedDataset:
            jpeg = recipes.jpeg(10)  # what filled the cache does not matter for reading it
            return PurifiedDataset(raw, jpeg, compensate, cache, transform=transform, progress=False)

        load = take_turns(
            {
                "raw": reading(Pictures(folder, transform)),
                "cached": reading(cached(None)),
                "cached + compensation": reading(cached(Compensate())),
            },
            options.rounds,
        )
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "purify_images_per_second": purify,
        "load_images_per_second": load,
    }
    print(json.dumps(results, indent=1))
    for rates, base in ((purify, "1 call"), (load, "raw")):
        for name, rate in rates.items():
            print(f"{name:>22}: {rate:>8.1f} images/s, {rate / rates[base]:.3f} of {base}")
    if options.out:
        write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
