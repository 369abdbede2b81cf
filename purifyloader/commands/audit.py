"""`purifyloader audit energy`: which images of a dataset an energy model finds unusual."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from purifyloader import pretrained
from purifyloader.audit.compare import audit_energy
from purifyloader.audit.energies import DatasetEnergies, dataset_energies
from purifyloader.audit.pictures import picture
from purifyloader.audit.report import ranked_csv, sizes_in_words, table
from purifyloader.audit.truth import read_poisoned
from purifyloader.commands.evaluate import to_json
from purifyloader.commands.inputs import tell_learned
from purifyloader.commands.options import add_device
from purifyloader.core.devices import device_of_process
from purifyloader.core.version import __version__
from purifyloader.datasets.named import TORCHVISION, describe, open_dataset
from purifyloader.datasets.select import choose, choose_images, read_indices
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.learned import Learned, learned_images
from purifyloader.results.folder import check_out, write_results

__all__ = ["DESCRIPTION", "add_options", "CSV_FILE", "JSON_FILE", "PICTURE_FILE", "run"]

JSON_FILE = "audit.json"
CSV_FILE = "audit.csv"
PICTURE_FILE = "audit.png"

MODEL = "cifar10-energy"
_REFERENCE = 2000  # twenty images lie above the 99th percentile, which is then known to a fifth
_MANY_SHAPES = 8


DESCRIPTION = (
    "Rank the images of a dataset by an energy model, and compare them with clean images. High energy: "
    "unlike the clean images that the model was trained on. Prints a table."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="images to look at: cifar10, cifar100, imagefolder, webdataset, a folder of images, .tar files, or "
        "package.module:function",
    )
    add("--root", default="data", help="where a dataset given by name is (default: data)")
    add("--split", choices=("train", "test"), default="train", help="of a torchvision dataset (default: train)")
    add("--reference", help="images known to be clean, given like --data")
    add("--reference-root", help="where a reference given by name is (default: --root)")
    add("--reference-split", choices=("train", "test"), default="test", help="(default: test)")
    add("--model", default=MODEL, help=f"an energy model that ships, or a checkpoint's folder (default: {MODEL})")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--count", type=int, metavar="N", help="look at N images, chosen at random (default: all)")
    chosen.add_argument("--indices", type=Path, metavar="FILE", help="look at the images listed in this JSON file")
    add(
        "--reference-count",
        type=int,
        metavar="N",
        help=f"use N images of the reference, chosen at random (default: {_REFERENCE})",
    )
    add("--choose-seed", type=int, default=0, help="decides which images are chosen at random (default: 0)")
    add("--size", type=int, metavar="PX", help="resize the shorter side of each image to this, and crop the centre")
    add(
        "--poisoned",
        type=Path,
        metavar="FILE",
        help="the images known to be poisoned, to judge by: a JSON list of their indices or, in a folder, of their "
        "file names below it, or such a name a line",
    )
    add(
        "--top",
        type=float,
        nargs="+",
        default=[1, 5, 10, 50],
        metavar="PERCENT",
        help="among which highest energies the poisoned are counted (default: 1 5 10 50)",
    )
    add_device(parser)
    add("--out", type=Path, metavar="FOLDER", help=f"write {JSON_FILE}, {CSV_FILE} and {PICTURE_FILE} there")
    add("--overwrite", action="store_true", help="replace these files")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`. Returns 0."""
    device = device_of_process(options.device, 0)
    check_out(options.out, (JSON_FILE, CSV_FILE, PICTURE_FILE), options.overwrite, "an audit")
    if bad := [percent for percent in options.top if not 0 < percent <= 100]:
        raise InputError(f"--top must be percentages above 0, at most 100. Got {bad[0]:g}.")
    energy = pretrained.load(options.model, kind="energy").to(device)
    dataset = _dataset(options)
    poisoned = None if options.poisoned is None else read_poisoned(options.poisoned, dataset, "--data")
    data, said = _data(options, energy, dataset)
    reference: DatasetEnergies | None = None
    said_of_reference: dict[str, Any] = {}
    if options.reference is not None:
        reference, said_of_reference = _reference(options, energy)
        _warn_of_sizes(data, reference)
    temperature = energy.temperature
    results = audit_energy(
        data, reference, poisoned=poisoned, top=options.top, temperature=temperature, seed=options.choose_seed
    )
    results = {
        **results,
        "purifyloader": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "model": {
            "name": energy.name,
            "weights_sha256": weights_sha256(energy),
            "parameters": sum(p.numel() for p in energy.parameters()),
        },
        "data": {**results["data"], **said},
        "reference": None if reference is None else {**results["reference"], **said_of_reference},
    }
    text = to_json(results)
    written: list[str] = []
    if options.out is not None:  # before anything is printed, to a pipe that may be closed
        files = {CSV_FILE: ranked_csv(data, reference, poisoned=poisoned, temperature=temperature), JSON_FILE: text}
        write_results(options.out, files, PICTURE_FILE, lambda path: picture(results, path), written.append)
    print(text if options.json else "\n".join([*table(results, data, reference), ""]), end="")
    if written:
        print("\n".join(written), file=sys.stderr if options.json else sys.stdout)
    return 0


