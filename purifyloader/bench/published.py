"""Read published figures, which stand beside measured ones and never among them.

They are in `published.csv`, one figure a line: other poisons, victims and clean sets than the bench's own.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["DATA", "Published", "tables"]

DATA = ("sample", "cifar10")
"""Data of a bench beside which the figures may stand: all are of CIFAR-10, and the sample is a part of it."""

_CAPTIONS = {
    "eclipse": "Wang et al., ECLIPSE (ESORICS 2024), Tables 1, 3 and 4: CIFAR-10, ResNet-18, test accuracy in %; the "
    "bounds of the attacks are not named",
    "dune": "Wang et al., DUNE (ICML 2026), at second hand: test accuracy in %, CUDA without a bound; which data, "
    "victim and other bounds is not known here, but what ECLIPSE's paper has too, on CIFAR-10 and ResNet-18, is within "
    "5 points",
    "puregen": "Bhat et al., PureGen (2024), Tables 1, 4 and 10 and Appendix E.1: CIFAR-10, ResNet-18 from scratch, "
    "1 % poisoned; gradient matching within 8/255, where the bench's own is by default within 16/255, and Narcissus "
    "within 16/255. Success in % (targets flipped; or test images that a trigger takes, a mean over ten of them) / "
    "accuracy in %",
    "bullseye": "Bhat et al., PureGen (2024), Table 1 and Appendix E.1: CIFAR-10, a ResNet-18 that is fine-tuned, or "
    "whose last layer is trained (linear: black box), 10 % poisoned; the bound is not named. Targets flipped in % / "
    "accuracy in %",
}


class Published(NamedTuple):
    """Figures of one source."""

    caption: str  # the source, the data, the victim, the bounds, and the unit of a figure
    # defence → attack → (accuracy,) or (success, accuracy), in percent. The attack "none" is clean data; a word after
    # the name and a space tells two figures of one attack apart.
    figures: Mapping[str, Mapping[str, tuple[float, ...]]]


@functools.cache
def tables() -> dict[str, Published]:
    """Read `published.csv`: source → its figures, in the order of the file."""
    figures: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            cells = tuple(float(line[name]) for name in ("success", "accuracy") if line[name])
            figures.setdefault(line["source"], {}).setdefault(line["defence"], {})[line["attack"]] = cells
    return {source: Published(_CAPTIONS[source], values) for source, values in figures.items()}
