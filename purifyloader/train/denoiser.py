"""`purifyloader train denoiser`, or on several GPUs `accelerate launch -m purifyloader.train.denoiser`.

From a folder of clean images to a checkpoint with its card.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader import __version__, pretrained
from purifyloader.datasets import describe, open_dataset
from purifyloader.devices import as_device
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.errors import CheckpointError, InputError, PurifyError
from purifyloader.evaluation.measures import jpeg_psnr, noised_psnr, psnr
from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE
from purifyloader.train import plan
from purifyloader.train.augment import AUGMENTATIONS
from purifyloader.train.card import card
from purifyloader.train.config import RECIPES
from purifyloader.train.curves import CURVES_PNG, SAMPLES_PNG, validation_levels
from purifyloader.train.data import choose, hold_out, load_images, read_indices
from purifyloader.train.loop import train_denoiser
from purifyloader.train.options import configuration
from purifyloader.train.state import STATE_FILE, images_sha256, writing

__all__ = ["main"]

log = logging.getLogger("purifyloader")

# Where PSNR is measured for the card, in px: the literature's levels, ECLIPSE's, and the certified sigmas.
_CARD_PX = (6.37, 10, 25, 50, 63.75, 127.5, 255)
_ON_THE_WAY = 200  # of the held-out images, for the measurements during training
_NAMED = ("cifar10", "cifar100")  # whose --validation is their test split


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="purifyloader train denoiser",
        description="Train a denoiser from a few clean images. Run the same command again after a stop: it goes on. "
        "On several GPUs: accelerate launch -m purifyloader.train.denoiser, with the same options.",
    )
    data = parser.add_argument_group("the clean images")
    data.add_argument(
        "--data",
        required=True,
        help="cifar10, cifar100, imagefolder, webdataset, a folder of images, .tar files, or package.module:function",
    )
    data.add_argument("--root", default="data", help="where a dataset given by name is (default: data)")
    chosen = data.add_mutually_exclusive_group()
    chosen.add_argument("--count", type=int, help="use this many images, chosen by --choose-seed (default: all)")
    chosen.add_argument(
        "--indices", type=Path, help="use the images listed in this JSON file, or in a checkpoint's config.json"
    )
    data.add_argument("--choose-seed", type=int, default=0, help="decides which images --count takes (default: 0)")
    data.add_argument("--size", type=int, metavar="PX", help="resize the shorter side to this and crop the centre")
    data.add_argument(
        "--validation",
        help="clean images to measure PSNR on: like --data, where cifar10 and cifar100 mean the test split, or none "
        "(default: images of --data that are not trained on; a twentieth of them if all were chosen)",
    )
    data.add_argument("--validation-count", type=int, default=1000, help="at most (default: 1000)")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default="light",
        help="light: a small network for the noise that purification uses, an hour of two CPU cores (default); "
        "eclipse: the paper's; puregen: PureGen-DDPM's, t <= 250",
    )
    how.add_argument(
        "--config",
        type=Path,
        help="JSON of fields that replace the recipe's, or a checkpoint's config.json: all of them",
    )
    how.add_argument("--start-from", metavar="MODEL", help="a denoiser whose weights to start from, with its network")
    how.add_argument("--steps", type=int, help="optimiser steps")
    how.add_argument("--decay-steps", type=int, help="last steps, over which the learning rate falls to zero")
    how.add_argument("--batch-size", type=int, help="images a step, over all processes")
    how.add_argument("--learning-rate", type=float)
    how.add_argument("--replicate", type=int, metavar="M", help="further copies of each image in an epoch")
    how.add_argument("--augment", nargs="*", choices=AUGMENTATIONS, metavar="HOW", help=", ".join(AUGMENTATIONS))
    how.add_argument("--patch-size", type=int, metavar="PX", help="train on random squares of this side")
    how.add_argument("--seed", type=int, help="of the weights and of all noise")
    how.add_argument("--dtype", choices=("float32", "bfloat16"))
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the network (default: on a GPU, from 2,000 steps on)",
    )

    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, help="folder for the checkpoint (and, until it is done, the run's state)")
    run.add_argument("--plan", action="store_true", help="print what it would cost on this machine, and stop")
    run.add_argument("--device", help="such as cpu or cuda (default: a GPU for each process, else the CPU)")
    run.add_argument("--micro-batch", type=int, help="images in memory at a time, if a batch does not fit")
    run.add_argument("--save-every", type=float, default=60.0, metavar="S", help="seconds between states (default: 60)")
    run.add_argument("--validate-every", type=int, metavar="STEPS", help="(default: a twentieth of the run)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")

    about = parser.add_argument_group("the card")
    about.add_argument("--name", help="of the model (default: the folder's)")
    about.add_argument("--description", help="what the images are (default: --data)")
    about.add_argument("--licence", help="of the images and so of the weights")
    about.add_argument("--note", help="what else the card should say")
    return parser


def _check_out(out: Path) -> None:
    """Refuse before hours of training what could not be written after them.

    Files beside the state of a run, without config.json, are of a save that was killed: written again.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"Expected a folder as --out. Got the file {out}.")
    found = [name for name in (CONFIG_FILE, MODEL_FILE, CARD_FILE) if (out / name).exists()]
    if CONFIG_FILE in found or (found and not (out / STATE_FILE).exists()):
        raise CheckpointError(
            f"Expected a folder without a checkpoint. Got {out} with {', '.join(found)}: give another --out."
        )


