"""Certify models trained on images that somebody may have changed (Hong, Carlini & Kurakin).

Noise and denoise the training set once for each model, train many models and let them vote on each test input:
no change of the training images that is smaller than the certified radius changes what the vote of all such models
would be. `ndt_classify` trains and asks the models, `certify` turns votes into certificates, `noised` says what a
purifier means for one, and `reasons_against` when there is none to be had; `purifyloader certify` does all of it.
SciPy, `pip install 'purifyloader[certify]'`, and torch are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from purifyloader.certify.guards import Paths, reasons_against
from purifyloader.certify.statistics import (
    ABSTAIN,
    Certificates,
    best_lower_bound,
    best_radius,
    certified_accuracy,
    certify,
    counts,
    fixed_draws,
    linf_epsilon,
    linf_images,
    models_needed,
    predict,
    radius_per_image,
    voted_accuracy,
)

if TYPE_CHECKING:
    from purifyloader.certify.functions import DenoisedSet, Predictor, Train
    from purifyloader.certify.models import ndt_classify
    from purifyloader.certify.noising import Noised, models_of, noised, shared_images
    from purifyloader.certify.training import Training

__all__ = [
    "ABSTAIN",
    "Certificates",
    "DenoisedSet",
    "Noised",
    "Paths",
    "Predictor",
    "Train",
    "Training",
    "best_lower_bound",
    "best_radius",
    "certified_accuracy",
    "certify",
    "counts",
    "fixed_draws",
    "linf_epsilon",
    "linf_images",
    "models_needed",
    "models_of",
    "ndt_classify",
    "noised",
    "predict",
    "radius_per_image",
    "reasons_against",
    "shared_images",
    "voted_accuracy",
]

# these need torch, which takes seconds to import
_ORIGIN = {
    **dict.fromkeys(("DenoisedSet", "Predictor", "Train"), "functions"),
    **dict.fromkeys(("Noised", "models_of", "noised", "shared_images"), "noising"),
    "Training": "training",
    "ndt_classify": "models",
}


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        return getattr(importlib.import_module(f"purifyloader.certify.{_ORIGIN[name]}"), name)
    raise AttributeError(f"module 'purifyloader.certify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
