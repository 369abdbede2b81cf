"""ADP, the adaptive poison of ECLIPSE's authors (Wang et al., ESORICS 2024, sec. 4.4). For testing defences.

    argmin over theta  E  [ min over |delta| <= epsilon  loss(U(C(x + delta); theta), y) ]

Error-minimising noise (see `em`) for an attacker who knows the compensation C (Eq. 13) and the network that the
denoiser is made of, U, whose last layer is replaced so that it classifies. The denoising itself is not in it;
`adaptive` goes through that too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from purifyloader.poisons.attacks.clean import add, opened, poisoned
from purifyloader.poisons.attacks.em import EmSettings, min_min, with_defaults
from purifyloader.poisons.attacks.presets import choose, told
from purifyloader.poisons.attacks.views import compensated
from purifyloader.poisons.poisoned import Poisoned

__all__ = ["PRESETS", "AdpSettings", "adp"]


@dataclass(frozen=True, kw_only=True)
class AdpSettings(EmSettings):
    """What `adp` is made with.

    Attributes:
        grey: probability of C's grayscale, an image.
        noise: standard deviation of C's noise, in image units.
    """

    grey: float = 0.4
    noise: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.numbers(grey=(0, 1), noise=(0, 1))


PRESETS = {
    "cpu": AdpSettings(steps=5, step=0.2, train_steps=60, rounds=8, batch_size=64, network="unet", lr=0.05),
    "full": AdpSettings(steps=20, step=0.1, network="unet-128", lr=0.01, bfloat16=False),
}


@told(PRESETS)
def adp(
    dataset: Any,
    seed: int = 0,
    *,
    preset: str = "cpu",
    device: torch.device | str = "cpu",
    progress: bool = False,
    **options: Any,
) -> Poisoned:
    """All images of a dataset with noise that is easy to learn through ECLIPSE's compensation.

    On the CPU, with one number of threads, the same arguments give the same pixels.

    Args:
        dataset: see `poisons.arrays.as_arrays`; in colour.
        seed: of the network, its batches, the compensation and the noise's start.
        preset: "cpu", some minutes on a core for a few thousand 32 x 32 images, or "full": the published U-Net, and
            EM's own steps, as the paper gives none.
        device: where to compute.
        progress: show a bar.
        options: values of `AdpSettings` in place of the preset's; with class_wise=True as in `em`.

    Returns:
        The poisoned set. Its settings hold the options, the rounds taken, and the network's accuracy on it.

    Raises:
        InputError: a dataset, preset, device or option that does not fit; TrainingError: the network diverges.
    """
    settings = choose(PRESETS, preset, with_defaults(options))
    with opened(dataset, "adp", seed, device, progress) as clean:
        view = compensated(settings.grey, settings.noise, seed)
        noise, measured = min_min(clean, settings, seed, "adp", view)
        return poisoned(clean, add(clean, noise, settings.bound), "adp", settings, seed, preset, **measured)
