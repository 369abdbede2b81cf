"""What makes a sparse-trained denoiser good? One factor at a time, by PSNR and by the accuracy it saves.

    python examples/denoiser_study.py --cifar cifar10 --root data --ood tiny=FOLDER mnist=package.module:function
    python examples/denoiser_study.py --table examples/results/denoiser_study.json

The base is a narrow `light` denoiser, trained without augmentation or copies on 2,000 CIFAR-10 images that are
neither in `examples/data` nor among its test images. Each run changes one thing; `seed-1` changes only the seed,
and a difference no larger than that one's is none. First all denoisers are trained and measured, then victims are
trained behind each, one seed after the other. What is finished is kept in `--out`, so a stopped study goes on.

`--table` makes the tables of the .md and the .png beside the .json anew.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader import __version__, recipes
from purifyloader.bench.applying import compensation, purify_array
from purifyloader.core import noise
from purifyloader.datasets.named import describe, open_dataset
from purifyloader.datasets.select import load_images
from purifyloader.datasets.splits import load_sample
from purifyloader.diffusion.psnr import estimate, psnr_of
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.evaluation.measures import removed_energy
from purifyloader.files.atomic import replacing, write_text
from purifyloader.poisons import autoregressive, lsp
from purifyloader.train import TrainConfig, recipe, train_denoiser
from purifyloader.transforms import Compensate
from purifyloader.victims.presets import TRAININGS
from purifyloader.victims.training import accuracy, train_victim

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

HERE = Path(__file__).parent
DRAW_SEED = 2026  # as examples/data: the base's 2,000 images are those that come before the sample's
PX = (10, 25, 50)
PURIFY_PX = 25
OWN = 500  # training images on which memorising is measured: the first, which all sizes share
LEFT = 1000  # images of the sample on which what is left of a poison is measured
PATCH, STRIDE = 8, 4
CELLS = ("AR ECLIPSE", "LSP ECLIPSE", "LSP purified", "AR purified", "clean ECLIPSE", "clean purified")


@dataclass(frozen=True)
class Run:
    """One denoiser: `changes` of its configuration, or another training set; compared with `against`."""

    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    images: int = 2000
    source: str = "cifar"
    poisoned: bool = False
    share: float = 1.0  # of the base's steps
    against: str = "base"


def noise_of(schedule: Schedule, last: int) -> dict[str, Any]:
    """Noise levels as timesteps 1..last, drawn evenly, give them: range, median, and spread of the logarithm."""
    sigma = schedule.sigma(np.arange(1, last + 1))
    return {
        "sigma_range": [float(sigma[0]), float(sigma[-1])],
        "sigma_center": float(np.median(sigma)),
        "sigma_spread": float(np.log(sigma).std()),
    }


def plan(ood: Sequence[str] = ()) -> dict[str, Run]:
    """All runs, the most telling first."""
    return {
        "base": Run("2,000 images, M = 0, no augmentation, light noise"),
        "seed-1": Run("another seed", {"seed": 1}),
        "replicate-4": Run("M = 4, equal iterations", {"replicate": 4}),
        "replicate-0-short": Run("M = 0, as many epochs as M = 4", share=1 / 5, against="replicate-4"),
        "mixup": Run("mixup", {"augment": ["mixup"]}),
        "flip": Run("flip", {"augment": ["flip"]}),
        "size-500": Run("500 images", images=500),
        "poisoned": Run("half AR, half LSP in the training set", poisoned=True),
        **{f"ood-{name}": Run(f"trained on {name}", source=name) for name in ood},
        "noise-full": Run("noise as of cosine T = 4000, all t", noise_of(CosineSchedule(4000), 4000)),
        "size-4000": Run("4,000 images", images=4000),
        "crop": Run("crop", {"augment": ["crop"]}),
        "rotate": Run("rotation", {"augment": ["rotate"]}),
        "noise-250": Run("noise as of linear T = 1000, t ≤ 250", noise_of(LinearSchedule(1000), 250)),
        "size-1000": Run("1,000 images", images=1000),
    }


def configure(run: Run, steps: int) -> TrainConfig:
    """The `light` recipe, narrow, its warm-up and decay in their share of the steps."""
    steps = max(1, round(run.share * steps))
    network = UNetConfig.small(channels=16)
    base = replace(recipe("light"), network=network, steps=steps, warmup=steps // 50, decay_steps=steps // 4)
    return TrainConfig.from_dict(run.changes, replace(base, augment=(), replicate=0, seed=0))


# -- images ------------------------------------------------------------------------------------------


def as_tensor(images: Images) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def digests(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]


def sparse_set(dataset: Any, count: int, sample: Tensor, test: Tensor) -> tuple[Tensor, list[int]]:
    """(images, indices): the first `count` in a drawn order that are not of the sample; sets are nested.

    Raises:
        SystemExit: too few images, or one of them is a test image.
    """
    order = noise.uniform(noise.image_keys(DRAW_SEED, 0, 0), (len(dataset),))[0].argsort().tolist()
    candidates = order[: count + len(sample)]
    images = load_images(dataset, candidates, size=32, channels=3)
    taken, forbidden = set(digests(sample)), set(digests(test))
    keep = [k for k, digest in enumerate(digests(images)) if digest not in taken][:count]
    if len(keep) < count:
        raise SystemExit(f"Expected {count} images beside those of the sample. Got {len(keep)}: give a larger set.")
    images = images[keep]
    if shared := sum(digest in forbidden for digest in digests(images)):
        raise SystemExit(
            f"Expected training images apart from the test images. Got {shared} of them: give another set."
        )
    return images, [candidates[k] for k in keep]


def poison_half(images: Tensor, labels: Labels, sample: Images, sample_labels: Labels) -> Tensor:
    """The first half with AR and the other with LSP, by the attacker who also poisons the sample."""
    # behind the sample, so that no image shares its draw with one of it
    x = np.concatenate([sample, images.permute(0, 2, 3, 1).numpy()])
    y = np.concatenate([sample_labels, labels])
    first, half = len(sample), len(sample) + len(images) // 2
    x = autoregressive(x, y, indices=np.arange(first, half))
    x = lsp(x, y, indices=np.arange(half, len(x)))
    return as_tensor(x[first:])


def patch_moments(images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of all PATCH x PATCH patches, STRIDE apart, in px."""
    unfolded = torch.nn.functional.unfold(images.double(), PATCH, stride=STRIDE)
    patches = unfolded.transpose(1, 2).flatten(0, 1).numpy()
    return patches.mean(0), np.cov(patches, rowvar=False)


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance between the normal distributions with the patches' moments, in px^2 a value.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), over the values of a patch: 1 is a pixel's difference by one
    level.
    """
    (mean_a, cov_a), (mean_b, cov_b) = patch_moments(a), patch_moments(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross) / len(mean_a)


# -- measures ----------------------------------------------------------------------------------------


@torch.no_grad()
def psnr_each(denoiser: Any, images: Tensor, sigma: float) -> list[float]:
    """PSNR of each image, noised with the same noise for every denoiser, in one call."""
    values = []
    for at in torch.arange(len(images)).split(100):
        clean = images[at].float() / 255
        x = clean + sigma * noise.normal(noise.image_keys(0, 0, at), clean.shape[1:])
        values += psnr_of(estimate(denoiser, x, sigma).clamp(0, 1), clean).tolist()
    return [round(v, 4) for v in values]


def purify(denoiser: Any, images: Images) -> Images:
    """At PURIFY_PX in one call; an image's pixels do not depend on the others."""
    purifier = recipes.eclipse(denoiser, sigma=PURIFY_PX / 255, steps=1)
    return purify_array(images, np.zeros(len(images), np.int64), purifier).images


