"""ADP, the adaptive poison of ECLIPSE's authors (Wang et al., ESORICS 2024, sec. 4.4). For testing defences.

    argmin over theta  E  [ min over |delta| <= epsilon  loss(U(C(x + delta); theta), y) ]

Error-minimising noise (see `em`) for an attacker who knows the compensation C (Eq. 13) and the network that the
denoiser is made of, U, whose last layer is replaced so that it classifies. The denoising itself is not in it;
`adaptive` goes through that too.
"""

from __future__ import annotations

from dataclasses import dataclass

from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.em import EmSettings, min_min, with_defaults
from purifyloader.poisons.attacks.presets import number
from purifyloader.poisons.attacks.views import compensated

__all__ = ["PRESETS", "AdpSettings", "adp"]


@dataclass(frozen=True, kw_only=True)
class AdpSettings(EmSettings):
    """Settings of `adp`.

    Attributes:
        grey: probability of C's grayscale, an image.
        noise: standard deviation of C's noise, in image units.
    """

    grey: float = number(0, 1, default=0.4)
    noise: float = number(0, 1, default=0.05)


PRESETS = {
    "cpu": AdpSettings(steps=5, step=0.2, train_steps=60, rounds=8, batch_size=64, network="unet", lr=0.05),
    "full": AdpSettings(steps=20, step=0.1, network="unet-128", lr=0.01, bfloat16=False),
}


@attack_with_networks("adp", PRESETS, with_defaults)
def adp(clean: Clean, settings: AdpSettings, seed: int) -> Made:
    """Add noise to all images of a dataset that is easy to learn through ECLIPSE's compensation.

    The settings of the poisoned set hold the options, the rounds taken, and the network's accuracy on it. With
    class_wise=True as in `em`.
    """
    view = compensated(settings.grey, settings.noise, seed)
    noise, measured = min_min(clean, settings, seed, "adp", view)
    return Made(add(clean, noise, settings.bound), measured)