def _progress(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _dataset(options: argparse.Namespace) -> Dataset[Any]:
    dataset = open_dataset(options.data, options.root, train=options.split == "train")
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError("Expected images in --data. Got an empty dataset.")
    return dataset


def _data(
    options: argparse.Namespace, energy: EnergyNetwork, dataset: Dataset[Any]
) -> tuple[DatasetEnergies, dict[str, Any]]:
    """All images asked for: those trained on too, for their owner wants to see each ranked."""
    length = len(dataset)  # type: ignore[arg-type]
    indices: Sequence[int] = range(length)
    if options.indices is not None:
        indices = read_indices(options.indices)
    elif options.count is not None:
        if not 1 <= options.count <= length:
            raise InputError(f"--count must be from 1 to {length}, the images in --data. Got {options.count}.")
        indices = choose(length, options.count, options.choose_seed)
    learned = learned_images([options.model], dataset, options.data, energy.config.image_channels, _progress(options))
    data = dataset_energies(
        energy,
        dataset,
        indices,
        size=options.size,
        learned=learned.finder(options.size),
        what="--data",
        progress=_progress(options),
    )
    if len(data.shapes) > _MANY_SHAPES:
        print(
            f"purifyloader: warning: --data has images of {len(data.shapes)} sizes. Energies of different sizes "
            "compare only roughly, and this is slow: give --size to bring all to one.",
            file=sys.stderr,
        )
    _tell_trained_on(learned, data)
    return data, {**_said(options.data, options.split), "length": length, "trained_on": data.learned}


def _tell_trained_on(learned: Learned, data: DatasetEnergies) -> None:
    if data.learned:
        what = f"the model was trained on {data.learned:,} of the {len(data):,} images in --data, which lowers"
    elif seen := len(learned.doubtful.intersection(data.indices)):
        what = f"the model may have been trained on {seen:,} of the {len(data):,} images in --data, which would lower"
    elif learned.silent:
        what = f"{' and '.join(learned.silent)} does not say which images it was trained on: some of --data would lower"
    else:
        return
    print(f"purifyloader: note: {what} their energies.", file=sys.stderr)


def _said(spec: str, split: str) -> dict[str, Any]:
    """Never a path: results travel."""
    return {"description": describe(spec) + (f" ({split} split)" if spec in TORCHVISION else "")}


def _reference(options: argparse.Namespace, energy: EnergyNetwork) -> tuple[DatasetEnergies, dict[str, Any]]:
    """Clean images, none that the model was trained on."""
    root = options.root if options.reference_root is None else options.reference_root
    dataset = open_dataset(options.reference, root, train=options.reference_split == "train")
    length = len(dataset)  # type: ignore[arg-type]
    if not length:
        raise InputError("Expected images in --reference. Got an empty dataset.")
    progress, channels = _progress(options), energy.config.image_channels
    learned = learned_images([options.model], dataset, options.reference, channels, progress)
    try:
        indices, left_out = choose_images(
            dataset,
            options.reference_count,
            options.choose_seed,
            _REFERENCE,
            learned=learned.finder(options.size),
        )
    except InputError as error:
        if error.argument == "count":
            raise InputError(error.message, argument="reference_count") from None
        raise InputError(f"--reference: {error}") from None
    reference = dataset_energies(energy, dataset, indices, size=options.size, what="--reference", progress=progress)
    tell_learned(learned, indices, left_out, length, "--reference")
    said = _said(options.reference, options.reference_split)
    return reference, {**said, "length": length, "trained_on_left_out": left_out}


def _warn_of_sizes(data: DatasetEnergies, reference: DatasetEnergies) -> None:
    if data.shapes.keys() != reference.shapes.keys():
        print(
            f"purifyloader: warning: the images in --data have {sizes_in_words(data.shapes)}, those in --reference "
            f"{sizes_in_words(reference.shapes)}. Energies of different sizes do not compare: give --size to bring all "
            "to one.",
            file=sys.stderr,
        )
