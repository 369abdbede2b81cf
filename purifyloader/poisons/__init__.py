"""Attacks on training sets, for testing defences: nothing here is of use to train a good model.

`make(name, dataset)` gives a poisoned dataset by any attack of `ATTACKS`, and `write` puts it into files; `read` takes
those, and what others have published, as the README of this folder says. The other functions work on arrays. All
attacks are regenerable from a seed. An availability attack makes a training set "unlearnable": a victim learns the
added pattern, which is a shortcut to the label, and not the image. A trigger plants a back door: `triggers` has the
kinds of them, functions of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from purifyloader.core.lazy import lazy

if TYPE_CHECKING:
    from purifyloader.poisons import triggers
    from purifyloader.poisons.attacks.autoregression import (
        ar_coefficients,
        ar_perturbation,
        autoregressive,
        read_ar_coefficients,
    )
    from purifyloader.poisons.attacks.class_wise import class_patterns, urp
    from purifyloader.poisons.attacks.convolution import cuda, cuda_filters
    from purifyloader.poisons.attacks.one_pixel import ops, ops_pixels
    from purifyloader.poisons.attacks.registry import ATTACKS, Attack, make
    from purifyloader.poisons.attacks.separable import lsp, lsp_perturbation
    from purifyloader.poisons.attacks.trigger import add_trigger, backdoor, read_trigger
    from purifyloader.poisons.poisoned import Bound, Moved, Poisoned, Target
    from purifyloader.poisons.reading import check, read
    from purifyloader.poisons.triggers import Trigger
    from purifyloader.poisons.writing import write, write_images, write_npz

__all__ = ["ATTACKS", "Attack", "Bound", "Moved", "Poisoned", "Target", "Trigger", "add_trigger", "ar_coefficients"]
__all__ += ["ar_perturbation", "autoregressive", "backdoor", "check", "class_patterns", "cuda", "cuda_filters", "lsp"]
__all__ += ["lsp_perturbation", "make", "ops", "ops_pixels", "read", "read_ar_coefficients", "read_trigger"]
__all__ += ["triggers", "urp", "write", "write_images", "write_npz"]

# the table of attacks needs no torch
_MODULES = {
    ".attacks.autoregression": ("ar_coefficients", "ar_perturbation", "autoregressive", "read_ar_coefficients"),
    ".attacks.class_wise": ("class_patterns", "urp"),
    ".attacks.convolution": ("cuda", "cuda_filters"),
    ".attacks.separable": ("lsp", "lsp_perturbation"),
    ".attacks.one_pixel": ("ops", "ops_pixels"),
    ".attacks.registry": ("ATTACKS", "Attack", "make"),
    ".attacks.trigger": ("add_trigger", "backdoor", "read_trigger"),
    ".poisoned": ("Bound", "Moved", "Poisoned", "Target"),
    ".reading": ("check", "read"),
    ".triggers": ("Trigger", "triggers"),
    ".writing": ("write", "write_images", "write_npz"),
}
__getattr__, __dir__ = lazy(__name__, _MODULES)
