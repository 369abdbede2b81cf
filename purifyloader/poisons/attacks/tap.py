"""Targeted adversarial poisoning (Fowl et al. 2021, "Adversarial examples make strong poisons", arXiv:2106.10807).

    delta = argmin over |delta| <= epsilon  loss(f(x + delta), g(y)),    g(y) = (y + 3) mod classes

Adversarial examples of a network trained on clean images, under their own labels: a victim learns features of class
g(y) as signs of y. With targeted=False each is moved away from y instead, the paper's other, weaker, error-maximising
variant. For testing defences.
"""

from __future__ import annotations

from dataclasses import dataclass

from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import descend, shifted
from purifyloader.poisons.attacks.presets import TrainedSettings
from purifyloader.poisons.attacks.surrogate import cross_entropy, share_called, train

__all__ = ["PRESETS", "TapSettings", "tap"]


@dataclass(frozen=True, kw_only=True)
class TapSettings(TrainedSettings):
    """Settings of `tap`.

    Attributes:
        targeted: towards class (y + shift) mod classes; if False, away from y.
        shift: see there.
    """

    targeted: bool = True
    shift: int = 3


PRESETS = {
    "cpu": TapSettings(steps=100, step=0.1, epochs=15, lr=0.2, batch_size=64),
    "full": TapSettings(steps=250, step=0.1, epochs=40, network="resnet18", bfloat16=False),
}


@attack_with_networks("tap", PRESETS)
def tap(clean: Clean, settings: TapSettings, seed: int) -> Made:
    """Turn all images of a dataset into adversarial examples of another class, under their own labels.

    The settings of the poisoned set hold the options, and the shares of it that the network calls by the label and
    by the target class.
    """
    wanted_N = shifted(clean, settings.shift) if settings.targeted else clean.y
    (network,) = train(clean, settings, seed)
    delta = descend(
        clean, settings, seed, lambda index_B: cross_entropy(network, wanted_N[index_B]), minimise=settings.targeted
    )
    images = add(clean, delta, settings.bound)
    measured = {"called_label": share_called(network, images, clean.y)}
    if settings.targeted:
        measured["called_target"] = share_called(network, images, wanted_N)
    return Made(images, measured)
