"""Find the images of a back door with wrong labels: `purifyloader sanitize`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from purifyloader.commands import options as shared
from purifyloader.commands.recipe_options import add_recipe_options, optional_purifier_of

if TYPE_CHECKING:
    from purifyloader.sanitize import Verdict

_PNG = "sanitation.png"
_FILES = ("sanitation.json", "arrays.safetensors", "suspects.csv", _PNG)
_WORK = "work"

DESCRIPTION = (
    "Find images with wrong labels that a back door put into a dataset: which classes they are put under, and which "
    "they are. Networks that learn from clean labelled images (--clean) find them unlikely for their label; without "
    "these, purification in rounds (--recipe) takes their label away (DataElixir). Prints a table, and writes a list "
    "for precompute --sanitation. The same command goes on after a stop."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("what to look at")
    shared.add_data(data, "images and labels in doubt")
    shared.add_split(data)
    shared.add_size(data)
    data.add_argument("--image-key", help="where the image is in a sample, if not first or under 'image'")
    data.add_argument("--label-key", help="where the label is, if not beside the image or under 'label'")
    shared.add_clean(data, "clean images of the same classes with right labels, none of --data")
    shared.add_split(data, "--clean-split", "test")

    how = parser.add_argument_group("how")
    words = "the evidence that decides (default: reference with --clean, else published)"
    how.add_argument("--by", choices=("reference", "outflow", "inflow", "published"), help=words)
    words = "yours, package.module:function of (training set, seed) that returns a predictor (default: built in)"
    how.add_argument("--train-function", metavar="FUNCTION", help=words)
    how.add_argument("--rounds", type=shared.positive, default=5, metavar="N", help="of purification (default: 5)")
    shared.add_seed(how, "trainings and noise")
    shared.add_device(how)
    shared.add_threads(how, "all cores")
    add_recipe_options(parser.add_argument_group("purification", "None without --recipe."), required=False)

    results = parser.add_argument_group("results")
    shared.add_results(results, *_FILES)


def _draw(verdict: Verdict, dataset: Any, options: argparse.Namespace) -> str:
    from purifyloader.results.figures import has_matplotlib
    from purifyloader.sanitize.pictures import picture

    if not has_matplotlib():
        return "no picture without matplotlib: pip install 'purifyloader[plots]'"
    return f"picture: {picture(verdict, dataset, options.out / _PNG, image_key=shared.as_key(options.image_key))}"


def run(options: argparse.Namespace) -> int:
    import sys

    import torch

    from purifyloader import sanitize
    from purifyloader.certify.functions import named_training
    from purifyloader.core.devices import device_of_process
    from purifyloader.datasets.named import open_dataset
    from purifyloader.errors import InputError
    from purifyloader.results.folder import check_out
    from purifyloader.results.values import to_json
    from purifyloader.sanitize.report import table
    from purifyloader.sanitize.scoring import default_training

    if options.out is None:
        raise InputError("is where the list of suspects is written. Got none: give a folder.", argument="out")
    check_out(options.out, _FILES, options.overwrite, "a sanitation")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = device_of_process(options.device, 0)
    purifier = optional_purifier_of(options)
    dataset = open_dataset(options.data, options.root, train=options.split == "train")
    reference = None
    if options.clean is not None:
        is_train = options.clean_split == "train"
        reference = open_dataset(options.clean, options.clean_root or options.root, train=is_train)
    train = default_training(device) if options.train_function is None else named_training(options.train_function)
    verdict = sanitize.sanitize(
        dataset,
        purifier if purifier is None else purifier.to(device),
        reference=reference,
        by=options.by,
        rounds=options.rounds,
        train=train,
        seed=options.seed,
        size=options.size,
        image_key=shared.as_key(options.image_key),
        label_key=shared.as_key(options.label_key),
        work=options.out / _WORK,
        progress=shared.shows_progress(options),
    )
    verdict.save(options.out)
    written = [f"results: {options.out / name}" for name in _FILES[:-1]]
    written.append(_draw(verdict, dataset, options))
    print(to_json(verdict.to_dict()) if options.json else "\n".join([*table(verdict), ""]), end="")
    print("\n".join(written), file=sys.stderr if options.json else sys.stdout)
    return 0
