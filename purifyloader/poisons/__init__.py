"""Attacks on training sets, for testing defences: nothing here is of use to train a good model.

Both attacks need no surrogate network and are regenerable from a seed. They make a training set
"unlearnable": a victim learns the added pattern, which is a shortcut to the label, and not the image.
"""

from purifyloader.poisons.ar import ar_coefficients, ar_perturbation, autoregressive, read_ar_coefficients
from purifyloader.poisons.lsp import lsp, lsp_perturbation

__all__ = [
    "ar_coefficients",
    "ar_perturbation",
    "autoregressive",
    "lsp",
    "lsp_perturbation",
    "read_ar_coefficients",
]
