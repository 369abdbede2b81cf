"""Certify models trained on images that somebody may have changed (Hong, Carlini & Kurakin).

Noise and denoise the training set once for each model, train many models and let them vote on each test input:
no change of the training images that is smaller than the certified radius changes what the vote of all such models
would be. `ndt_classify` trains and asks the models, `certify` turns votes into certificates, `noised` says what a
purifier means for one, and `reasons_against` when there is none to be had; `purifyloader certify` does all of it.
SciPy, `pip install 'purifyloader[certify]'`, and torch are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from purifyloader.core.lazy import lazy

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

# these need torch
_MODULES = {
    ".functions": ("DenoisedSet", "Predictor", "Train"),
    ".models": ("ndt_classify",),
    ".noising": ("Noised", "models_of", "noised", "shared_images"),
    ".training": ("Training",),
}
__getattr__, __dir__ = lazy(__name__, _MODULES)
