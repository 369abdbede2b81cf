"""Judge a denoiser: PSNR over noise, one calibration figure, and what it takes from poisoned images.

`evaluate` measures all of it and returns JSON, `picture` draws that, and `purifyloader denoiser evaluate` does both
from the command line.
"""

from purifyloader.diffusion.psnr import jpeg_psnr, noised_psnr, psnr
from purifyloader.evaluation.evaluating import default_sigmas, evaluate
from purifyloader.evaluation.measures import calibration, removed_energy
from purifyloader.evaluation.pictures import Examples, examples, picture
from purifyloader.results.values import auc

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
]
