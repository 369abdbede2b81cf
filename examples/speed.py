"""How fast: purifying in images per second, and a loader over the raw data, the cache, and with compensation.

    python examples/speed.py --out examples/results/speed.json
    python examples/speed.py --core --out examples/results/speed_core.json    # one core: networks alone, and JPEG
    python examples/speed.py --core --device cuda                             # the same with the networks on a GPU
    python examples/speed.py --threads        # network calls side by side, beside calls with all threads each

All candidates take turns in one process, several rounds, and the medians are compared: the ratios hold on a
machine whose speed drifts, the absolute numbers are this machine's.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from purifyloader import PurifiedDataset, PurifiedLoader, precompute, pretrained, recipes
from purifyloader.core import noise
from purifyloader.core.devices import computes_bfloat16, kind_of_device
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.purifiers import DenoiseOnce, Purifier
from purifyloader.transforms import Compensate
from purifyloader.victims.networks import resnet9

PURIFIERS: dict[str, tuple[Callable[[], Purifier], int]] = {  # and images a round
    "JPEG-10": (lambda: recipes.jpeg(10), 512),
    "1 call": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=1), 256),
    "1 call, fast": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=1, fast=True), 256),
    "4 calls": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=4), 128),
    "4 calls, fast": (lambda: recipes.eclipse("cifar10-sparse", t=100, steps=4, fast=True), 128),
    "100 calls": (lambda: recipes.eclipse("cifar10-sparse", t=100), 32),
    "100 calls, fast": (lambda: recipes.eclipse("cifar10-sparse", t=100, fast=True), 32),
}


MODELS = ("cifar10-sparse", "cifar10-fast")
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
            if torch.cuda.is_initialized():  # a GPU goes on by itself
                torch.cuda.synchronize()
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def operations(network: torch.nn.Module, side: int) -> float:
    """Count the billions of additions and multiplications of a network on one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, side, side), torch.full((1,), -300.0))
    return counter.get_total_flops() / 1e9


