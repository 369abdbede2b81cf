"""Share what the training commands have in common: their options, their processes, and the clean images."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from purifyloader.commands.options import DTYPES, add_choice, add_data, add_device, add_quiet, add_size
from purifyloader.errors import CheckpointError, ConfigError, InputError, TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CleanSet",
    "Place",
    "add_card",
    "add_how",
    "add_images",
    "add_run",
    "clean_set",
    "details",
    "fields_of",
    "held_out_images",
    "machine",
    "print_estimate",
    "processes",
    "run_training",
    "start_name",
]

log = logging.getLogger("purifyloader")

_NAMED = ("cifar10", "cifar100")  # whose --validation is their test split


class Place(NamedTuple):
    """One process of a training: its rank, its device, and whether it is to print no progress."""

    rank: int
    device: torch.device
    quiet: bool


def add_images(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the options that say which images; `purpose` is what the held-out ones are for."""
    data = parser.add_argument_group("the clean images")
    add_data(data, "clean images")
    add_choice(data, "all")
    add_size(data)
    data.add_argument(
        "--validation",
        help=f"clean images to {purpose}: like --data, where cifar10 and cifar100 mean the test split, or none "
        "(default: images of --data that are not trained on; a twentieth of them if all were chosen)",
    )
    data.add_argument("--validation-count", type=int, default=1000, help="at most (default: 1000)")


def add_how(parser: argparse.ArgumentParser, presets: str, steps: str, batch: str) -> argparse._ArgumentGroup:
    """Add the options of the optimisation that every kind of model has.

    Args:
        presets: a few words on each.
        steps, batch: the help of --steps and --batch-size.
    """
    how = parser.add_argument_group("how")
    how.add_argument("--preset", default="light", metavar="NAME", help=presets)
    how.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON of fields that replace the preset's, or a checkpoint's config.json: all of them",
    )
    how.add_argument("--start-from", metavar="MODEL", help="a model whose weights to start from, with its network")
    how.add_argument("--steps", type=int, help=steps)
    how.add_argument("--batch-size", type=int, help=batch)
    how.add_argument("--learning-rate", type=float, help="of the optimiser (default: of the preset)")
    how.add_argument("--seed", type=int, help="of the weights and of all noise (default: 0)")
    how.add_argument("--dtype", choices=DTYPES, help="arithmetic of the network (default: of the preset)")
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the network (default: on a GPU, where it pays)",
    )
    return how


