"""List the models that ship with the library: `purifyloader models`."""

from __future__ import annotations

import argparse

from purifyloader.errors import PurifyError

DESCRIPTION = (
    "List the models that ship with the library: their names, sizes, and the noise that they were trained for."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add none: the command has no options."""


def run(options: argparse.Namespace) -> int:
    """Print a line for each model that ships, also for one that cannot be read; no weights are loaded."""
    from purifyloader.pretrained.checkpoint import summary
    from purifyloader.pretrained.registry import available, find

    for name in available():
        try:
            model = summary(find(name))
            words = f"{model.parameters / 1e6:>6.2f} M parameters, {model.words}"
        except PurifyError as error:
            words = f"cannot be read: {' '.join(str(error).split())}"
        print(f"{name:<23} {words}")
    return 0
