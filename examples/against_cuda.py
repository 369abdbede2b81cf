"""What helps against CUDA, whose blur a purifier leaves where it is: augmentations that make sharpness say nothing.

    python examples/against_cuda.py
    python examples/against_cuda.py --readme purifyloader/bench/README.md

CUDA gives each class a blur of its own, and a network learns the blur. Where every image is blurred at random, or its
pixels moved (COIN), in every epoch anew, it cannot. Accuracy on 1,000 clean test images of a ResNet-9 of width 16,
trained for ten epochs on 4,000 images, by seed. Finished cells are kept in the file, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.bench.applying import per_epoch_transform
from purifyloader.datasets.splits import load_sample
from purifyloader.files.atomic import write_text
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.purifiers import Coin
from purifyloader.victims.training import BatchTransform, accuracy, train_victim

NAMES = {
    "none": "nothing",
    "coin": "`RandomSqueeze('coin')`",
    "blur": "`RandomGaussianBlur((5, 5), (0.1, 2.5), p=0.9)`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=here / "results" / "against_cuda.json")
    parser.add_argument("--readme", type=Path, help="put the table into this file, and stop")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.readme:
        options.readme.write_text(with_table(options.readme.read_text(), results))
        return
    images, labels = load_sample(here / "data", "train")
    test = load_sample(here / "data", "test")
    for seed in range(options.seeds):
        for data in ("CUDA", "clean"):
            for way in NAMES:
                cell = results.setdefault(f"{data}:{way}", {})
                if str(seed) not in cell:
                    shown = images if data == "clean" else attacks.make("cuda", (images, labels), 0).images
                    cell[str(seed)] = trained(shown, labels, way, seed, test)
                    write_text(options.out, json.dumps(results, indent=1) + "\n")
                    print(f"{data:6} {way:5} seed {seed}: {cell[str(seed)]:.1f} %", flush=True)


def trained(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    way: str,
    seed: int,
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # kornia draws from torch's own generator
        found = train_victim(images, labels, batch_transform=transform(way, seed), seed=seed)
    return round(100 * accuracy(found.model, *test), 1)


def transform(way: str, seed: int) -> BatchTransform | None:
    """What is done to a batch after crop and flip, drawn anew in every epoch."""
    if way == "none":
        return None
    if way == "coin":
        return per_epoch_transform(Coin(), seed)
    blur = K.RandomGaussianBlur((5, 5), (0.1, 2.5), p=0.9)

    def blurred(x_BCHW: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        return torch.as_tensor(blur(x_BCHW))

    return blurred


def with_table(text: str, results: Mapping[str, Mapping[str, float]]) -> str:
    """The text with the table between its marks."""
    lines = ["| augmentation | CUDA | clean |", "| --- | ---: | ---: |"]
    for way, name in NAMES.items():
        cells = [mean(list(results[f"{data}:{way}"].values())) for data in ("CUDA", "clean")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    table = "\n".join(lines)
    return re.sub(
        r"<!-- cuda -->\n.*?<!-- end -->", lambda _: f"<!-- cuda -->\n{table}\n<!-- end -->", text, flags=re.S
    )


def mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
