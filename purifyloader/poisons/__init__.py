"""Attacks on training sets, for testing defences: nothing here is of use to train a good model.

Autoregressive and LSP perturbations need no surrogate network and are regenerable from a seed. They make a training
set "unlearnable": a victim learns the added pattern, which is a shortcut to the label, and not the image. A trigger
plants a back door.
"""

from purifyloader.poisons.ar import ar_coefficients, ar_perturbation, autoregressive, read_ar_coefficients
from purifyloader.poisons.lsp import lsp, lsp_perturbation
from purifyloader.poisons.trigger import add_trigger, backdoor, read_trigger

__all__ = [
    "add_trigger",
    "ar_coefficients",
    "ar_perturbation",
    "autoregressive",
    "backdoor",
    "lsp",
    "lsp_perturbation",
    "read_ar_coefficients",
    "read_trigger",
]
