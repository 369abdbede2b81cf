"""Targeted adversarial poisoning (Fowl et al. 2021, "Adversarial examples make strong poisons", arXiv:2106.10807).

    delta = argmin over |delta| <= epsilon  loss(f(x + delta), g(y)),    g(y) = (y + 3) mod classes

Adversarial examples of a network trained on clean images, under their own labels: a victim learns features of class
g(y) as signs of y. With targeted=False each is moved away from y instead, the paper's other, weaker, error-maximising
variant. For testing defences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from purifyloader.poisons.attacks.clean import add, opened, poisoned
from purifyloader.poisons.attacks.descent import descend, shifted
from purifyloader.poisons.attacks.presets import TrainedSettings, choose, told
from purifyloader.poisons.attacks.surrogate import cross_entropy, share_called, train
from purifyloader.poisons.poisoned import Poisoned

__all__ = ["PRESETS", "TapSettings", "tap"]


@dataclass(frozen=True, kw_only=True)
class TapSettings(TrainedSettings):
    """What `tap` is made with.

    Attributes:
        targeted: towards class (y + shift) mod classes; if False, away from y.
        shift: see there.
    """

    targeted: bool = True
    shift: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.booleans("targeted")
        self.integers(shift=1)


PRESETS = {
    "cpu": TapSettings(steps=100, step=0.1, epochs=15, lr=0.2, batch_size=64),
    "full": TapSettings(steps=250, step=0.1, epochs=40, network="resnet18", bfloat16=False),
}


@told(PRESETS)
def tap(
    dataset: Any,
    seed: int = 0,
    *,
    preset: str = "cpu",
    device: torch.device | str = "cpu",
    progress: bool = False,
    **options: Any,
) -> Poisoned:
    """All images of a dataset as adversarial examples of another class, under their own labels.

    On the CPU, with one number of threads, the same arguments give the same pixels.

    Args:
        dataset: see `poisons.arrays.as_arrays`.
        seed: of the network, its batches and the perturbations' start.
        preset: "cpu", some minutes on a core for a few thousand 32 x 32 images, or "full", as in the paper.
        device: where to compute.
        progress: show a bar.
        options: values of `TapSettings` in place of the preset's.

    Returns:
        The poisoned set. Its settings hold the options, and the shares of it that the network calls by the label and
        by the target class.

    Raises:
        InputError: a dataset, preset, device or option that does not fit; TrainingError: the network diverges.
    """
    settings = choose(PRESETS, preset, options)
    with opened(dataset, "tap", seed, device, progress) as clean:
        wanted_N = shifted(clean, settings.shift) if settings.targeted else clean.y
        (network,) = train(clean, settings, seed)
        delta = descend(
            clean,
            settings,
            seed,
            lambda index_B: cross_entropy(network, wanted_N[index_B]),
            minimise=settings.targeted,
        )
        images = add(clean, delta, settings.bound)
        measured = {"called_label": share_called(network, images, clean.y)}
        if settings.targeted:
            measured["called_target"] = share_called(network, images, wanted_N)
        return poisoned(clean, images, "tap", settings, seed, preset, **measured)
