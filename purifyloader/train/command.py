"""`purifyloader train denoiser`: from a folder of clean images to a checkpoint with its card."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purifyloader import __version__, pretrained
from purifyloader.datasets import describe, open_dataset
from purifyloader.devices import as_device
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.errors import CheckpointError, InputError
from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE
from purifyloader.train.data import choose, load_images, read_indices
from purifyloader.train.denoiser import PRESETS, STATE_FILE, TrainConfig, train_denoiser
from purifyloader.train.evaluate import jpeg_psnr, psnr

__all__ = ["main"]

VALIDATION_PX = (10, 25, 50)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="purifyloader train denoiser",
        description="Train a denoiser from a few clean images. Run the same command again after a stop: it goes on.",
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="cifar10, cifar100, imagefolder, webdataset, a folder of images, .tar files, or package.module:function",
    )
    add("--root", default="data", help="where a dataset given by name is (default: data)")
    add("--out", required=True, type=Path, help="folder for the checkpoint (and, until it is done, the run's state)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--count", type=int, help="use this many images, chosen by --choose-seed (default: all)")
    chosen.add_argument("--indices", type=Path, help="use the images listed in this JSON file")
    add("--choose-seed", type=int, default=0, help="decides which images --count takes (default: 0)")
    add(
        "--preset",
        choices=sorted(PRESETS),
        default="light",
        help="light: a small network (default); eclipse: the paper",
    )
    add("--steps", type=int, help="optimiser steps")
    add("--decay-steps", type=int, help="last steps, over which the learning rate falls to zero")
    add("--batch-size", type=int)
    add("--learning-rate", type=float)
    add("--replicate", type=int, help="further copies of each image in an epoch (M of the paper)")
    add("--seed", type=int, help="of the weights and of all noise")
    add("--dtype", choices=("float32", "bfloat16"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--validation", help="clean images to measure PSNR on: like --data; cifar10 and cifar100 mean the test split")
    add("--validation-count", type=int, default=1000)
    add("--description", help="what the images are, for the card (default: --data)")
    add("--name", help="name of the model in its card (default: the folder's)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _config(options: argparse.Namespace) -> TrainConfig:
    names = ("steps", "decay_steps", "batch_size", "learning_rate", "replicate", "seed", "dtype")
    changes: dict[str, Any] = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return dataclasses.replace(PRESETS[options.preset], **changes)


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


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    as_device(options.device)
    # as `python -m` has it, and the installed command has not: a user's own module:function lies here
    sys.path.insert(0, os.getcwd())
    _check_out(options.out)
    config = _config(options)
    dataset = open_dataset(options.data, options.root)
    length = len(dataset)  # type: ignore[arg-type]
    if options.indices is not None:
        indices = read_indices(options.indices)
    else:
        indices = choose(length, length if options.count is None else options.count, options.choose_seed)
    images = load_images(dataset, indices, progress=not options.quiet)
    if images.shape[1] != config.network.image_channels:
        network = dataclasses.replace(config.network, image_channels=images.shape[1])
        config = dataclasses.replace(config, network=network)
    validation = _validation(options)
    denoiser, record = train_denoiser(images, options.out, config, device=options.device, progress=not options.quiet)
    results = _measure(denoiser, validation) if validation is not None else []
    name = options.name or options.out.resolve().name
    details = {
        "purifyloader": __version__,
        # never a path: the card travels
        "data": options.description or describe(options.data),
        "data_length": length,
        "indices": indices,
        "train": config.to_dict(),
        "record": record,
        "machine": _machine(options.device),
        "psnr": results,
    }
    card = _card(name, denoiser, details)
    pretrained.save(denoiser, options.out, name=name, card=card, details=details, overwrite=True)
    (options.out / STATE_FILE).unlink(missing_ok=True)
    print(f"{options.out}: {record['steps']} steps, {record['seconds']:.0f} s")
    for row in results:
        print(f"  {row['sigma_px']:g} px: {row['denoiser']:.2f} dB (JPEG-10 {row['jpeg10']:.2f})")
    return 0


def _validation(options: argparse.Namespace) -> Tensor | None:
    if options.validation is None:
        return None
    if options.validation == options.data and options.data not in ("cifar10", "cifar100"):
        raise InputError("Expected validation images apart from --data. Got the same: they would be trained on.")
    dataset = open_dataset(options.validation, options.root, train=False)
    count = min(options.validation_count, len(dataset))  # type: ignore[arg-type]
    return load_images(dataset, range(count), progress=not options.quiet)


def _measure(denoiser: NetworkDenoiser, images: Tensor) -> list[dict[str, float]]:
    low, high = denoiser.sigma_range
    return [
        {
            "sigma_px": px,
            "denoiser": round(psnr(denoiser, images, px / 255), 3),
            "jpeg10": round(jpeg_psnr(images, px / 255), 3),
            "images": len(images),
        }
        for px in VALIDATION_PX
        if low <= px / 255 <= high
    ]


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread(s), {platform.machine()}"


def _card(name: str, denoiser: NetworkDenoiser, details: dict[str, Any]) -> str:
    train, record = details["train"], details["record"]
    low, high = denoiser.sigma_range
    parameters = sum(p.numel() for p in denoiser.parameters())
    rows = [
        ("Parameters", f"{parameters:,}"),
        ("Predicts", f"{denoiser.parameterization}, {'learned' if denoiser.learned_variance else 'fixed'} variance"),
        ("Noise it was trained for", f"{255 * low:.3g} to {255 * high:.3g} px"),
        ("Trained on", f"{len(details['indices']):,} of {details['data_length']:,} images of {details['data']}"),
        (
            "Objective",
            f"{train['objective']}, {'with' if train['flip'] else 'without'} mirroring, M = {train['replicate']}",
        ),
        (
            "Length",
            f"{record['steps']:,} steps of {train['batch_size']} images, {record['epochs']:,} epochs, "
            f"{record['seconds'] / 60:.0f} minutes on {details['machine']}",
        ),
        (
            "Optimiser",
            f"AdamW {train['learning_rate']:g}, warm-up {train['warmup']}, down over the last {train['decay_steps']}, "
            f"EMA {train['ema_decay']}, {train['dtype']}, seed {train['seed']}",
        ),
    ]
    text = [f"# {name}", "", "A denoiser for `purifyloader`, trained by `purifyloader train denoiser`.", ""]
    text += ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    if details["psnr"]:
        count = details["psnr"][0]["images"]
        text += [f"PSNR in dB on {int(count):,} clean images that it was not trained on, one network call:", ""]
        text += ["| noise | this denoiser | JPEG-10 |", "|---|---|---|"]
        text += [f"| {r['sigma_px']:g} px | {r['denoiser']:.2f} | {r['jpeg10']:.2f} |" for r in details["psnr"]]
        text += [""]
    text += ["<details><summary>Indices of the training images</summary>", ""]
    text += [", ".join(map(str, details["indices"])), "", "</details>", ""]
    return "\n".join(text)
