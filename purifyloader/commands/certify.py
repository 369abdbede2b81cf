"""Certify how far training images may be changed: `purifyloader certify`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from purifyloader.commands import options as shared
from purifyloader.core.checks import as_path
from purifyloader.datasets import DATA
from purifyloader.errors import ConfigError

if TYPE_CHECKING:
    from purifyloader.certify.session import Settings

DESCRIPTION = (
    "Noise and denoise the training set once for each of many models, let them vote on test images, "
    "and say how far the training images could be changed without changing the vote (Hong, Carlini & Kurakin). "
    "Votes are kept as they are made: the same command goes on after a stop, and any number of processes may run "
    "it at once. On several GPUs: accelerate launch -m purifyloader certify, with the same options."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=as_path, help="folder of the results: JSON, a page, a picture, and the votes")
    add("--estimate", action="store_true", help="measure one model, say what all will take and could give, and stop")

    data = parser.add_argument_group("what is certified")
    words = f"{', '.join(DATA)}, or package.module:function that returns a training and a test set (default: sample)"
    data.add_argument("--data", default="sample", metavar="NAME", help=words)
    shared.add_sets(data)

    noise_group = parser.add_argument_group("noise")
    noise = noise_group.add_argument
    noise("--sigma", type=float, nargs="+", help="levels, in units of [0, 1] images (default: 0.25, which is 63.75 px)")
    shared.add_model(noise_group, "it takes the noise off", default="cifar10-sparse-wide")
    noise("--plain", action="store_true", help="measure each level without denoising, too")
    noise("--recipe", type=as_path, action="append", default=[], metavar="FILE", help="JSON of a purifier of your own")
    words = "fixed draws of each image a model; costs sqrt(K) of a radius"
    noise("--draws", type=int, default=1, metavar="K", help=words)
    shared.add_dtype(noise_group, "the denoiser and the built-in training")

    votes = parser.add_argument_group("votes").add_argument
    votes("--models", type=int, default=100, metavar="M", help="whose votes are counted for the radius (default: 100)")
    votes("--selection", type=int, default=10, metavar="N", help="others, which choose the class (default: 10)")
    votes("--alpha", type=float, default=0.001, help="how often a certificate may be false (default: 0.001)")
    votes("--radius", type=float, help="with --estimate: say how many models such a radius takes at least")
    votes("--triggered", action="store_true", help="test images may be changed too: no certificate covers that")
    votes(
        "--learned-elsewhere",
        action="store_true",
        help="state that no model has learned from these images, where the model does not say",
    )
    votes("--empirical", action="store_true", help="train and vote where there is no certificate to be had, too")

    training = parser.add_argument_group("training").add_argument
    words = "yours, package.module:function of (training set, seed) that returns a predictor (default: built in)"
    training("--train-function", metavar="FUNCTION", help=words)
    words = "a network of `purifyloader bench --list` (default: a ResNet-9 of --width)"
    training("--victim", metavar="NAME", help=words)
    training("--width", type=int, help="channels of its first layer (default: 16)")
    training("--pool", type=int, metavar="PX", help="average squares of so many pixels (default: 2)")
    training("--pad", type=int, metavar="PX", help="furthest that a random crop moves (default: 1)")
    training("--epochs", type=int, help="of a model's training (default: 10)")
    training("--batch-size", type=int, help="of a model's training (default: 64)")
    training("--learning-rate", type=float, help="highest learning rate of the cycle (default: 0.2)")
    words = (
        "go on from a network that has learned from this: other images, as --data of precompute names them, or "
        "train, the training images themselves without noise, which leaves no certificate"
    )
    training("--warm-start", metavar="DATA", help=words)
    training("--warm-start-root", type=as_path, default=Path("data"), help="where these are (default: data)")
    training("--warm-start-epochs", type=int, default=8, help="of that network's training (default: 8)")

    where = parser.add_argument_group("where")
    shared.add_device(where)
    shared.add_processes(where)
    shared.add_threads(where, "1; it decides the last bit of a model", 1)
    shared.add_quiet(where)


def run(options: argparse.Namespace) -> int:
    """Train, vote and write the results, or estimate what that will take."""
    import torch

    from purifyloader.certify.session import estimate, move_to, prepare, vote, vote_folders, write
    from purifyloader.commands.processes import run_many
    from purifyloader.purified.filling import place

    if options.out is None and not options.estimate:
        raise ConfigError("--out is required, or --estimate.")
    rank, world_size = place(None, None)
    if options.processes > 1 and world_size > 1:
        raise ConfigError("Processes are started by --processes or by a launcher. Got both: leave --processes out.")
    settings = _settings(options, str(move_to(options.device, rank)))
    torch.set_num_threads(settings.threads)
    ready = prepare(settings)
    if options.estimate:
        if rank == 0:
            print(estimate(ready, max(options.processes, world_size)))
        return 0
    if options.processes > 1:
        vote_folders(ready)  # other settings are said once, not by each process
        run_many(functools.partial(_work, options), options.processes)
    vote(ready, shown=rank == 0 and not options.quiet)  # after other processes: what a dead one has left
    if rank == 0:
        print("\n".join(write(ready)))
    return 0


def _settings(options: argparse.Namespace, device: str) -> Settings:
    from purifyloader.certify.session import BUILT_IN, Settings

    return shared.settings_of(
        options,
        Settings,
        root=shared.root_of(options, options.data),
        sigma=options.sigma or ([] if options.recipe else [0.25]),
        fast=options.dtype == "bfloat16",
        built_in=shared.given(options, BUILT_IN),
        only_estimate=options.estimate,
        device=device,
    )


def _work(options: argparse.Namespace, number: int) -> None:
    import torch

    from purifyloader.certify.session import move_to, prepare, vote

    settings = _settings(options, str(move_to(options.device, number)))
    torch.set_num_threads(settings.threads)
    vote(prepare(settings), shown=number == 0 and not options.quiet)
