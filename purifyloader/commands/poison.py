"""`purifyloader poison`: a poisoned copy of a dataset, to test a defence on."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from purifyloader.datasets.named import TORCHVISION, describe, open_dataset
from purifyloader.datasets.select import load
from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons.attacks.registry import ATTACKS, Attack, check_options, find
from purifyloader.poisons.poisoned import Bound, Moved, Poisoned
from purifyloader.poisons.spec import parse
from purifyloader.poisons.writing import check_free, is_npz, write

__all__ = ["DESCRIPTION", "add_options", "listed", "run", "summary"]


DESCRIPTION = (
    "Poison a dataset, for testing defences: what is written here is of no use to train a good model. "
    "The same data, attack, options and seed give the same images. --list says which attacks there are, and what "
    "options they take."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--list", action="store_true", help="list the attacks and their options, and do nothing else")
    add(
        "--attack",
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"{', '.join(ATTACKS)}; with its options, such as lsp:norm=2 or narcissus:trigger=FILE.npy,target_class=2",
    )
    add(
        "--data",
        help="clean images with a class each: cifar10, cifar100, imagefolder, webdataset, .tar files, or "
        "package.module:function",
    )
    add("--root", default="data", help="where a dataset given by name is (default: data)")
    add("--split", choices=("train", "test"), default="train", help="of cifar10 and cifar100 (default: train)")
    add("--size", type=int, metavar="PX", help="resize the shorter side of each image to this, and crop the centre")
    add("--out", type=Path, metavar="WHERE", help="a new file that ends in .npz, or a folder of PNGs, new or empty")
    add(
        "--layout",
        choices=("flat", "class"),
        help="of a folder: <index>.png, in the order of the data, or <class>/<index>.png (default: flat)",
    )
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    poisoned = parser.add_mutually_exclusive_group()
    poisoned.add_argument("--share", type=float, metavar="P", help="poison this share of the images, from 0 to 1")
    poisoned.add_argument("--count", type=int, metavar="N", help="or so many of them (default: as --list says)")
    add(
        "--preset",
        choices=("cpu", "full"),
        help="of an attack that trains a network: small enough for a CPU, or as far as may be as in the paper",
    )
    add("--device", help="of such an attack (default: a GPU where there is one, else cpu)")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`. Returns 0."""
    if options.list:
        print("\n".join(listed()))
        return 0
    if missing := [f"--{name}" for name in ("attack", "data", "out") if getattr(options, name) is None]:
        raise ConfigError(f"{', '.join(missing)} must be given, or --list.")
    attack = find(options.attack.partition(":")[0])
    given = _options(options, parse(options.attack).options)
    if options.device is None and "device" in attack.options:
        given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    if "progress" in attack.options:
        given.setdefault("progress", _progress(options))
    check_options(attack, given)  # before images are read
    if options.layout is not None and is_npz(options.out):
        raise ConfigError(f"--layout is of a folder of images. Got --out {options.out}: leave it out.")
    check_free(options.out)
    clean = _clean(options)
    poisoned: Poisoned = attack.function(clean, options.seed, **given)
    moved = poisoned.moved(clean[0])
    split = f" ({options.split} split)" if options.data in TORCHVISION else ""
    # never a path: results travel
    data = {"description": describe(options.data) + split, "size": options.size}
    poisoned = replace(poisoned, settings={**poisoned.settings, "data": data})
    write(poisoned, options.out, options.layout or "flat")
    print(f"{options.out}: {summary(poisoned, moved)}")
    return 0


def _options(options: argparse.Namespace, of_attack: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the attack, from flags and from behind its name."""
    flags = {
        name: getattr(options, name)
        for name in ("share", "count", "preset", "device")
        if getattr(options, name) is not None
    }
    if twice := [name for name in of_attack if name in flags or name == "seed"]:
        raise ConfigError(f"Each option must be given once, and the seed as --seed. Got {twice[0]!r} in --attack too.")
    return {**flags, **of_attack}


def _progress(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _clean(options: argparse.Namespace) -> tuple[Any, Any]:
    """uint8 (N, H, W, 3) and labels (N,); grey images are repeated."""
    dataset = open_dataset(options.data, options.root, train=options.split == "train")
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise InputError("Expected images in --data. Got an empty dataset.")
    images, labels = load(dataset, range(count), 3, options.size, _progress(options))
    if labels is None:
        raise InputError(
            "An attack needs a class, from 0, for each image in --data. Got images without one: give an imagefolder, "
            "or a dataset of (image, label)."
        )
    return images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()


# -- what is printed ---------------------------------------------------------------------------------


def listed() -> Iterator[str]:
    """A few lines for each attack."""
    yield "Attacks, for testing defences; all are clean-label: what an image is called stays right."
    for attack in ATTACKS.values():
        yield f"{attack.name:<18} {attack.kind:<13} {attack.description} ({attack.paper})"
        yield f"{'':<18} {'options':<13} {', '.join(_said(attack))}"


def _said(attack: Attack) -> Iterator[str]:
    for name, default in attack.options.items():
        if name in ("progress", "networks"):  # of Python's; the first is --quiet here
            continue
        if default is inspect.Parameter.empty:
            yield f"{name} (must be given)"
        elif default is None:
            yield name
        else:
            yield f"{name}={f'{default:.4g}' if isinstance(default, float) else default}"


def summary(poisoned: Poisoned, moved: Moved) -> str:
    """How far the images moved against the bound, in a line."""
    l2, mean = moved.l2_max / 255, moved.l2_mean / 255
    return (
        f"{moved.images:,} of {len(poisoned):,} images changed by {poisoned.attack}, by at most {moved.linf}/255 in a "
        f"value, l2 {l2:.3f} (mean {mean:.3f}), {moved.pixels:,} pixels; {_bound(poisoned.bound)}."
    )


def _bound(bound: Bound | None) -> str:
    if bound is None:
        return "no bound"
    if bound.norm == "l0":
        return f"bound: {bound.epsilon:g} pixel" + ("" if bound.epsilon == 1 else "s")
    if bound.norm == "linf":
        return f"bound: {255 * bound.epsilon:.3g}/255 in a value"
    return f"bound: l2 {bound.epsilon:.3f} before rounding to 8 bits"
