"""List the models that ship with the library: `purifyloader models`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from purifyloader.errors import PurifyError

DESCRIPTION = (
    "List the models that ship with the library: their names, sizes, and the noise that they were trained for."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add none: the command has no options."""


def run(options: argparse.Namespace) -> int:
    for line in _lines():
        print(line)
    return 0


def _lines() -> Iterator[str]:
    """Yield a line for each model that ships, also for one that cannot be read; no weights are loaded."""
    from purifyloader.pretrained.checkpoint import summary
    from purifyloader.pretrained.registry import available, find

    for name in available():
        try:
            model = summary(find(name))
        except PurifyError as error:
            yield f"{name:<23} cannot be read: {' '.join(str(error).split())}"
            continue
        yield f"{name:<23} {model.parameters / 1e6:>6.2f} M parameters, {model.words}"
