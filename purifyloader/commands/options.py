"""Add options that several commands have: each says its name, meaning and default once.

    data        --data, --root, --split, --count, --indices, --choose-seed, --size, --poisoned, --train, --test
    models      --model is always a denoiser, --energy an energy model
    running     --device, --dtype, --seed, --batch-size, --processes, --threads, --quiet
    results     --out, --overwrite, --json

Only light modules are imported here: a help text must not wait for torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from purifyloader.core.checks import as_path
from purifyloader.datasets import DATA
from purifyloader.errors import ConfigError

T = TypeVar("T")
Group = argparse.ArgumentParser | argparse._ArgumentGroup

DTYPES = ("float32", "bfloat16")
SAMPLERS = ("ancestral", "ddim")  # of `purifyloader.diffusion.samplers`, which needs torch
_SPLIT = ("cifar10", "cifar100")  # datasets that --split is of
_SPLITS = ("train", "test")
_ROOT = "data"
_MOST_THREADS = 1024
_DATASETS = "cifar10, cifar100, imagefolder, webdataset, a folder of images, .tar files, or package.module:function"


def positive(text: str) -> int:
    """Read an option that is an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more. Got {text!r}.")
    return int(text)


def thread_count(text: str) -> int:
    """Read a number of threads. PyTorch crashes without an error where the system cannot start them all."""
    if (count := positive(text)) > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_THREADS}. Got {text!r}.")
    return count