def ceiling(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], int], float]:
    """A convolution as processors like it best, and its billions of operations an image."""
    layer = torch.nn.Conv2d(128, 128, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    x = torch.rand(16 if device.type == "cpu" else 1024, 128, 32, 32, dtype=dtype, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def convolve() -> int:
        with torch.inference_mode():
            return len(layer(x))

    return convolve, 2 * 32 * 32 * layer.weight.numel() / 1e9


def through_pil(images: list[Image.Image]) -> int:
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=10)
        Image.open(stream).load()
    return len(images)


def compare_networks(
    x_BCHW: torch.Tensor, keys_B: torch.Tensor, device: torch.device, rounds: int, out: Path | None
) -> None:
    """Print images a second of purifiers of one network call, of their networks alone, and of JPEG-10 on one core."""
    torch.set_num_threads(1)
    pictures = [transforms.functional.to_pil_image(x) for x in x_BCHW]
    jpeg = recipes.jpeg(10)
    x, keys = x_BCHW.to(device), keys_B.to(device)
    work: dict[str, Callable[[], int]] = {
        "JPEG-10, PIL": lambda: through_pil(pictures),
        "JPEG-10": lambda: len(jpeg(x_BCHW, keys_B)),
    }
    counts: dict[str, float] = {}
    # slower by far where a CPU emulates it
    dtypes = ["float32", *["bfloat16"] * computes_bfloat16(device)]
    batch = BATCH if device.type == "cpu" else len(x)
    for dtype in dtypes:
        work[f"ceiling, {dtype}"], counts[f"ceiling, {dtype}"] = ceiling(getattr(torch, dtype), device)
        for model, compiled in itertools.product(MODELS, (False, True)):
            purifier = DenoiseOnce(pretrained.load(model), 0.1, dtype=dtype, compute_batch=batch, compile=compiled).to(
                device
            )
            name = f"{model}, {dtype}{', compiled' * compiled}"
            count = 64 if device.type == "cpu" and "fast" not in model else len(x)
            work[name] = partial(lambda p, n: len(p(x[:n], keys[:n])), purifier, count)
            if not compiled:
                counts[name] = operations(pretrained.load(model).network, x.shape[-1])
                work[f"{name}, network alone"] = partial(call_network, purifier.denoiser.network, x[:batch], count)
    rates = take_turns(work | around(x_BCHW, device), rounds)
    rows: dict[str, dict[str, float]] = {}
    for name in [name for name in rates if "alone" not in name and "ceiling" not in name]:
        row = {"images_per_second": rates[name], "beside_jpeg": rates[name] / rates["JPEG-10, PIL"]}
        if name in counts:
            alone, top = rates[f"{name}, network alone"], f"ceiling, {name.split(', ')[1]}"
            row |= {"around": 1 - rates[name] / alone, "gflop": counts[name]}
            row["of_ceiling"] = alone * counts[name] / (rates[top] * counts[top])
        rows[name] = {key: round(value, 4) for key, value in row.items()}
    machine = f"{platform.machine()}, {kind_of_device(device)}, 1 thread, torch {torch.__version__}"
    results = {"machine": machine, "one_core": rows}
    print(core_table(results))
    if out:
        write_text(out, json.dumps(results, indent=1) + "\n")


def core_table(results: dict[str, Any]) -> str:
    lines = ["| | images/s | beside JPEG-10 | outside the network | GFLOP an image | of the ceiling |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in results["one_core"].items():
        cells = [f"{row['images_per_second']:,.0f}", f"{row['beside_jpeg']:.2f}"]
        if "gflop" in row:
            cells += [f"{row['around']:.0%}", f"{row['gflop']:.3f}", f"{row['of_ceiling']:.0%}"]
        lines.append(f"| {name} | " + " | ".join([*cells, *["–"] * (5 - len(cells))]) + " |")
    return "\n".join(lines)


def with_table(text: str, results: dict[str, Any]) -> str:
    """A page with the table between its markers made from the results of `--core`."""
    changed, found = re.subn(
        r"(<!-- core -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{core_table(results)}\n{m[2]}", text, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f"The page must have one place for the table 'core'. Got {found}.")
    return changed


def around(x_BCHW: torch.Tensor, device: torch.device) -> dict[str, Callable[[], int]]:
    """The fast model as people use it: on larger images, in a loader, for a cache, and in a training."""
    model = pretrained.load(MODELS[-1])
    purifier = DenoiseOnce(model, 0.1, compute_batch=BATCH).to(device)
    large = torch.nn.functional.interpolate(x_BCHW[:16], size=224, mode="bicubic").clamp(0, 1).to(device)
    whole, keys = DenoiseOnce(model, 0.1, compute_batch=16).to(device), noise.image_keys(0, 0, range(16)).to(device)
    samples = [(x, 0) for x in x_BCHW]
    network = resnet9(10, 16).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    loader = DataLoader(samples, batch_size=128)  # type: ignore[arg-type]

    def train(batches: Iterable[Any]) -> int:
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        return len(samples)

    def fill() -> int:
        with tempfile.TemporaryDirectory() as folder:
            return len(precompute(samples, purifier, folder, progress=False))  # type: ignore[arg-type]

    return {
        f"{MODELS[-1]}, images of 224 px": lambda: len(whole(large, keys)),
        f"{MODELS[-1]}, in a PurifiedLoader": lambda: sum(len(y) for _, y in PurifiedLoader(loader, purifier)),
        f"{MODELS[-1]}, precompute": fill,
        "training a ResNet-9, raw": lambda: train(loader),
        "training a ResNet-9, purified": lambda: train(PurifiedLoader(loader, purifier)),
    }


def call_network(network: torch.nn.Module, x_BCHW: torch.Tensor, count: int) -> int:
    weight = network.stem.weight
    x, time_B = x_BCHW.to(weight.dtype), torch.full((len(x_BCHW),), -300.0, device=weight.device)
    with torch.inference_mode():
        for _ in range(count // len(x)):
            network(x, time_B)
    return count


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
    parser.add_argument("--readme", type=Path, help="write the results of --core in --out into this page, and stop")
    parser.add_argument("--core", action="store_true", help="only compare networks and JPEG on one core")
    parser.add_argument("--device", type=torch.device, default="cpu", help="of the networks of --core")
    parser.add_argument("--threads", action="store_true", help="only compare ways to use the threads of a CPU")
    options = parser.parse_args()
    if options.readme:
        options.readme.write_text(with_table(options.readme.read_text(), json.loads(options.out.read_text())))
        return
    folder = Path(__file__).parent / "data"
    images, _ = load_sample(folder, "train")
    x = torch.from_numpy(images[:512]).permute(0, 3, 1, 2).float() / 255
    keys = noise.image_keys(0, 0, range(512))

    if options.core:
        compare_networks(x, keys, options.device, options.rounds, options.out)
        return
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
