"""Bullseye Polytope (Aghakhani et al. 2021, "Bullseye polytope: a scalable clean-label poisoning attack with improved
transferability", arXiv:2005.00191). For testing defences.

    min over x_1 .. x_k  1/(2m) sum_i  |f_i(t) - 1/k sum_j f_i(x_j)|^2 / |f_i(t)|^2,    |x_j - b_j| <= epsilon   (Eq. 3)

with f_i the last layer's input of network i of m, in evaluation mode, t the test image and b_j images of the class that
t is to be taken for. The mean of the k poisons lies where t does, in each network, and so t is well inside of what any
network learns to call that class: in its bull's eye, where Convex Polytope puts it only somewhere within the poisons.

With Adam, as in the authors' code, whose rate of 0.04 is in units of normalised images: 0.08 of epsilon. Left out are
its multi-draw networks (dropout, features over several passes), its end-to-end mode (the features of all blocks) and
several views of the target.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from purifyloader.poisons.attacks.clean import add_to, opened
from purifyloader.poisons.attacks.few import aims, approach, chosen, distances, evaluated, facts, features, given
from purifyloader.poisons.attacks.presets import TrainedSettings, choose, told
from purifyloader.poisons.attacks.surrogate import train
from purifyloader.poisons.poisoned import Bound, Poisoned

__all__ = ["PRESETS", "BullseyeSettings", "bullseye", "off_centre"]

_ATTACK = 0x62756C6C  # "bull"
_COUNT = 5


@dataclass(frozen=True, kw_only=True)
class BullseyeSettings(TrainedSettings):
    """What `bullseye` is made with.

    Attributes:
        epsilon: as ever, but None is the paper's 0.1, and 1 for l2.
        surrogates: m, how many networks to train, with seeds seed, seed + 1, ...
    """

    surrogates: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.integers(surrogates=1)

    @property
    def bound(self) -> Bound:
        return Bound("linf", 0.1) if self.norm == "linf" and self.epsilon is None else super().bound


PRESETS = {
    "cpu": BullseyeSettings(steps=150, step=0.08, epochs=15, surrogates=2, lr=0.2, batch_size=64),
    "full": BullseyeSettings(steps=1500, step=0.08, epochs=40, surrogates=6, network="resnet18", bfloat16=False),
}


@told(PRESETS)
def bullseye(
    dataset: Any,
    seed: int = 0,
    *,
    target: Any,
    target_class: int | None = None,
    count: int | None = None,
    share: float | None = None,
    networks: Sequence[nn.Module] | None = None,
    preset: str = "cpu",
    device: torch.device | str = "cpu",
    progress: bool = False,
    **options: Any,
) -> Poisoned:
    """A few images of one class whose features have a test image's as their mean.

    On the CPU, with one number of threads, the same arguments give the same pixels.

    Args:
        dataset: see `poisons.arrays.as_arrays`.
        seed: of the choice of bases, and of the networks and their batches.
        target: the test image, a `Target`, uint8 (H, W, 3) or a file.
        target_class: what the victim is to call it, the class of the bases; of a `Target`, None takes its label.
        count: how many poisons, all moved at once; 5 where there is no share either, or the class if it has fewer.
        share: how many, as a share of the set.
        networks: the attacker's, on `device`, images (B, 3, H, W) in [0, 1] to logits, the last nn.Linear reading the
            features; they stay as they are. None trains `surrogates` of them on the dataset.
        preset: "cpu", some minutes on a core for a few thousand 32 x 32 images, or "full", with the paper's steps and
            ResNet-18s.
        device: where to compute.
        progress: show a bar.
        options: values of `BullseyeSettings` in place of the preset's.

    Returns:
        The poisoned set. Its settings hold the options, and for each network what it calls the target, and how far the
        poisons' mean is from the target before and after, in features: |f(t) - mean f(x)| / |f(t)|.

    Raises:
        InputError: a dataset, target, network, preset, device or option that does not fit; ConfigError: both share and
            count; TrainingError: a network diverges.
    """
    settings = choose(PRESETS, preset, options)
    with opened(dataset, "bullseye", seed, device, progress) as clean:
        few = chosen(clean, target, target_class, share=share, count=count, default=_COUNT, seed=seed, attack=_ATTACK)
        if networks is None:
            used: Sequence[nn.Module] = [
                train(clean, settings, operator.index(seed) + i)[0] for i in range(settings.surrogates)
            ]
        else:
            used = given(networks, few.target_1CHW)
        with evaluated(used):
            aim_of = aims(used, few.target_1CHW)

            def objective(x_KCHW: Tensor) -> Iterator[Tensor]:
                for network, aim_1F in zip(used, aim_of, strict=True):
                    yield off_centre(features(network, x_KCHW), aim_1F) / (2 * len(used))

            delta = approach(objective, few.base_KCHW, settings, clean.bar, index_K=few.index_K, seed=seed)
            images = add_to(clean, few.index_K, delta, settings.bound)
            record = settings.record(
                seed,
                preset,
                **facts(few, used, networks is not None, share, count),
                **distances(few, images, used, aim_of, apart, settings.batch_size),
            )
    return Poisoned.of(
        images,
        clean.y.cpu().numpy(),
        "bullseye",
        few.index_K.cpu().numpy(),
        bound=settings.bound,
        target=few.target,
        settings=record,
    )


def off_centre(feature_KF: Tensor, aim_1F: Tensor) -> Tensor:
    """|f(t) - mean f(x)|^2 / |f(t)|^2."""
    return (aim_1F - feature_KF.mean(dim=0)).square().sum() / aim_1F.square().sum()


def apart(feature_KF: Tensor, aim_1F: Tensor) -> Tensor:
    """|f(t) - mean f(x)| / |f(t)|."""
    return off_centre(feature_KF, aim_1F).sqrt()