def above_zero(text: str) -> float:
    """Read an option that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0. Got {text!r}.")
    return value


def as_key(text: str | None) -> str | int | None:
    """Read a key of a sample: a name, or a position."""
    return int(text) if text is not None and text.isdecimal() else text


def add_data(group: Group, what: str, *, required: bool = True) -> None:
    """Add --data, whose images are for `what`, and --root."""
    group.add_argument("--data", "--dataset", required=required, help=f"{what}: {_DATASETS}")
    group.add_argument("--root", default=_ROOT, help=f"folder of a dataset given by name (default: {_ROOT})")


def check_data(options: argparse.Namespace) -> None:
    """Refuse --root and --split where no dataset is given by a name that they are of: they would change nothing."""
    given = vars(options)
    named = DATA if "test" in given else (*_SPLIT, "imagefolder", "webdataset")  # commands of two sets have others
    poisoned = given.get("poisoned")  # sets, or the one file of an audit, which is no data
    others = [given.get("clean"), given.get("validation"), *(poisoned if isinstance(poisoned, list) else ())]
    _check_goes_with(given, "root", _ROOT, [given.get("data"), *others], named)
    _check_goes_with(given, "clean_root", None, [given.get("clean")], named)
    _check_goes_with(given, "split", "train", [given.get("data")], _SPLIT)
    _check_goes_with(given, "clean_split", "test", [given.get("clean")], _SPLIT)


def _check_goes_with(
    given: Mapping[str, Any], name: str, default: str | None, data: Sequence[str | None], named: Sequence[str]
) -> None:
    if given.get(name, default) != default and data[0] is not None and not set(named) & set(data):
        flag = f"--{name.replace('_', '-')}"
        raise ConfigError(
            f"{flag} goes with {', '.join(named[:-1])} or {named[-1]}. Got {flag} {given[name]} with {data[0]}: leave "
            "it out."
        )


def add_sets(group: Group) -> None:
    """Add --root, --train and --test, of a dataset with two splits; read --root by `root_of`."""
    words = f"folder of the data (default: examples/data for the sample, else {_ROOT})"
    group.add_argument("--root", default=_ROOT, help=words)
    group.add_argument("--train", type=int, metavar="N", help="so many training images, drawn at random (default: all)")
    group.add_argument("--test", type=int, metavar="N", help="so many test images (default: all)")


def root_of(options: argparse.Namespace, data: str) -> Path:
    """Return the folder of the data: the sample of this repository is in examples/data, unless --root is another."""
    return Path("examples/data" if data == "sample" and options.root == _ROOT else options.root)


def add_split(group: Group, name: str = "--split", default: str = "train") -> None:
    group.add_argument(name, choices=_SPLITS, default=default, help=f"of cifar10 and cifar100 (default: {default})")


def add_clean(group: Group, what: str, *, required: bool = False) -> None:
    """Add --clean, images known to be clean that other images are compared with, and --clean-root."""
    group.add_argument("--clean", required=required, help=f"{what}, given like --data (cifar10: its test split)")
    group.add_argument("--clean-root", help="folder of clean images given by name (default: --root)")


def add_choice(group: Group, default: str) -> None:
    """Add the choice among the images: --count or --indices, and --choose-seed."""
    either = group.add_mutually_exclusive_group()
    words = f"use N images, drawn at random (default: {default})"
    either.add_argument("--count", type=positive, metavar="N", help=words)
    words = "use the images listed in this JSON file, or checkpoint's config.json"
    either.add_argument("--indices", type=as_path, metavar="FILE", help=words)
    group.add_argument("--choose-seed", type=int, default=0, metavar="N", help="decides which are drawn (default: 0)")


def add_size(group: Group) -> None:
    words = "resize the shorter side of each image to this, and crop the centre"
    group.add_argument("--size", type=positive, metavar="PX", help=words)


def add_poisons(group: Group, of: str) -> None:
    """Add --poisoned, the attacks that are tried on the images of the option `of`."""
    words = (
        f"attacks, poison files, or the images of {of} poisoned, given like it; none for none. Options of an "
        "attack or a file follow a colon: lsp:norm=2, or FILE.npy:units=bytes (default: lsp ar, for colour images)"
    )
    group.add_argument("--poisoned", nargs="+", metavar="WHAT", help=words)


def add_model(group: Group, use: str, *, energy: bool = False, default: str | None = None) -> None:
    """Add --model, a denoiser, or with `energy` --energy, an energy model; `use` says what for."""
    flag, kind = ("--energy", "an energy model") if energy else ("--model", "a denoiser")
    more = f" (default: {default})" if default else ""
    group.add_argument(flag, default=default, metavar="MODEL", help=f"the name or folder of {kind}; {use}{more}")


def add_device(group: Group) -> None:
    group.add_argument("--device", help="such as cpu or cuda (default: a GPU for each process, else the CPU)")


def add_dtype(group: Group, what: str) -> None:
    """Add --dtype, of the arithmetic of `what`."""
    words = f"arithmetic of {what} (default: float32; bfloat16 is faster and gives other pixels)"
    group.add_argument("--dtype", choices=DTYPES, default="float32", help=words)


def add_seed(group: Group, what: str, *, of_config: bool = False) -> None:
    """Add --seed, of `what`; with `of_config` it is None where it is not given, for a --config may say it."""
    words = f"of {what} (default: 0)"
    group.add_argument("--seed", type=int, default=None if of_config else 0, metavar="N", help=words)


def add_processes(group: Group) -> None:
    group.add_argument("--processes", type=positive, default=1, metavar="N", help="on this machine (default: 1)")


def add_threads(group: Group, words: str, default: int | None = None) -> None:
    """Add --threads; `words` say the default."""
    words = f"of the CPU, for each process (default: {words})"
    group.add_argument("--threads", type=thread_count, default=default, metavar="N", help=words)


def add_quiet(group: Group) -> None:
    group.add_argument("--quiet", action="store_true", help="show no progress")


def add_results(group: Group, *files: str) -> None:
    """Add --out, where the `files` are written, --overwrite, --json and --quiet."""
    names = f"{', '.join(files[:-1])} and {files[-1]}"
    group.add_argument("--out", type=as_path, metavar="FOLDER", help=f"write {names} there")
    group.add_argument("--overwrite", action="store_true", help="replace these files")
    group.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_quiet(group)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Collect the options of these names that were given, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def settings_of(options: argparse.Namespace, kind: Callable[..., T], **own: Any) -> T:
    """Make a dataclass from the options that have the names of its fields, and from `own` fields before these."""
    names = [field.name for field in fields(kind) if hasattr(options, field.name)]  # type: ignore[arg-type]
    return kind(**{**{name: getattr(options, name) for name in names}, **own})


def shows_progress(options: argparse.Namespace) -> bool:
    """Decide by --quiet, and by whether a person sees standard error, if there will be bars."""
    return not options.quiet and sys.stderr.isatty()
