"""What each way into a training script costs: samples per second of a loader, and its share of a training step.

    python examples/loader_speed.py --out examples/results/loader_speed.json
    python examples/loader_speed.py --readme transforms/README.md

Three comparisons, each within one process and in turns, medians of some rounds: the ratios hold on a machine whose
speed drifts, the absolute numbers are this machine's.

loader      a DataLoader of the sample as PIL images with crop, flip and normalisation, and the same with one line more
step        a training step of ResNet-18 on batches of 128, and what comes before it
compensate  a batch of 128 of 32 x 32 pixels through our compensation, and through two of kornia's augmentations
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.models import resnet18
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, PurifiedLoader, recipes
from purifyloader.datasets.arrays import ArrayDataset
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.transforms import Compensate, Purify, RandomCompensate, Squeeze
from purifyloader.victims.training import CIFAR_MEAN, CIFAR_STD

PARTS = ("loader", "step", "compensate")
BATCH = 128
MODEL = "cifar10-sparse"
AUGMENT = (v2.RandomCrop(32, 4), v2.RandomHorizontalFlip())
TO_TENSOR = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
NORMALIZE = v2.Normalize(CIFAR_MEAN, CIFAR_STD)


class Pictures(ArrayDataset):
    """The sample as torchvision's CIFAR10 would hand it out: PIL, then the user's transform."""

    def __init__(self, folder: Path, transform: Callable[[Any], Any] | None = None) -> None:
        super().__init__(*load_sample(folder, "train"))
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = v2.functional.to_pil_image(self.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def main() -> None:
    options = parse_arguments()
    if options.readme:
        results = json.loads(options.out.read_text())
        options.readme.write_text(with_tables(options.readme.read_text(), results))
        return
    device = torch.device(options.device)
    parts: dict[str, Callable[[], Any]] = {
        "loader": lambda: loaders(options.images, options.workers, options.rounds, device),
        "step": lambda: steps(options.rounds, device),
        "compensate": lambda: compensations(options.rounds, device),
    }
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = {**before, "machine": machine(device), **{part: parts[part]() for part in options.parts}}
    print(json.dumps(results, indent=1))
    write_text(options.out, json.dumps(results, indent=1) + "\n")


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {name}, torch {torch.__version__.partition('+')[0]}"


# -- a loader ---------------------------------------------------------------------------------------------


def loaders(count: int, workers: Sequence[int], rounds: int, device: torch.device) -> dict[str, Any]:
    """Samples per second of whole epochs, by what is added and by the number of workers."""
    folder = Path(__file__).parent / "data"
    plain = v2.Compose([*AUGMENT, *TO_TENSOR, NORMALIZE])
    eclipse = recipes.eclipse(MODEL, sigma=0.05)

    def transformed(*front: Any, middle: Sequence[Any] = ()) -> Any:
        return Subset(Pictures(folder, v2.Compose([*front, *AUGMENT, *TO_TENSOR, *middle, NORMALIZE])), range(count))

    raw = Subset(Pictures(folder, plain), range(count))
    with tempfile.TemporaryDirectory() as cache:

        def stored(compensate: Compensate | None) -> PurifiedDataset:
            jpeg = recipes.jpeg(10)  # what filled the cache does not matter for reading it
            source = Subset(Pictures(folder), range(count))
            return PurifiedDataset(source, jpeg, compensate, cache, transform=plain, progress=False)

        cached, compensated = stored(None), stored(Compensate())
        datasets: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "nothing": (raw, _as_it_is),
            "cache": (cached, _as_it_is),
            "cache, compensated in the dataset": (compensated, _as_it_is),
            "cache, compensated in the loader": (
                cached,
                lambda it: PurifiedLoader(it, None, device, compensate=Compensate(), normalize=(CIFAR_MEAN, CIFAR_STD)),
            ),
            "Compensate": (transformed(middle=[Compensate()]), _as_it_is),
            "Squeeze('grayscale')": (transformed(Squeeze("grayscale")), _as_it_is),
            "Squeeze('bit_depth')": (transformed(Squeeze("bit_depth")), _as_it_is),
            "Squeeze('jpeg')": (transformed(Squeeze("jpeg")), _as_it_is),
            "Squeeze('coin')": (transformed(Squeeze("coin")), _as_it_is),
            "PurifiedLoader, jpeg": (
                raw,
                lambda it: PurifiedLoader(it, recipes.jpeg(10), device, normalize=(CIFAR_MEAN, CIFAR_STD)),
            ),
            "PurifiedLoader, eclipse": (
                raw,
                lambda it: PurifiedLoader(it, eclipse, device, normalize=(CIFAR_MEAN, CIFAR_STD)),
            ),
            # one at a time: a few do
            "Purify(eclipse)": (Subset(transformed(Purify(eclipse)), range(max(1, count // 32))), _as_it_is),
        }
        found: dict[str, Any] = {}
        for number in workers:
            work = {}
            for name, (dataset, wrapped) in datasets.items():
                options = {"persistent_workers": True, "prefetch_factor": 2} if number else {}
                loader = wrapped(DataLoader(dataset, BATCH, num_workers=number, **options))
                work[name] = _epoch(loader, device)
            found[str(number)] = take_turns(work, rounds)
    return found


def _as_it_is(loader: Any) -> Any:
    return loader


def _epoch(loader: Any, device: torch.device) -> Callable[[], int]:
    def epoch() -> int:
        count = 0
        for images, _ in loader:
            count += len(images.to(device, non_blocking=True))
        _finish(device)
        return count

    return epoch


# -- a training step --------------------------------------------------------------------------------------


def cifar_resnet18() -> nn.Module:
    """ResNet-18 as it is used on 32 x 32 pixels: a 3 x 3 stem without pooling."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def steps(rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step that takes its batch from each kind of loader, and the share that is not the step."""
    images = torch.rand(BATCH, 3, 32, 32)
    batches = [(images, torch.arange(BATCH) % 10)] * 4
    model = cifar_resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    compensate = RandomCompensate().to(device)

    def training(loader: Any, augment: Callable[[Tensor], Tensor] | None = None) -> Callable[[], int]:
        def run() -> int:
            for x, y in loader:
                x = x.to(device, non_blocking=True)
                x = x if augment is None else augment(x)
                loss = nn.functional.cross_entropy(model(x), y.to(device, non_blocking=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            _finish(device)
            return len(batches)

        return run

    work = {
        "nothing": training(batches),
        "RandomCompensate": training(batches, compensate),
        "PurifiedLoader, eclipse": training(PurifiedLoader(batches, recipes.eclipse(MODEL, sigma=0.05), device)),
        "PurifiedLoader, eclipse, fast": training(
            PurifiedLoader(batches, recipes.eclipse(MODEL, sigma=0.05, fast=True), device)
        ),
    }
    taken = {name: 1000 / rate for name, rate in take_turns(work, rounds).items()}
    shares = {f"share of {name}": 1 - taken["nothing"] / taken[name] for name in taken if name != "nothing"}
    return {name: round(value, 3 if name.startswith("share") else 1) for name, value in {**taken, **shares}.items()}


def compensations(rounds: int, device: torch.device) -> dict[str, float]:
    """Images per second of a batch already on the device."""
    x = torch.rand(BATCH, 3, 32, 32, device=device)
    chained = nn.Sequential(K.RandomGrayscale(p=0.4), K.RandomGaussianNoise(std=0.05, p=1.0)).to(device)
    ours = RandomCompensate(0.4, 0.05).to(device)
    plain = Compensate(0.4, 0.05)

    def many(function: Callable[[Tensor], Tensor]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(50):
                function(x)
            _finish(device)
            return 50 * BATCH

        return run

    work = {"kornia's two": many(chained), "RandomCompensate": many(ours), "Compensate": many(plain)}
    return take_turns(work, 3 * rounds)


# -- measuring and showing --------------------------------------------------------------------------------


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(work: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median rate of each, after one round that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, function in work.items():
            start = time.perf_counter()
            count = function()
            if turn:
                rates[name].append(count / (time.perf_counter() - start))
    return {name: float(f"{statistics.median(values):.4g}") for name, values in rates.items()}


def loader_table(results: dict[str, Any]) -> str:
    columns = results["loader"]
    lines = [["", *(f"{number} workers" for number in columns)], ["---"] + ["---:"] * len(columns)]
    for name in next(iter(columns.values())):
        lines += [[name, *(f"{rates[name]:,.0f} ({rates[name] / rates['nothing']:.2f})" for rates in columns.values())]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step_table(results: dict[str, Any]) -> str:
    step = results["step"]
    lines = [["batches of 128 from", "ms a step", "share of it"], ["---", "---:", "---:"]]
    for name in (name for name in step if not name.startswith("share")):
        share = step.get(f"share of {name}")
        lines.append([name, f"{step[name]:,.0f}", "" if share is None else f"{100 * share:.1f} %"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(text: str, results: dict[str, Any]) -> str:
    """A page with the tables between its markers made from the results."""
    for name, made in {"loader speed": loader_table(results), "step speed": step_table(results)}.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"The page must have one place for the table {name!r}. Got {found}.")
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="of an epoch of the loader")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="others stay as they are in --out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader_speed.json")
    parser.add_argument("--readme", type=Path, help="write the results into this page's tables, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
