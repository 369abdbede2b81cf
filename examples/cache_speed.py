"""How fast a cache reads, against the raw torchvision dataset and against plain arrays.

    python examples/cache_speed.py --out examples/results/cache_speed.json

50,000 images of 32 x 32 in torchvision's own CIFAR10 class (the sample of examples/data, over and over:
what the pixels are does not matter for reading them), and the cache that `purifyloader.precompute` makes of
them. All candidates take turns in one process, every image once a turn in a shuffled order, several turns,
and medians are compared: the ratios hold on a machine whose speed drifts, the absolute numbers are this
machine's.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10

import purifyloader
from purifyloader import PurifiedDataset, recipes
from purifyloader.cache import CacheReader
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text

BATCH = 128
PAIRS = {  # what to divide by what, for people
    "PIL items": ("raw: PIL items", "cache: PIL items"),
    "tensor items": ("raw: tensor items", "cache: tensor items"),
    "__getitems__": ("raw: tensor items", "cache: __getitems__"),
    "loader": ("raw: loader, 0 workers", "cache: loader, 0 workers"),
    "loader, 2 workers": ("raw: loader, 2 workers", "cache: loader, 2 workers"),
    "loader, whole batches": ("raw: loader, 0 workers", "cache: loader over whole batches"),
    "bytes": ("plain gather", "cache: batch of bytes"),
    "bytes in memory": ("plain gather", "cache in memory: batch of bytes"),
    "bytes against a copy": ("memory copy", "cache: batch of bytes"),
}
ROWS = {  # how the README calls them
    "PIL items": ("one PIL image at a time", "`CIFAR10`"),
    "tensor items": ("one float tensor at a time", "`CIFAR10`, `ToTensor`"),
    "__getitems__": ("`__getitems__`, 128 float tensors", "one at a time"),
    "loader": ("`DataLoader`, batches of 128 float tensors", "`DataLoader(CIFAR10)`"),
    "loader, 2 workers": ("the same with 2 workers", "the same with 2 workers"),
    "loader, whole batches": ("`DataLoader` over a `BatchSampler`", "`DataLoader(CIFAR10)`"),
    "bytes": ("`CacheReader.batch`, 128 images of bytes", "numpy's gather of the same"),
    "bytes in memory": ("the same, `in_memory=True`", "numpy's gather of the same"),
    "bytes against a copy": ("`CacheReader.batch`", "a copy of the same bytes in a row"),
}


class Order(Sampler[int]):
    """The same shuffled order for all."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def as_torchvision(images: np.ndarray, labels: np.ndarray, transform: Callable | None) -> CIFAR10:
    """torchvision's class over arrays; its constructor wants the original files."""
    dataset = CIFAR10.__new__(CIFAR10)
    super(CIFAR10, dataset).__init__("memory", transform=transform)
    dataset.train, dataset.data, dataset.targets = True, images, labels.tolist()
    dataset.classes = [str(i) for i in range(10)]
    return dataset


def take_turns(work: dict[str, Callable[[], Any]], images: int, turns: int) -> dict[str, float]:
    """Median images per second of each, after one turn that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
    return {name: round(statistics.median(values)) for name, values in rates.items()}


def with_tables(text: str, results: dict[str, Any]) -> str:
    """The README with the table between its markers made from the results of this script."""
    rates, ratios = results["images_per_second"], results["ratios"]
    lines = [
        "| read as | compared with | images/s, those | images/s, cache | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {other} | {rates[a]:,} | {rates[b]:,} | {ratios[key]:.2f} |"
        for key, (name, other) in ROWS.items()
        for a, b in [PAIRS[key]]
    ]
    pattern = r"(<!-- reading -->\n).*?(<!-- end -->)"
    made = "\n".join(lines)
    text, found = re.subn(pattern, lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"The README must have one place for the table 'reading'. Got {found}.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--readme", type=Path, help="write the results in --out into this file's table, and stop")
    options = parser.parse_args()
    if options.readme:
        text = with_tables(options.readme.read_text(), json.loads(options.out.read_text()))
        options.readme.write_text(text)
        return
    sample, labels = load_sample(Path(__file__).parent / "data", "train")
    chosen = np.arange(options.images) % len(sample)
    images, labels = sample[chosen], labels[chosen]
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    to_tensor = transforms.ToTensor()

    with tempfile.TemporaryDirectory() as folder:
        purifyloader.precompute(as_torchvision(images, labels, None), recipes.jpeg(), folder, progress=False)

        def raw(transform: Callable | None) -> CIFAR10:
            return as_torchvision(images, labels, transform)

        def cache(transform: Callable | None) -> PurifiedDataset:
            return PurifiedDataset(raw(transform), recipes.jpeg(), cache=folder, check_source=False, progress=False)

        def items(dataset: Dataset) -> Callable[[], None]:
            def read() -> None:
                for i in order:
                    dataset[i]

            return read

        def loader(dataset: Dataset, workers: int, whole: bool = False) -> Callable[[], None]:
            sampler = Order(order)
            if whole:  # a list of indices at a time, which the dataset answers with a batch
                made = DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, BATCH, False))
            else:
                made = DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)

            def read() -> None:
                for x, _ in made:
                    assert x.dtype in (torch.float32, torch.uint8)

            return read

        reader, resident = CacheReader(folder), CacheReader(folder, in_memory=True)
        cached, floats = cache(to_tensor), torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        arrays = [np.array(b) for b in batches]
        target = np.empty((BATCH, 32, 32, 3), np.uint8)

        def each(function: Callable, arguments: list) -> Callable[[], None]:
            def read() -> None:
                for argument in arguments:  # keeping no result, for memory would be what is measured
                    function(argument)

            return read

        def copy_batches() -> None:
            for i in range(0, len(images), BATCH):
                part = images[i : i + BATCH]
                np.copyto(target[: len(part)], part)

        rates = take_turns(
            {
                "raw: PIL items": items(raw(None)),
                "cache: PIL items": items(cache(None)),
                "raw: tensor items": items(raw(to_tensor)),
                "cache: tensor items": items(cached),
                "cache: __getitems__": each(cached.__getitems__, batches),
                "raw: loader, 0 workers": loader(raw(to_tensor), 0),
                "cache: loader, 0 workers": loader(cached, 0),
                "cache: loader over whole batches": loader(cached, 0, whole=True),
                "raw: loader, 2 workers": loader(raw(to_tensor), 2),
                "cache: loader, 2 workers": loader(cached, 2),
                "loader over float tensors in memory": loader(TensorDataset(floats, torch.from_numpy(labels)), 0),
                "plain gather": each(images.__getitem__, arrays),
                "cache: batch of bytes": each(reader.batch, batches),
                "cache in memory: batch of bytes": each(resident.batch, batches),
                "memory copy": copy_batches,
            },
            len(images),
            options.turns,
        )
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "images": len(images),
        "images_per_second": rates,
        "ratios": {name: round(rates[b] / rates[a], 2) for name, (a, b) in PAIRS.items()},
    }
    for name, rate in rates.items():
        print(f"{name:>46}: {rate:>11,} images/s")
    for name, ratio in results["ratios"].items():
        print(f"{name:>46}: {ratio:.2f} times")
    if options.out:
        write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
