"""Add options that several commands have: each says its name, meaning and default once.

    data        --data, --root, --split, --count, --indices, --choose-seed, --size, --poisoned
    models      --model is always a denoiser, --energy an energy model
    running     --device, --dtype, --seed, --batch-size, --processes, --threads, --quiet
    results     --out, --overwrite, --json

Only light modules are imported here: a help text must not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "DTYPES",
    "SAMPLERS",
    "add_choice",
    "add_clean",
    "add_data",
    "add_device",
    "add_dtype",
    "add_models",
    "add_poisons",
    "add_processes",
    "add_quiet",
    "add_results",
    "add_seed",
    "add_size",
    "add_split",
    "add_threads",
    "given",
    "is_fast",
    "positive",
    "settings_of",
    "shows_progress",
]

T = TypeVar("T")
Group = argparse.ArgumentParser | argparse._ArgumentGroup

DTYPES = ("float32", "bfloat16")
SAMPLERS = ("ancestral", "ddim")  # of `purifyloader.diffusion.samplers`, which needs torch
_DATASETS = "cifar10, cifar100, imagefolder, webdataset, a folder of images, .tar files, or package.module:function"


def positive(text: str) -> int:
    """Read an option that is an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more. Got {text!r}.")
    return int(text)


def add_data(group: Group, what: str, *, required: bool = True) -> None:
    """Add --data, of which `what` says what its images are for, and --root."""
    group.add_argument("--data", "--dataset", required=required, help=f"{what}: {_DATASETS}")
    group.add_argument("--root", default="data", help="folder of a dataset given by name (default: data)")


def add_split(group: Group, default: str = "train") -> None:
    """Add --split."""
    splits = ("train", "test")
    group.add_argument("--split", choices=splits, default=default, help=f"of cifar10 and cifar100 (default: {default})")


def add_clean(group: Group, what: str, *, required: bool = False) -> None:
    """Add --clean, images known to be clean that other images are compared with, and --clean-root."""
    group.add_argument("--clean", required=required, help=f"{what}, given like --data (cifar10: its test split)")
    group.add_argument("--clean-root", help="folder of clean images given by name (default: --root)")


def add_choice(group: Group, default: str) -> None:
    """Add what chooses among the images: --count or --indices, and --choose-seed."""
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--count", type=positive, metavar="N", help=f"use N images, drawn at random (default: {default})"
    )
    either.add_argument(
        "--indices",
        type=Path,
        metavar="FILE",
        help="use the images listed in this JSON file, or checkpoint's config.json",
    )
    group.add_argument("--choose-seed", type=int, default=0, metavar="N", help="decides which are drawn (default: 0)")


def add_size(group: Group) -> None:
    """Add --size."""
    group.add_argument(
        "--size", type=positive, metavar="PX", help="resize the shorter side of each image to this, and crop the centre"
    )


def add_poisons(group: Group, of: str) -> None:
    """Add --poisoned, which says what attacks are tried on the images of the option `of`."""
    group.add_argument(
        "--poisoned",
        nargs="+",
        metavar="WHAT",
        help=f"attacks, poison files, or the images of {of} poisoned, given like it; none for none. Options of an "
        "attack or a file follow a colon: lsp:norm=2, or FILE.npy:units=bytes (default: lsp ar, for colour images)",
    )


def add_models(
    group: Group,
    *,
    model: str | None = None,
    energy: str | None = None,
    default_model: str | None = None,
    default_energy: str | None = None,
) -> None:
    """Add --model and --energy; `model` and `energy` say what each is used for, None that it is not."""
    denoiser = ("model", "the name or folder of a denoiser", model, default_model)
    network = ("energy", "the name or folder of an energy model", energy, default_energy)
    for flag, text, use, default in (denoiser, network):
        if use is not None:
            more = f" (default: {default})" if default else ""
            group.add_argument(f"--{flag}", default=default, metavar="MODEL", help=f"{text}; {use}{more}")


def add_device(group: Group) -> None:
    """Add --device."""
    group.add_argument("--device", help="such as cpu or cuda (default: a GPU for each process, else the CPU)")


def add_dtype(group: Group, what: str) -> None:
    """Add --dtype, of the arithmetic of `what`."""
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help=f"arithmetic of {what} (default: float32; bfloat16 is faster and gives other pixels)",
    )


def is_fast(options: argparse.Namespace) -> bool:
    """Read --dtype as the `fast=` of recipes."""
    return bool(options.dtype == "bfloat16")


def add_seed(group: Group, what: str) -> None:
    """Add --seed, of `what`."""
    group.add_argument("--seed", type=int, default=0, metavar="N", help=f"of {what} (default: 0)")


def add_processes(group: Group, *, threads: str | None = None) -> None:
    """Add --processes, and --threads where `threads` is its default, as words."""
    group.add_argument("--processes", type=positive, default=1, metavar="N", help="on this machine (default: 1)")
    if threads is not None:
        add_threads(group, threads)


def add_threads(group: Group, default: str) -> None:
    """Add --threads."""
    group.add_argument(
        "--threads", type=positive, metavar="N", help=f"of the CPU, for each process (default: {default})"
    )


def add_quiet(group: Group) -> None:
    """Add --quiet."""
    group.add_argument("--quiet", action="store_true", help="show no progress")


def add_results(group: Group, *files: str) -> None:
    """Add what becomes of the results: --out, --overwrite, --json, and --quiet."""
    names = f"{', '.join(files[:-1])} and {files[-1]}" if len(files) > 1 else files[0]
    group.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {names} there")
    group.add_argument("--overwrite", action="store_true", help="replace these files")
    group.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_quiet(group)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Collect the options of these names that were given, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def settings_of(options: argparse.Namespace, kind: Callable[..., T]) -> T:
    """Make a dataclass from the options that have the names of its fields."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def shows_progress(options: argparse.Namespace) -> bool:
    """Decide by --quiet, and by whether a person sees standard error, if there will be bars."""
    return not options.quiet and sys.stderr.isatty()
