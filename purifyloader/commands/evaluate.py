"""`purifyloader denoiser evaluate`: how good a denoiser is, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from purifyloader import pretrained
from purifyloader.commands.inputs import Models, add_poisons, read_images
from purifyloader.commands.options import add_device
from purifyloader.core.devices import device_of_process
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.evaluation.evaluate import default_sigmas, evaluate
from purifyloader.evaluation.pictures import examples, picture
from purifyloader.results.folder import check_out, write_results
from purifyloader.results.table import plain

__all__ = ["DESCRIPTION", "add_options", "JSON_FILE", "PICTURE_FILE", "run", "to_json"]

JSON_FILE = "evaluation.json"
PICTURE_FILE = "evaluation.png"
_COUNT = 500


DESCRIPTION = (
    "Judge a denoiser on clean images that it was not trained on: PSNR over noise, calibration, and what it removes "
    "from poisoned images. Prints a table."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a shipped denoiser, a checkpoint's folder, or owner/name on the hub")
    add(
        "--data",
        required=True,
        help="clean images: cifar10, cifar100 (their test split), imagefolder, webdataset, a folder of images, .tar "
        "files, or package.module:function",
    )
    add("--root", default="data", help="where a dataset given by name is (default: data)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--count", type=int, metavar="N", help=f"use N images, chosen by --choose-seed (default: {_COUNT})"
    )
    chosen.add_argument("--indices", type=Path, metavar="FILE", help="use the images listed in this JSON file")
    add("--size", type=int, metavar="PX", help="resize the shorter side of each image to this, and crop the centre")
    add("--choose-seed", type=int, default=0, help="decides which images --count takes (default: 0)")
    add(
        "--sigma-px",
        type=float,
        nargs="+",
        metavar="PX",
        help="noise levels on the 0-255 scale (default: spread over the denoiser's range)",
    )
    add_poisons(parser, "--data")
    add("--steps", type=int, default=1, metavar="N", help="network calls an image (default: 1)")
    add("--sampler", choices=sorted(SAMPLERS), default="ancestral", help="of several calls (default: ancestral)")
    add("--no-calibration", action="store_true", help="leave out the calibration, half of the network calls")
    add("--seed", type=int, default=0, help="of the noise and the attacks (default: 0)")
    add("--batch-size", type=int, help="images of a network call (default: by their size, at most 100)")
    add_device(parser)
    add("--out", type=Path, metavar="FOLDER", help=f"write {JSON_FILE} and {PICTURE_FILE} there")
    add("--overwrite", action="store_true", help="replace these files")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`. Returns 0."""
    device = device_of_process(options.device, 0)
    check_out(options.out, (JSON_FILE, PICTURE_FILE), options.overwrite, "an evaluation")
    denoiser: Denoiser = pretrained.load(options.model).to(device)
    sigmas = default_sigmas(denoiser) if options.sigma_px is None else [px / 255 for px in options.sigma_px]
    denoiser.check_sigma(torch.tensor(sigmas, dtype=torch.float64))  # before images are read
    images, poisoned, data = read_images(
        Models(None, denoiser, (options.model,)),
        options.data,
        options,
        root=options.root,
        default=_COUNT,
        progress=not options.quiet and sys.stderr.isatty(),
    )
    with _bar(None, "calls", options.quiet) as bar:

        def progress(calls: int, total: int) -> None:
            bar.total = total
            bar.update(calls)

        results = evaluate(
            denoiser,
            images,
            sigmas,
            poisoned=poisoned,
            steps=options.steps,
            sampler=options.sampler,
            calibrate=not options.no_calibration,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=progress,
        )
    results = {**results, "data": data}
    if options.json:
        print(to_json(results), end="")
    else:
        print("\n".join(_table(results)))
    if options.out is not None:
        _write(options, results, denoiser, images, sigmas)
    return 0


def _write(
    options: argparse.Namespace,
    results: Mapping[str, Any],
    denoiser: Denoiser,
    images: Tensor,
    sigmas: Sequence[float],
) -> None:
    write_results(
        options.out,
        {JSON_FILE: to_json(results)},
        PICTURE_FILE,
        lambda path: picture(results, path, examples(denoiser, images, sigmas, seed=options.seed)),
        lambda text: print(text, file=sys.stderr if options.json else sys.stdout),
    )


def to_json(results: Mapping[str, Any]) -> str:
    """The same text for the same results: sorted keys, and lists of numbers in a line."""
    text = json.dumps(results, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=True)
    return re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


@contextmanager
def _bar(total: int | None, unit: str, quiet: bool) -> Iterator[Any]:
    with tqdm(total=total, unit=unit, disable=quiet or not sys.stderr.isatty(), leave=False) as bar:
        yield bar


# -- the table ---------------------------------------------------------------------------------------


def _table(results: Mapping[str, Any]) -> Iterator[str]:
    model, images, settings, levels = (results[key] for key in ("model", "images", "settings", "levels"))
    calls = "one network call" if settings["steps"] == 1 else f"{settings['steps']} network calls"
    size = " × ".join(str(side) for side in reversed(images["shape"][1:]))
    yield (
        f"{model['name'] or 'A denoiser'}, weights {model['weights_sha256'][:12]}: {images['count']:,} images of "
        f"{results['data']['description']}, {size} px, {calls} an image"
    )
    yield ""
    yield "PSNR in dB (± standard error)"
    heads = [("denoiser", "denoiser"), ("one_call", "one call"), ("noised", "as it is"), ("jpeg10", "JPEG-10")]
    heads = [(key, head) for key, head in heads if key in levels[0]["psnr_db"]]
    rows = []
    for level in levels:
        cells = []
        for key, _ in heads:
            value = level["psnr_db"][key]
            spread = f" ± {value['standard_error']:.2f}" if key == "denoiser" and value["standard_error"] else ""
            cells.append(f"{value['mean']:.2f}{spread}")
        rows.append([f"{level['sigma_px']:.3g} px", *cells])
    yield from plain(["noise", *(head for _, head in heads)], rows)
    if settings["calibrate"]:
        yield ""
        yield from _calibration(levels)
    if levels[0]["poisoned"]:
        yield ""
        yield "Poisoned: RMS removed (px), share of the pattern left, and whether the removed energy tells poison (AUC)"
        names = list(levels[0]["poisoned"])
        heads_ = [head for name in names for head in (f"from {name[-9:]}", "left", "AUC")]
        rows = []
        for level in levels:
            cells = [f"{level['removed_px']['mean']:.2f}"]
            for name in names:
                found = level["poisoned"][name]
                cells.append(f"{found['removed_px']['mean']:.2f}")
                cells += [f"{found['remaining']['mean']:.3f}", f"{found['auc']:.3f}"]
            rows.append([f"{level['sigma_px']:.3g} px", *cells])
        yield from plain(["noise", "from clean", *heads_], rows)


def _calibration(levels: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Calibration: RMS error of one call and the one it claims (px); a ratio above 1 is too sure of itself"
    rows = []
    for level in levels:
        measured = level["calibration"]
        ratio = measured["error_over_claimed"]["mean"]
        rows.append(
            [
                f"{level['sigma_px']:.3g} px",
                f"{measured['error_px']:.2f}",
                "-" if measured["claimed_px"] is None else f"{measured['claimed_px']:.2f}",
                "-" if ratio is None else f"{ratio:.3f}",
            ]
        )
    yield from plain(["noise", "error", "claimed", "ratio"], rows)