def remaining(sample: Mapping[str, Images], washed: Mapping[str, Images], poison: str) -> list[float]:
    """The share of the poison that purification leaves: mean over images and standard error."""
    parts = (sample["clean"], sample[poison], washed["clean"], washed[poison])
    return mean_and_error(removed_energy(*(as_tensor(x) / 255 for x in parts)).remaining.tolist())


def mean_and_error(values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    x = np.asarray(values, np.float64)
    return [round(float(x.mean()), 5), round(float(x.std(ddof=1) / np.sqrt(len(x))), 5)]


# -- the study ---------------------------------------------------------------------------------------


class Study:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.ood = options, dict(pair.split("=", 1) for pair in options.ood)
        self.images, self.labels = load_sample(HERE / "data", "train")
        self.test_images, self.test_labels = load_sample(HERE / "data", "test")
        self.test = as_tensor(self.test_images)
        self.runs = {n: r for n, r in plan(list(self.ood)).items() if not options.only or n in options.only}
        poisons = {"AR": autoregressive(self.images, self.labels), "LSP": lsp(self.images, self.labels)}
        self.sample = {"clean": self.images, **poisons}

    @functools.cached_property
    def cifar(self) -> tuple[Tensor, Labels]:
        dataset = open_dataset(self.options.cifar, self.options.root)
        most = max(run.images for run in plan().values())
        images, indices = sparse_set(dataset, most, as_tensor(self.images), self.test)
        return images, np.array([int(dataset[i][1]) for i in indices])

    def training_set(self, run: Run) -> Tensor:
        if run.source != "cifar":
            dataset = open_dataset(self.ood[run.source], self.options.root)
            return sparse_set(dataset, run.images, self.test[:0], self.test)[0]
        images, labels = (x[: run.images] for x in self.cifar)
        return poison_half(images, labels, self.images, self.labels) if run.poisoned else images

    def row(self, name: str) -> dict[str, Any]:
        path = self.options.out / name / "row.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        (self.options.out / name).mkdir(parents=True, exist_ok=True)
        write_text(self.options.out / name / "row.json", json.dumps(row) + "\n")
        write_text(self.options.out / "denoiser_study.json", json.dumps(self.summary(), indent=1) + "\n")

    def denoise(self, name: str, run: Run) -> None:
        """Train a denoiser and measure it, unless that is done."""
        config, folder = configure(run, self.options.steps), self.options.out / name
        wanted = json.loads(json.dumps({"run": asdict(run), "config": config.to_dict(), "sample": len(self.images)}))
        if row := self.row(name):
            if row["settings"] != wanted:
                raise SystemExit(f"{folder} holds a run with other settings: give another --out.")
            return
        begun = time.perf_counter()
        images = self.training_set(run)
        denoiser, record = train_denoiser(images, folder, config, progress=False)
        some = {p: x[:LEFT] for p, x in self.sample.items()}
        washed = {p: purify(denoiser, x) for p, x in some.items()}
        row = {
            "settings": wanted,
            "loss": round(record["loss"], 5),
            "epochs": record["epochs"],
            "training_seconds": record["seconds"],
            "distance": round(frechet(images, self.test), 3),
            "test": {px: psnr_each(denoiser, self.test, px / 255) for px in PX},
            "own": psnr_each(denoiser, images[:OWN], PURIFY_PX / 255),
            "remaining": {p: remaining(some, washed, p) for p in ("AR", "LSP")},
            "accuracy": {},
        }
        self.write(name, {**row, "seconds": round(time.perf_counter() - begun, 1)})
        print(f"{name}: {np.mean(row['test'][25]):.2f} dB at 25 px, left {row['remaining']}", flush=True)

    def purified(self, name: str, poison: str) -> Images:
        """The sample as victims see it, made when it is first asked for."""
        folder, run = self.options.out / name, self.runs[name]
        path = folder / f"{poison}.npy"
        if not path.exists():
            config = configure(run, self.options.steps)
            denoiser, _ = train_denoiser(self.training_set(run), folder, config, progress=False)  # only read
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, purify(denoiser, self.sample[poison]))
        return np.load(path)

    def defend(self, name: str, cell: str, seed: int) -> None:
        """A victim behind a denoiser, or on the bare poison (`none`), unless that is done."""
        row = self.row(name) or {"accuracy": {}}
        done = row["accuracy"].setdefault(cell, {})
        if str(seed) in done:
            return
        poison, defence = cell.split()
        images = self.sample[poison] if name == "none" else self.purified(name, poison)
        fresh = compensation(Compensate(), seed) if defence == "ECLIPSE" else None
        how, width = replace(TRAININGS["short"], epochs=self.options.epochs), self.options.width
        victim, seconds = train_victim(images, self.labels, how, width=width, seed=seed, batch_transform=fresh)
        done[str(seed)] = round(100 * accuracy(victim, self.test_images, self.test_labels), 2)
        row["victim_seconds"] = round(row.get("victim_seconds", 0.0) + seconds, 1)
        self.write(name, row)
        print(f"{name}, {cell}, seed {seed}: {done[str(seed)]}", flush=True)

    def summary(self) -> dict[str, Any]:
        """What is done so far: settings, and for each run its measures without the values of each image."""
        rows = {name: row for name in [*plan(list(self.ood)), "none"] if (row := self.row(name))}
        settings = {
            "purifyloader": __version__,
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "steps": self.options.steps,
            "draw_seed": DRAW_SEED,
            "ood": {name: describe(spec) for name, spec in self.ood.items()},
            "test_images": len(self.test),
            "own_images": OWN,
            "purify_px": PURIFY_PX,
            "victim": {"images": len(self.images), "width": self.options.width, "epochs": self.options.epochs},
        }
        return {"settings": settings, "runs": {name: summarise(row, rows) for name, row in rows.items()}}


