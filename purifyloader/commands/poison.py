"""Poison a copy of a dataset, to test a defence on it: `purifyloader poison`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from purifyloader.commands import options as shared
from purifyloader.core.checks import as_path
from purifyloader.errors import ConfigError, InputError

if TYPE_CHECKING:
    from purifyloader.poisons.attacks.registry import Attack
    from purifyloader.poisons.poisoned import Bound, Moved, Poisoned

DESCRIPTION = (
    "Poison a dataset, for testing defences: what is written here is of no use to train a good model. "
    "The same data, attack, options and seed give the same images. --list says which attacks there are, and what "
    "options they take."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--list", action="store_true", help="list the attacks and their options, and stop")
    words = (
        "an attack of --list with its options, such as lsp:norm=2,count=500, tap:preset=full or "
        "narcissus:trigger=FILE.npy,target_class=2"
    )
    add("--attack", metavar="NAME[:OPTION=VALUE,...]", help=words)
    shared.add_data(parser, "clean images with a class each", required=False)
    shared.add_split(parser)
    shared.add_size(parser)
    add("--out", type=as_path, metavar="WHERE", help="a new file that ends in .npz, or a folder of PNGs, new or empty")
    words = "of a folder: <index>.png, in the order of the data, or <class>/<index>.png (default: flat)"
    add("--layout", choices=("flat", "class"), help=words)
    shared.add_seed(parser, "all that is random")
    shared.add_device(parser)
    shared.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Write the poisoned copy, and print how far its images moved."""
    if options.list:
        print("\n".join(listed()))
        return 0
    if missing := [f"--{name}" for name in ("attack", "data", "out") if getattr(options, name) is None]:
        raise ConfigError(f"{', '.join(missing)} must be given, or --list.")
    from purifyloader.core.devices import device_of_process
    from purifyloader.datasets.named import TORCHVISION, describe
    from purifyloader.poisons.attacks.registry import check_options, find
    from purifyloader.poisons.spec import parse
    from purifyloader.poisons.writing import check_free, is_npz, write

    attack = find(options.attack.partition(":")[0])
    given = dict(parse(options.attack).options)
    if options.device is not None or "device" in attack.options:
        given.setdefault("device", str(device_of_process(options.device, 0)))
    if "progress" in attack.options:
        given.setdefault("progress", shared.shows_progress(options))
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


def _clean(options: argparse.Namespace) -> tuple[Any, Any]:
    """Read uint8 (N, H, W, 3) and labels (N,); grey images are repeated."""
    from purifyloader.datasets.named import open_dataset
    from purifyloader.datasets.select import load

    dataset = open_dataset(options.data, options.root, train=options.split == "train")
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise InputError("Expected images in --data. Got an empty dataset.")
    images, labels = load(dataset, range(count), 3, options.size, shared.shows_progress(options), "--data")
    if labels is None:
        raise InputError(
            "An attack needs a class, from 0, for each image in --data. Got images without one: give an imagefolder, "
            "or a dataset of (image, label)."
        )
    return images.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()


def listed() -> Iterator[str]:
    """Yield a few lines for each attack."""
    from purifyloader.poisons.attacks.registry import ATTACKS

    yield "Attacks, for testing defences. The labels of images stay right unless a line says that they become wrong."
    for attack in ATTACKS.values():
        labels = "" if attack.keeps_labels else "; labels become wrong"
        yield f"{attack.name:<18} {attack.kind:<13} {attack.description} ({attack.paper}){labels}"
        yield f"{'':<18} {'options':<13} {', '.join(_attack_options(attack))}"


def _attack_options(attack: Attack) -> Iterator[str]:
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
    """Say in a line how far the images moved against the bound."""
    l2, mean = moved.l2_max / 255, moved.l2_mean / 255
    wrong = int((poisoned.labels != poisoned.shown_labels).sum())
    return (
        f"{moved.images:,} of {len(poisoned):,} images changed by {poisoned.attack}, by at most {moved.linf}/255 in a "
        f"value, l2 {l2:.3f} (mean {mean:.3f}), {moved.pixels:,} pixels; {_bound(poisoned.bound)}"
        + (f"; {wrong:,} labels made wrong." if wrong else ".")
    )


def _bound(bound: Bound | None) -> str:
    if bound is None:
        return "no bound"
    if bound.norm == "l0":
        return f"bound: {bound.epsilon:g} pixel" + ("" if bound.epsilon == 1 else "s")
    if bound.norm == "linf":
        return f"bound: {255 * bound.epsilon:.3g}/255 in a value"
    return f"bound: l2 {bound.epsilon:.3f} before rounding to 8 bits"
