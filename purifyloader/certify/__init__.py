"""What can be promised of models trained on images that somebody may have changed (Hong, Carlini & Kurakin).

Noise and denoise the training set once for each model, train many models and let them vote on each test input:
no change of the training images that is smaller than the certified radius changes what the vote of all such models
would be. `purifyloader.certify.statistics` turns votes into predictions and certificates, and
`purifyloader.certify.guards` says when there is none to be had. They need SciPy, `pip install
'purifyloader[certify]'`, and neither it nor torch is imported before it is used.
"""

from purifyloader.certify.guards import Paths, reasons_against
from purifyloader.certify.statistics import (
    ABSTAIN,
    Certificates,
    best_lower_bound,
    best_radius,
    certified_accuracy,
    certify,
    fixed_draws,
    linf_epsilon,
    linf_images,
    models_needed,
    predict,
    radius_per_image,
    voted_accuracy,
)

__all__ = [
    "ABSTAIN",
    "Certificates",
    "Paths",
    "best_lower_bound",
    "best_radius",
    "certified_accuracy",
    "certify",
    "fixed_draws",
    "linf_epsilon",
    "linf_images",
    "models_needed",
    "predict",
    "radius_per_image",
    "reasons_against",
    "voted_accuracy",
]