def summarise(row: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Means and standard errors, and the differences, image by image, to the run that it is compared with."""
    made = dict(row)
    if "test" not in row:
        return made
    made["test"] = {px: mean_and_error(values) for px, values in row["test"].items()}
    made["own"] = mean_and_error(row["own"])
    if other := rows.get(row["settings"]["run"]["against"]):
        differences = {px: np.subtract(v, other["test"][px]) for px, v in row["test"].items()}
        made["difference"] = {px: mean_and_error(d) for px, d in differences.items()}
    return made


# -- tables and picture ------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def psnr_table(runs: Mapping[str, Any]) -> str:
    lines = []
    for name, row in runs.items():
        what, against = row["settings"]["run"]["what"], row["settings"]["run"]["against"]
        means = [f"{row['test'][str(px)][0]:.2f}" for px in PX]
        known = name != against and "difference" in row
        differences = ["{:+.3f} ± {:.3f}".format(*row["difference"][str(px)]) if known else "–" for px in PX]
        gap = row["own"][0] - row["test"][str(PURIFY_PX)][0]
        of = f" (against {against})" if against != "base" else ""
        lines.append([name, what + of, *means, *differences, f"{gap:+.2f}", f"{row['distance']:.1f}"])
    head = ["run", "what", *(f"{px} px" for px in PX), *(f"Δ {px} px" for px in PX), "own − test", "distance"]
    return table(head, lines)


def accuracy_table(runs: Mapping[str, Any]) -> str:
    cells, lines = measured_cells(runs), []
    for name, row in runs.items():
        line = [f"{100 * row['remaining'][p][0]:.1f}" if "remaining" in row else "100" for p in ("AR", "LSP")]
        for values in (list(row["accuracy"].get(cell, {}).values()) for cell in cells):
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.1f}{spread}" if values else "–")
        lines.append([name, *line])
    return table(["run", "AR left (%)", "LSP left (%)", *cells], lines)


def measured_cells(runs: Mapping[str, Any]) -> list[str]:
    return [cell for cell in CELLS if any(row["accuracy"].get(cell) for row in runs.values())]


def with_tables(text: str, results: Mapping[str, Any]) -> str:
    """The write-up with the tables between its markers made anew; they are appended to one without."""
    measured = {name: row for name, row in results["runs"].items() if "test" in row}
    for name, made in {"psnr": psnr_table(measured), "accuracy": accuracy_table(results["runs"])}.items():
        start, end = f"<!-- {name} -->", "<!-- end -->"
        before, found, after = text.partition(start)
        text = before + ("" if found else "\n") + f"{start}\n{made}\n{end}" + (after.partition(end)[2] or "\n")
    return text


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Left: PSNR against the base, with the other seed's difference as a band. Right: accuracies."""
    from matplotlib.figure import Figure

    runs, px = results["runs"], results["settings"]["purify_px"]
    measured = {name: row for name, row in runs.items() if "test" in row}
    base = measured.get("base", next(iter(measured.values())))
    figure = Figure(figsize=(12, 0.34 * len(runs) + 1.6), layout="constrained")
    quality, defended = figure.subplots(1, 2, sharey=True)
    for level, mark in zip(PX, "os^", strict=True):
        differences = [row["test"][str(level)][0] - base["test"][str(level)][0] for row in measured.values()]
        quality.plot(differences, range(len(measured)), mark, ms=5, label=f"{level} px")
    band = max((abs(d) for d, _ in measured.get("seed-1", {}).get("difference", {}).values()), default=0)
    quality.axvspan(-band, band, color="#dddddd", zorder=0, label="another seed, largest")
    quality.set_xscale("symlog", linthresh=0.2)
    ticks = (-2, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5)
    quality.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    quality.set(xlabel="PSNR on test images against the base (dB)", yticks=range(len(runs)), yticklabels=list(runs))
    quality.invert_yaxis()
    for cell in measured_cells(runs):
        points = [(v, y) for y, row in enumerate(runs.values()) for v in row["accuracy"].get(cell, {}).values()]
        defended.plot(*zip(*points, strict=True), "o", ms=6, alpha=0.8, label=cell)
    defended.set(xlabel=f"accuracy of the victims (%), purified at {px} px (none: not purified)")
    for axis in (quality, defended):
        axis.grid(color="#eeeeee")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parse_arguments()
    if options.table:
        results, text = json.loads(options.table.read_text()), options.table.with_suffix(".md")
        write_text(text, with_tables(text.read_text() if text.exists() else "", results))
        draw(results, options.table.with_suffix(".png"))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    study = Study(options)
    for name, run in study.runs.items():
        study.denoise(name, run)
    for seed in range(options.seeds):
        for cell, name in itertools.product(options.cells, ["none", *study.runs]):
            study.defend(name, cell, seed)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", default="cifar10", help="its training split: cifar10, or package.module:function")
    parser.add_argument("--root", default="data", help="where a dataset given by name is")
    parser.add_argument("--ood", nargs="*", default=[], metavar="NAME=SPEC", help="other training sets, likewise")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for what is finished")
    parser.add_argument("--only", nargs="*", metavar="RUN", help=f"of {', '.join(plan())} and ood-NAME")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS, metavar="CELL", help=f"of {CELLS}")
    parser.add_argument("--steps", type=int, default=600, help="of each denoiser, in batches of 32")
    parser.add_argument("--seeds", type=int, default=2, help="victims in each cell")
    parser.add_argument("--width", type=int, default=8, help="of the victims")
    parser.add_argument("--epochs", type=int, default=8, help="of the victims")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make tables and picture of these results, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
