"""Published figures to stand beside measured ones, never among them: other poisons, victims and clean sets."""

from __future__ import annotations

__all__ = ["ECLIPSE", "PUREGEN", "PUREGEN_SOURCE", "SOURCE"]

SOURCE = "Wang et al., ECLIPSE (ESORICS 2024), Tables 1, 3 and 4: CIFAR-10, ResNet-18, test accuracy in %"

_ATTACKS = ("em", "tap", "rem", "sep", "efp", "urp", "lsp", "ar", "adp")

_TABLE_1 = {
    "none": (17.58, 26.16, 27.34, 9.01, 86.64, 16.80, 24.48, 10.59, 25.93),
    "grayscale": (88.42, 21.88, 65.29, 7.57, 86.54, 60.64, 65.89, 38.64, 34.42),
    "jpeg-10": (78.35, 80.77, 81.54, 80.93, 70.54, 81.27, 79.55, 81.39, 80.98),
    "eclipse-100": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 82.62),
}

# The ablation, without ADP: A purification (of 100 calls), B grayscale, C noise.
_TABLE_4 = {
    "A": (27.45, 86.63, 35.74, 44.97, 75.90, 86.86, 39.93, 83.98),
    "B": (78.69, 30.95, 67.05, 7.53, 86.14, 58.70, 68.19, 37.63),
    "C": (20.43, 84.90, 28.83, 11.93, 79.06, 89.54, 27.11, 33.14),
    "A+B": (73.22, 86.31, 67.48, 41.30, 77.58, 85.59, 81.58, 84.22),
    "A+C": (61.30, 86.94, 77.33, 84.07, 76.72, 87.52, 68.70, 87.59),
    "B+C": (78.82, 83.32, 75.51, 14.66, 81.62, 88.87, 80.08, 60.96),
}

_CLEAN = {"none": 94.95, "jpeg-10": 85.23, "eclipse-100": 90.43}  # Table 3

ECLIPSE: dict[str, dict[str, float]] = {
    defence: {**({"none": _CLEAN[defence]} if defence in _CLEAN else {}), **dict(zip(attacks, values, strict=True))}
    for table, attacks in ((_TABLE_1, _ATTACKS), (_TABLE_4, _ATTACKS[:-1]))
    for defence, values in table.items()
}
"""defence → attack → accuracy; the attack "none" is clean data."""

PUREGEN_SOURCE = (
    "Bhat et al., PureGen (2024): CIFAR-10, ResNet-18, 1 % poisoned, gradient matching within 8/255 and Narcissus "
    "within 16/255, success in %"
)

PUREGEN: dict[str, dict[str, float]] = {
    "none": {"gradient-matching": 44.0, "narcissus": 83.63},
    "jpeg-75": {"gradient-matching": 2.0},
    "puregen-ebm": {"gradient-matching": 1.0},
    "puregen-ddpm": {"gradient-matching": 0.0, "narcissus": 5.21},
    "puregen-filt": {"narcissus": 5.74},
}
"""defence → attack → targets flipped, or test images that a trigger takes: a mean over the classes of the attack."""
