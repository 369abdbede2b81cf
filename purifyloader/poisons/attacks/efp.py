"""Entangled features poisoning (EntF; Wen et al. 2023, "Is adversarial training really a silver bullet for mitigating
data poisoning?", openreview zKvm1ETDOq), which ECLIPSE (sec. 4) calls EFP. For testing defences.

    "push"  delta = argmax over |delta| <= epsilon  |h(x + delta) - mean h of y|
    "pull"  delta = argmin over |delta| <= epsilon  |h(x + delta) - mean h of y'|,  y' the class whose mean is nearest

with h the last layer's input of a network that is adversarially trained on clean images, so that the features are
robust ones, and mean h over the clean images of a class. Images of different classes then share features that
adversarial training would rely on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import class_features, descend, feature_distance
from purifyloader.poisons.attacks.presets import AdversarialSettings, TrainedSettings
from purifyloader.poisons.attacks.surrogate import adversary, share_called, train

__all__ = ["PRESETS", "EfpSettings", "efp"]


@dataclass(frozen=True, kw_only=True)
class EfpSettings(AdversarialSettings, TrainedSettings):
    """Settings of `efp`.

    Attributes:
        variant: "push" away from the features of the own class, or "pull" to those of the nearest other one.
    """

    variant: Literal["push", "pull"] = "push"


PRESETS = {
    "cpu": EfpSettings(steps=60, step=0.1, epochs=15, attack_steps=2, attack_step=0.5, lr=0.2, batch_size=64),
    "full": EfpSettings(
        steps=300,
        step=0.05,
        epochs=100,
        attack_steps=10,
        attack_step=0.25,
        augment=True,
        network="resnet18",
        bfloat16=False,
    ),
}


@attack_with_networks("efp", PRESETS)
def efp(clean: Clean, settings: EfpSettings, seed: int) -> Made:
    """Mix the robust features of each image's class into those of others, for all images of a dataset.

    The settings of the poisoned set hold the options, and the share of it that the network calls by the label.
    """
    (network,) = train(clean, settings, seed, adversary=adversary(settings, seed))
    mean_KF = class_features(clean, network)
    pull = settings.variant == "pull"
    class_N = nearest_class(mean_KF)[clean.y] if pull else clean.y
    delta = descend(clean, settings, seed, lambda i: feature_distance(network, mean_KF[class_N[i]]), minimise=pull)
    images = add(clean, delta, settings.bound)
    return Made(images, {"called_label": share_called(network, images, clean.y)})


def nearest_class(mean_KF: Tensor) -> Tensor:
    """For each class the other one whose mean features are nearest, (K,)."""
    apart = torch.cdist(mean_KF.double(), mean_KF.double()).fill_diagonal_(torch.inf)
    return apart.argmin(dim=1)
