"""Plant a label-consistent back door (Turner et al. 2019, arXiv:1912.02771, sec. 4.2). For testing defences.

    delta = argmax over |delta| <= epsilon  loss(f(x + delta), y),    poison = clip(x + delta + trigger)

Images of the target class y, under that label, are made hard to tell by what they show, at a network f that is
adversarially trained, so that the features they lose are robust ones. What is left for a victim to learn the class from
is the trigger: 3 x 3 pixels in the corners, each made lighter or darker by `amplitude`, where 1 is black and white
outright. In all four corners it is mirrored, so that a flip keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.errors import InputError
from purifyloader.poisons.attacks.choice import drawn_of_class
from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import descend
from purifyloader.poisons.attacks.presets import AdversarialSettings, TrainedSettings, number
from purifyloader.poisons.attacks.surrogate import adversary, cross_entropy, share_called, train
from purifyloader.poisons.attacks.trigger import add_trigger
from purifyloader.poisons.poisoned import Bound
from purifyloader.poisons.triggers import Additive

__all__ = ["PRESETS", "LabelConsistentSettings", "corner_trigger", "label_consistent"]

_ATTACK = 0x6C636273  # "lcbs"
_PATTERN = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))  # of the lower right corner, as published: no checkerboard quite


@dataclass(frozen=True, kw_only=True)
class LabelConsistentSettings(AdversarialSettings, TrainedSettings):
    """Settings of `label_consistent`. An epsilon of None is 16/255 here, and 600/255 for l2.

    Attributes:
        adversarial: train the surrogate on images perturbed at worst, as the paper does; if False, on clean ones.
        amplitude: of the trigger, in units of [0, 1] images; the paper's less visible ones are 16/255 to 64/255.
        corners: how many have the trigger, 4, or 1: the lower right, which flips and crops of a training take apart.
    """

    EPSILON: ClassVar[Mapping[str, float]] = {"linf": 16 / 255, "l2": 600 / 255}

    adversarial: bool = True
    amplitude: float = number(1 / 255, 1, default=1.0)
    corners: Literal[1, 4] = 4

    @property
    def bound_with_trigger(self) -> Bound | None:
        """Bound of all that is done to an image; None where that may be anything in l-infinity."""
        if self.norm == "l2":
            values = 27 * self.corners
            return Bound("l2", self.bound.epsilon + values**0.5 * self.amplitude)
        largest = self.bound.epsilon + self.amplitude
        return Bound("linf", largest) if largest < 1 else None


PRESETS = {
    "cpu": LabelConsistentSettings(
        steps=100, step=0.05, epochs=15, attack_steps=2, attack_step=0.5, lr=0.2, batch_size=64
    ),
    "full": LabelConsistentSettings(
        steps=100, step=0.05, epochs=100, attack_steps=10, attack_step=0.25, network="resnet18", bfloat16=False
    ),
}


@attack_with_networks("label-consistent", PRESETS)
def label_consistent(
    clean: Clean,
    settings: LabelConsistentSettings,
    seed: int,
    *,
    target_class: int,
    count: int | None = None,
    share: float | None = None,
) -> Made:
    """Make a few images of a class, 1.5 % of the set unless said, hard to tell but for a trigger in their corners.

    The bound of the poisoned set holds for the perturbation and the trigger together. Its settings hold the options,
    and the shares of the chosen images that the network calls by their label before and after the perturbation,
    without the trigger.
    """
    _, channels, height, width = clean.x.shape
    if channels != 3:
        raise InputError(
            f"label-consistent poisons colour images, (N, H, W, 3). Got {(len(clean), height, width, channels)}: "
            'repeat the grey channel, as image.convert("RGB") does.'
        )
    default = max(1, round(0.015 * len(clean)))
    which = drawn_of_class(
        clean.y.cpu().numpy(), target_class, share, count, default=default, seed=seed, attack=_ATTACK
    )
    index_K = which.to(clean.x.device)
    few = Clean(clean.x[index_K], clean.y[index_K], clean.classes, clean.bar)
    (network,) = train(clean, settings, seed, adversary=adversary(settings, seed) if settings.adversarial else None)
    delta = descend(few, settings, seed, lambda index_B: cross_entropy(network, few.y[index_B]), minimise=False)
    hard = add(clean, delta, settings.bound, index_K)
    trigger = corner_trigger(height, width, settings.corners, settings.amplitude)
    measured = {
        "target_class": int(target_class),
        "share": share,
        "count": count,
        "called_label_before": share_called(network, few.x.permute(0, 2, 3, 1).cpu().numpy(), few.y),
        "called_label": share_called(network, hard[which.numpy()], few.y),
    }
    known = {
        "poisoned": which.numpy(),
        "bound": settings.bound_with_trigger,
        "trigger": Additive(trigger),
        "target_class": int(target_class),
    }
    return Made(add_trigger(hard, torch.from_numpy(trigger), indices=which), measured, known)


def corner_trigger(height: int, width: int, corners: int, amplitude: float) -> NDArray[np.float32]:
    """Return what is added to an image, (H, W, 3) in [0, 1] units: +-amplitude in the corners, 0 elsewhere."""
    trigger = np.zeros((height, width, 3), np.float32)
    pattern = amplitude * np.array(_PATTERN, np.float32)[:, :, None]
    trigger[-3:, -3:] = pattern
    if corners == 4:  # the left ones mirrored; the upper ones not turned upside down, as published
        trigger[:3, -3:] = pattern
        trigger[:3, :3] = trigger[-3:, :3] = pattern[:, ::-1]
    return trigger