@contextlib.contextmanager
def _processes(name: str | None) -> Iterator[tuple[int, torch.device]]:
    """(rank, device): joined with the other processes where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, as_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        return
    from accelerate import PartialState

    on_cpu = name == "cpu" or (name is None and not torch.cuda.is_available())
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"With several processes --device must be cpu or cuda, one GPU for each. Got {name!r}.")
    state = PartialState(cpu=on_cpu)
    try:
        yield state.process_index, torch.device("cpu") if on_cpu else state.device
    finally:
        state.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`."""
    options = _parser().parse_args(arguments)
    with _processes(options.device) as (rank, device):
        quiet = options.quiet or rank > 0
        logging.basicConfig(format="%(message)s")
        logging.getLogger("purifyloader").setLevel(logging.WARNING if quiet else logging.INFO)
        if not options.plan:
            if options.out is None:
                raise InputError("Expected --out, a folder for the checkpoint, or --plan. Got neither.")
            _check_out(options.out)
        return _train(options, rank, device, quiet)


def _train(options: argparse.Namespace, rank: int, device: torch.device, quiet: bool) -> int:
    dataset = open_dataset(options.data, options.root)
    length = len(dataset)  # type: ignore[arg-type]
    if options.indices is not None:
        indices = read_indices(options.indices)
    else:
        indices = choose(length, length if options.count is None else options.count, options.choose_seed)
    held_out: list[int] = []
    if options.validation is None:
        indices, held_out = hold_out(length, indices, options.choose_seed, options.validation_count)
    images = load_images(dataset, indices, size=options.size, progress=not quiet)
    config, start = configuration(options, images.shape[1:], device)
    machine = _machine(device)
    if options.plan:
        measured = plan.measure(images, config, start=start, micro_batch=options.micro_batch, device=device)
        if rank == 0:
            print(plan.report(measured, config, machine, datetime.datetime.now()))
        return 0
    validation, held_out_name = _validation(options, dataset, held_out, images, quiet)
    denoiser, record = train_denoiser(
        images,
        options.out,
        config,
        start=start,
        validation=validation[:: -(-len(validation) // _ON_THE_WAY)] if validation is not None else None,
        validate_every=options.validate_every,
        micro_batch=options.micro_batch,
        device=device,
        save_every=options.save_every,
        progress=not quiet,
    )
    if rank > 0:
        return 0
    results = measure(denoiser, validation) if validation is not None else []
    details = {
        "purifyloader": __version__,
        # never a path: the card travels
        "data": options.description or describe(options.data),
        "data_length": length,
        "image_size": list(images.shape[-2:]),
        "resized": options.size,
        "indices": indices,
        "images_sha256": images_sha256(images),
        "held_out": held_out_name,
        "train": config.to_dict(),
        "record": record,
        "machine": machine,
        "psnr": results,
        "licence": options.licence,
        "note": options.note,
    }
    with writing(options.out):
        save(denoiser, options.out, options.name or options.out.resolve().name, details)
    (options.out / STATE_FILE).unlink(missing_ok=True)
    print(f"{options.out}: {record['steps']:,} steps, {record['seconds']:.0f} s")
    for row in results:
        print(
            f"  {row['sigma_px']:g} px: {row['denoiser']:.2f} dB "
            f"(JPEG-10 {row['jpeg10']:.2f}, doing nothing {row['noised']:.2f})"
        )
    return 0


def _validation(
    options: argparse.Namespace, dataset: Any, held_out: Sequence[int], images: Tensor, quiet: bool
) -> tuple[Tensor | None, str]:
    """The held-out images, and what they are, for the card."""
    if options.validation == "none" or (options.validation is None and not held_out):
        return None, ""
    if options.validation is None:
        what, source, chosen = "images of the same data that it was not trained on", dataset, held_out
    else:
        source = open_dataset(options.validation, options.root, train=False)
        if options.validation_count < 1:
            raise InputError(f"--validation-count must be at least 1. Got {options.validation_count}.")
        length = len(source)  # type: ignore[arg-type]
        count = min(options.validation_count, length)
        # a folder may be sorted by class; the named test splits are shuffled, and their first images comparable
        chosen = range(count) if options.validation in _NAMED else choose(length, count, options.choose_seed)
        what = f"images of {describe(options.validation)}" + (", test split" if options.validation in _NAMED else "")
    loaded = load_images(source, chosen, size=options.size, channels=images.shape[1], progress=not quiet)
    trained = {image.numpy().tobytes() for image in images}
    apart = [i for i, image in enumerate(loaded) if image.numpy().tobytes() not in trained]
    if len(apart) == len(loaded):
        return loaded, what
    if options.validation is not None:
        raise InputError(
            f"Expected validation images apart from those trained on. Got {len(loaded) - len(apart)} of {len(loaded)} "
            "that are among them: give other images as --validation, or leave it out."
        )
    log.info("%d held-out images are copies of ones trained on, and left out", len(loaded) - len(apart))
    return (loaded[apart], what) if apart else (None, "")


def measure(denoiser: NetworkDenoiser, images: Tensor) -> list[dict[str, float]]:
    """PSNR of the denoiser, of JPEG-10 and of doing nothing, at the levels of the card that it was trained for."""
    low, high = denoiser.sigma_range
    levels = [px for px in _CARD_PX if low <= px / 255 <= high]
    return [
        {
            "sigma_px": px,
            "denoiser": round(psnr(denoiser, images, px / 255), 3),
            "jpeg10": round(jpeg_psnr(images, px / 255), 3),
            "noised": round(noised_psnr(images, px / 255), 3),
            "images": len(images),
        }
        for px in (levels if len(levels) >= 2 else validation_levels((low, high)))
    ]


def save(denoiser: NetworkDenoiser, out: Path, name: str, details: Mapping[str, Any]) -> None:
    """The checkpoint with its card, over whatever a killed save left there."""
    levels = ", ".join(f"{px:g}" for px in validation_levels(denoiser.sigma_range))
    captions = {
        CURVES_PNG: "Loss and PSNR over the run.",
        SAMPLES_PNG: f"Clean images; then, for {levels} px each, noised and denoised in one network call.",
    }
    text = card(name, denoiser, details, {p: c for p, c in captions.items() if (out / p).exists()})
    pretrained.save(denoiser, out, name=name, card=text, details=details, overwrite=True)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)} ({platform.machine()})"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PurifyError as error:
        print(f"purifyloader: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("purifyloader: interrupted", file=sys.stderr)
        sys.exit(130)