def add_run(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say where and how it runs."""
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, help="folder for the checkpoint (and, until it is done, the run's state)")
    run.add_argument("--estimate", action="store_true", help="print what it would cost on this machine, and stop")
    add_device(run)
    run.add_argument("--save-every", type=float, default=60.0, metavar="S", help="seconds between states (default: 60)")
    add_quiet(run)
    return run


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add the options that the card repeats."""
    about = parser.add_argument_group("the card")
    about.add_argument("--name", help="of the model (default: the folder's)")
    about.add_argument("--description", help="what the images are (default: --data)")
    about.add_argument("--validation-description", help="what the held-out images are (default: --validation)")
    about.add_argument("--licence", help="of the images and so of the weights")
    about.add_argument("--note", help="what else the card should say")


def run_training(
    options: argparse.Namespace, pictures: Sequence[str], train: Callable[[CleanSet, Place], None]
) -> None:
    """Call `train` in this process of a launcher's, with the images, while --out is this run's alone.

    Args:
        options: those of `add_images` and `add_run`.
        pictures: names of the pictures that the command writes.
        train: what is to be done.

    Raises:
        InputError, CheckpointError, TrainingError: --out is not fit for it.
    """
    with processes(options.device) as (rank, device):
        quiet: bool = options.quiet or rank > 0
        logging.basicConfig(format="%(message)s")
        logging.getLogger("purifyloader").setLevel(logging.WARNING if quiet else logging.INFO)
        if not options.estimate:
            if options.out is None:
                raise InputError("Give --out, a folder for the checkpoint, or --estimate.")
            _check_out(options.out)
        with _alone(options, rank, pictures):
            train(clean_set(options, quiet), Place(rank, device, quiet))


def _check_out(out: Path) -> None:
    """Refuse before hours of training what could not be written after them.

    Files beside the state of a run, without config.json, are of a save that was killed: written again.
    """
    from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE
    from purifyloader.train.state import STATE_FILE

    if out.exists() and not out.is_dir():
        raise InputError(f"Expected a folder as --out. Got the file {out}.")
    found = [name for name in (CONFIG_FILE, MODEL_FILE, CARD_FILE) if (out / name).exists()]
    if CONFIG_FILE in found or (found and not (out / STATE_FILE).exists()):
        raise CheckpointError(
            f"Expected a folder without a checkpoint. Got {out} with {', '.join(found)}: give another --out."
        )


@contextlib.contextmanager
def processes(name: str | None) -> Iterator[tuple[int, torch.device]]:
    """Yield (rank, device), joined with the other processes where a launcher started several."""
    import torch

    from purifyloader.core.devices import as_device

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


def start_name(options: argparse.Namespace, named: Mapping[str, Any] | None) -> str | None:
    """Return the model to start from: --start-from, else the one that a --config names; None for random weights.

    Raises:
        ConfigError: the configuration names one that is not here.
    """
    from purifyloader.pretrained.registry import is_local

    if options.start_from is not None or named is None:
        start: str | None = options.start_from
        return start
    # a name in somebody's file must not lead to a download
    if named["name"] is None or not is_local(named["name"]):
        raise ConfigError(
            f"{options.config} starts from the weights {named['weights_sha256'][:16]} of {named['name'] or 'a model'}. "
            "Got no such model here: give its folder as --start-from."
        )
    return str(named["name"])


@contextlib.contextmanager
def _alone(options: argparse.Namespace, rank: int, pictures: Sequence[str]) -> Iterator[None]:
    """Lock --out while the run lasts: two that write to one folder would undo each other's work.

    Args:
        pictures: names of those that the command writes. What killed saves have left of all files is removed.

    Raises:
        TrainingError: another process trains into it.
    """
    from purifyloader.files.locks import Lock, lock_path
    from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE
    from purifyloader.train.curves import CURVES_CSV
    from purifyloader.train.state import STATE_FILE, tidy, writing

    if options.estimate or rank > 0:
        yield
        return
    made = not options.out.exists()
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    lock = Lock(options.out, STATE_FILE)
    try:
        if not lock.acquire(wait=False):
            raise TrainingError(
                f"Expected --out to be for this run alone. Got {options.out}, into which "
                "another process is training now: wait for it, stop it, or give another folder."
            )
        if lock.real:  # else another run may be writing just now
            tidy(options.out, (STATE_FILE, CURVES_CSV, CONFIG_FILE, MODEL_FILE, CARD_FILE, *pictures))
        try:
            yield
        finally:
            lock_path(options.out, STATE_FILE).unlink(missing_ok=True)
            lock.release()
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: a state, or a checkpoint
                options.out.rmdir()


@dataclass(frozen=True)
class CleanSet:
    """The images to train on.

    Attributes:
        dataset: all there are, of which there are `length`.
        indices: those to train on, and the `held_out` ones where no other dataset is for that; rising.
        images: uint8 (N, C, H, W) at `indices`.
    """

    dataset: Any
    length: int
    indices: list[int]
    images: Tensor
    held_out: list[int] = field(default_factory=list)


def clean_set(options: argparse.Namespace, quiet: bool) -> CleanSet:
    """Read the images that the options of `add_images` name."""
    from purifyloader.datasets.named import open_dataset
    from purifyloader.datasets.select import choose, hold_out, load_images, read_indices

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
    return CleanSet(dataset, length, indices, images, held_out)


def held_out_images(options: argparse.Namespace, clean: CleanSet, quiet: bool) -> tuple[Tensor | None, str]:
    """Return the held-out images, and what they are, for the card."""
    from purifyloader.datasets.named import describe, open_dataset
    from purifyloader.datasets.select import choose, load_images

    if options.validation == "none" or (options.validation is None and not clean.held_out):
        return None, ""
    chosen: Sequence[int]
    if options.validation is None:
        what, source, chosen = "images of the same data that it was not trained on", clean.dataset, clean.held_out
    else:
        source = open_dataset(options.validation, options.root, train=False)
        if options.validation_count < 1:
            raise InputError(f"must be at least 1. Got {options.validation_count}.", argument="validation_count")
        length = len(source)  # type: ignore[arg-type]
        count = min(options.validation_count, length)
        # a folder may be sorted by class; the named test splits are shuffled, and their first images comparable
        chosen = range(count) if options.validation in _NAMED else choose(length, count, options.choose_seed)
        what = f"images of {describe(options.validation)}" + (", test split" if options.validation in _NAMED else "")
    what = options.validation_description or what
    loaded = load_images(source, chosen, size=options.size, channels=clean.images.shape[1], progress=not quiet)
    trained = {image.numpy().tobytes() for image in clean.images}
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


def details(
    options: argparse.Namespace, clean: CleanSet, held_out: str, config: Any, record: Any, where: str
) -> dict[str, Any]:
    """Collect what a checkpoint says of its training, whatever was trained."""
    from purifyloader.core.version import __version__
    from purifyloader.datasets.named import describe
    from purifyloader.files.hashes import hashes_as_text, image_hashes
    from purifyloader.train.state import images_sha256

    return {
        "purifyloader": __version__,
        # never a path: the card travels
        "data": options.description or describe(options.data),
        "data_length": clean.length,
        "image_size": list(clean.images.shape[-2:]),
        "resized": options.size,
        "indices": clean.indices,
        "images_sha256": images_sha256(clean.images),
        # of each, so that a bench can tell whether a set it tests on holds one of them
        "image_hashes": hashes_as_text(image_hashes(clean.images.permute(0, 2, 3, 1).numpy())),
        "held_out": held_out,
        "train": config.to_dict(),
        "record": record,
        "machine": where,
        "licence": options.licence,
        "note": options.note,
    }


def machine(device: torch.device) -> str:
    """Name the machine, for a card: its GPU, or its CPU's threads and kind."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)} ({platform.machine()})"


def print_estimate(measured: Any, config: Any, place: Place) -> None:
    """Print what a training will cost, once for all processes."""
    from purifyloader.train import plan

    if place.rank == 0:
        print(plan.report(measured, config, machine(place.device), datetime.datetime.now()))


def fields_of(path: Path, of_checkpoint: Callable[[Mapping[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Read fields of a configuration from JSON: the fields themselves, or a checkpoint's config.json.

    Args:
        path: of --config.
        of_checkpoint: takes the fields out of a checkpoint's configuration; by default its "details", "train".

    Raises:
        InputError: no such file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"must be a JSON file of training fields. Got {path}: {error}.", argument="config") from None
    if isinstance(values, dict) and isinstance(values.get("details"), dict):
        values = values["details"].get("train") if of_checkpoint is None else of_checkpoint(values)
    if not isinstance(values, dict):
        raise InputError(
            "must be a JSON object of training fields, or the config.json of a model trained here. "
            f"Got {path}, which is neither.",
            argument="config",
        )
    return values
