"""Published figures to stand beside measured ones, never among them: other poisons, victims and clean sets."""

from __future__ import annotations

__all__ = ["ECLIPSE_TABLE_1", "SOURCE"]

SOURCE = "Wang et al., ECLIPSE (ESORICS 2024), Table 1: CIFAR-10, ResNet-18, test accuracy in %"

_ATTACKS = ("em", "tap", "rem", "sep", "efp", "urp", "lsp", "ar", "adp")

_TABLE = {
    "none": (17.58, 26.16, 27.34, 9.01, 86.64, 16.80, 24.48, 10.59, 25.93),
    "grayscale": (88.42, 21.88, 65.29, 7.57, 86.54, 60.64, 65.89, 38.64, 34.42),
    "jpeg-10": (78.35, 80.77, 81.54, 80.93, 70.54, 81.27, 79.55, 81.39, 80.98),
    "eclipse-100": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 82.62),
}

ECLIPSE_TABLE_1: dict[str, dict[str, float]] = {
    defence: dict(zip(_ATTACKS, values, strict=True)) for defence, values in _TABLE.items()
}
ECLIPSE_TABLE_1["none"]["none"] = 94.95
ECLIPSE_TABLE_1["jpeg-10"]["none"] = 85.23
ECLIPSE_TABLE_1["eclipse-100"]["none"] = 90.43
"""defence → attack → accuracy; the attack "none" is clean data."""
