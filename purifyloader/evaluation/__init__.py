"""How good a denoiser is: error over noise, by frequency, against what it claims, and on poisoned images.

`evaluate` runs all of it and gives JSON, `picture` draws that, and `purifyloader denoiser evaluate` is both
from the command line. The measures themselves are small functions of `purifyloader.evaluation.measures`.
"""

from purifyloader.evaluation.evaluate import default_sigmas, evaluate
from purifyloader.evaluation.measures import (
    auc,
    calibration,
    jpeg_psnr,
    noised_psnr,
    psnr,
    removed_energy,
    residual_spectrum,
    ring_frequencies,
    variance_calibration,
)
from purifyloader.evaluation.pictures import Examples, examples, picture

__all__ = [
    "Examples",
    "auc",
    "calibration",
    "default_sigmas",
    "evaluate",
    "examples",
    "jpeg_psnr",
    "noised_psnr",
    "picture",
    "psnr",
    "removed_energy",
    "residual_spectrum",
    "ring_frequencies",
    "variance_calibration",
]
