"""Test defences on poisoned data: `purifyloader bench`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING

from purifyloader.bench.defences import ATTACK_SEED, DENOISERS, ROWS_FILE, SCALES, TABLE_FILE, Models, table
from purifyloader.commands.options import add_device, add_dtype, add_processes, add_sets, root_of, settings_of
from purifyloader.core.checks import as_path
from purifyloader.datasets import DATA
from purifyloader.errors import ConfigError
from purifyloader.poisons.attacks.registry import ATTACKS
from purifyloader.victims.presets import TRAININGS, VICTIMS

if TYPE_CHECKING:
    from purifyloader.bench.session import Settings

DESCRIPTION = (
    "Train victims on poisoned data, with and without defences, and test them on clean images. Rows "
    "are kept as they are done: the same command goes on, and any number of processes may run it at once."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=as_path, help=f"folder of the results: {ROWS_FILE}, {TABLE_FILE} and pictures")
    add("--scale", choices=tuple(SCALES), default="cpu", help="preset of all that is not given (default: cpu)")
    add("--data", choices=DATA, help="(default: of the scale: sample, or cifar10)")
    add_sets(parser)
    words = "leave the images that the models learned from out of the training set, rather than to refuse it"
    add("--leave-out", action="store_true", help=words)
    words = (
        f"none, {', '.join(ATTACKS)}, or a poison file; with options, NAME:OPTION=VALUE,...; several "
        "times (default: none, lsp, ar). none, the clean data, is always among them"
    )
    add("--attack", action="append", metavar="ATTACK", help=words)
    words = (
        "with another noise level, in levels of 0 to 255; or FILE.json, a purifier of your own, and FILE.json+B, "
        "+C, +B+C with compensation; several times (default: of the scale; --list)"
    )
    add("--defence", action="append", metavar="NAME[@PX]", help=words)
    add("--seeds", type=int, nargs="+", default=[0], help="of victims (default: 0)")
    words = (
        "of what an attack draws, for all rows; a targeted one has another target for each of --seeds (default: "
        f"{ATTACK_SEED}, so that no attacker's network starts as a victim of --seeds does)"
    )
    add("--attack-seed", type=int, default=ATTACK_SEED, help=words)
    add("--victim", choices=tuple(VICTIMS), help="(default: of the scale: resnet9, or resnet18)")
    words = (
        "transfer-...: on a few images of each class, which are poisoned, from an extractor that has learned from "
        "the others, which are clean; attacks that take networks know it (default: of the scale: short, or paper)"
    )
    add("--training", choices=tuple(TRAININGS), help=words)
    others = ", ".join(f"{model} for {data}" for data, model in DENOISERS.items())
    add("--model", help=f"ECLIPSE's (default: {Models.denoiser}; {others})")
    for field, what in (("energy", "PureGen's energy model"), ("ddpm", "PureGen's diffusion model")):
        add(f"--{field}", default=getattr(Models, field), help=f"{what} (default: {getattr(Models, field)})")
    add("--work", type=as_path, help="folder of poisoned and purified sets, kept for other runs (default: OUT/work)")
    add_device(parser)
    add_dtype(parser, "purifiers and victims")
    add_processes(parser)
    add("--report", action="store_true", help="write the table and pictures of the rows there are, and stop")
    add("--list", action="store_true", help="list attacks and defences, and stop")


def run(options: argparse.Namespace) -> int:
    if options.list:
        print("\n".join(_listed()))
        return 0
    if options.out is None:
        raise ConfigError("--out is required, or --list.")
    from purifyloader.bench.session import make_rows, picture_images, prepare, report
    from purifyloader.commands.processes import run_many

    settings = _settings(options, 0)
    if not options.report:
        session = prepare(settings)
        if options.processes == 1:
            make_rows(session)
        else:
            threads = max(1, (os.cpu_count() or 1) // options.processes)
            run_many(functools.partial(_work, options, threads), options.processes)
        picture_images(session)
    print("\n".join(map(str, report(options.out))))
    return 0


def _settings(options: argparse.Namespace, number: int) -> Settings:
    """Make the settings of a process, by its number: of several GPUs each has one."""
    from purifyloader.bench.session import Settings
    from purifyloader.core.devices import device_of_process

    scale = SCALES[options.scale]
    data = options.data or scale.data
    return settings_of(
        options,
        Settings,
        data=data,
        root=root_of(options, data),
        attacks=options.attack or ("lsp", "ar"),
        preset=scale.preset,
        defences=options.defence or scale.defences,
        victim=options.victim or scale.victim,
        training=options.training or scale.training,
        models=Models(options.model or DENOISERS.get(data, Models.denoiser), options.energy, options.ddpm),
        work=options.work or options.out / "work",
        device=str(device_of_process(options.device, number)),
        fast=options.dtype == "bfloat16",
        progress=options.processes == 1 and sys.stderr.isatty(),
    )


def _work(options: argparse.Namespace, threads: int, number: int) -> None:
    import torch

    from purifyloader.bench.session import make_rows, prepare

    torch.set_num_threads(threads)
    make_rows(prepare(_settings(options, number)))


def _listed() -> list[str]:
    lines = ["attacks (for testing defences), and any poison file that poisons.read knows:"]
    lines += [f"  {name:<18} {attack.description}" for name, attack in ATTACKS.items()]
    lines.append("defences, and a purifier's FILE.json; with @PX another noise level where it says so:")
    for defence in table().values():
        more = " (@PX)" if defence.takes_sigma else " (many calls)" if defence.slow else ""
        lines.append(f"  {defence.name:<18} {defence.description}{more}")
    return lines
