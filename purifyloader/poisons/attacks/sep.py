"""Self-ensemble protection (Chen et al. 2023, arXiv:2211.12005). For testing defences.

As TAP, but against M checkpoints of one training in place of its end, towards g(y) = (y + 5) mod classes:

    "labels"    delta = argmin over |delta| <= epsilon  1/M sum_m  loss(f_m(x + delta), g(y))          (SEP)
    "features"  delta = argmin over |delta| <= epsilon  1/M sum_m  |h_m(x + delta) - mean h_m of g(y)|  (SEP-FA)

with h the last layer's input and the mean over the clean images of class g(y). What no checkpoint calls by its label
is what a training never gets right. The variance reduction of the paper's SEP-FA-VR, an inner loop that corrects
each step for the checkpoints' disagreement, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import class_features, descend, feature_distance, shifted
from purifyloader.poisons.attacks.pgd import Loss
from purifyloader.poisons.attacks.presets import TrainedSettings
from purifyloader.poisons.attacks.surrogate import Surrogate, cross_entropy, share_called, train

__all__ = ["PRESETS", "SepSettings", "sep"]


@dataclass(frozen=True, kw_only=True)
class SepSettings(TrainedSettings):
    """Settings of `sep`.

    Attributes:
        checkpoints: M, at equidistant steps of the training; a step of descent costs M times that of `tap`.
        align: what is brought to the target class, "labels" or "features".
        shift: the target class is (y + shift) mod classes.
    """

    checkpoints: int
    align: Literal["labels", "features"] = "features"
    shift: int = 5


PRESETS = {
    "cpu": SepSettings(steps=30, step=0.1, epochs=15, checkpoints=5, lr=0.2, batch_size=64),
    "full": SepSettings(steps=30, step=0.1, epochs=120, checkpoints=15, network="resnet18", bfloat16=False),
}


@attack_with_networks("sep", PRESETS)
def sep(clean: Clean, settings: SepSettings, seed: int) -> Made:
    """Turn all images of a dataset into adversarial examples of another class, for all of a training.

    The settings of the poisoned set hold the options, and for each checkpoint the shares of the set that it calls
    by the label and by the target class.
    """
    target_N = shifted(clean, settings.shift)
    networks = train(clean, settings, seed, checkpoints=settings.checkpoints)
    delta = descend(clean, settings, seed, _ensemble(clean, networks, target_N, settings))
    images = add(clean, delta, settings.bound)
    called = {
        name: [share_called(network, images, labels_N) for network in networks]
        for name, labels_N in (("called_label", clean.y), ("called_target", target_N))
    }
    return Made(images, called)


def _ensemble(
    clean: Clean, networks: list[Surrogate], target_N: Tensor, settings: SepSettings
) -> Callable[[Tensor], Loss]:
    """Return a function index_B -> the mean loss over the networks."""
    means = [class_features(clean, network) for network in networks] if settings.align == "features" else []

    def loss_of(index_B: Tensor) -> Loss:
        target_B = target_N[index_B]
        if settings.align == "labels":
            losses = [cross_entropy(network, target_B) for network in networks]
        else:
            losses = [feature_distance(net, mean[target_B]) for net, mean in zip(networks, means, strict=True)]
        return lambda x_BCHW: torch.stack([loss(x_BCHW) for loss in losses]).mean(dim=0)

    return loss_of
