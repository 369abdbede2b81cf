"""Rank the images of a dataset by how unusual an energy model finds them: `purifyloader audit energy`."""

from __future__ import annotations

import argparse

from purifyloader.commands import options as shared
from purifyloader.core.checks import as_path

_JSON, _CSV, _PNG = "audit.json", "audit.csv", "audit.png"

DESCRIPTION = (
    "Rank the images of a dataset by an energy model, and compare them with clean images. High energy: "
    "unlike the clean images that the model was trained on. Prints a table."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    shared.add_data(parser, "images to look at")
    shared.add_split(parser)
    shared.add_choice(parser, "all")
    shared.add_size(parser)
    shared.add_clean(parser, "images known to be clean")
    shared.add_split(parser, "--clean-split", "test")
    add("--clean-count", type=shared.positive, metavar="N", help="use N clean images, drawn at random (default: 2000)")
    shared.add_model(parser, "it ranks the images", energy=True, default="cifar10-energy")
    add(
        "--truth",
        dest="poisoned",  # elsewhere --poisoned is poison to try
        type=as_path,
        metavar="FILE",
        help="the images known to be poisoned, to judge by: a JSON list of their indices or, in a folder, of their "
        "file names below it, or such a name a line",
    )
    words = "among which highest energies the poisoned are counted (default: 1 5 10 50)"
    add("--top", type=float, nargs="+", default=[1, 5, 10, 50], metavar="PERCENT", help=words)
    shared.add_device(parser)
    shared.add_results(parser, _JSON, _CSV, _PNG)


def run(options: argparse.Namespace) -> int:
    from purifyloader.audit.pictures import picture
    from purifyloader.audit.report import table
    from purifyloader.audit.session import Settings, audit
    from purifyloader.commands.reporting import report
    from purifyloader.core.devices import device_of_process
    from purifyloader.results.folder import check_out

    device, settings = device_of_process(options.device, 0), shared.settings_of(options, Settings)
    check_out(options.out, (_JSON, _CSV, _PNG), options.overwrite, "an audit")
    results, data, reference, _ = done = audit(settings, device, progress=shared.shows_progress(options))
    texts = {_CSV: done.csv()} if options.out is not None else {}
    lines = table(results, data, reference)
    report(options, results, lines, (_JSON, _PNG), lambda path: picture(results, path), texts)
    return 0
