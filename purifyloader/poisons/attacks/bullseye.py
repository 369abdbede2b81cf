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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from purifyloader.poisons.attacks.clean import Clean, add
from purifyloader.poisons.attacks.few import Few, Poisons, aims, approach, attack_on_target, distances, features
from purifyloader.poisons.attacks.presets import TrainedSettings

__all__ = ["PRESETS", "BullseyeSettings", "bullseye", "off_centre"]

_ATTACK = 0x62756C6C  # "bull"
_COUNT = 5


@dataclass(frozen=True, kw_only=True)
class BullseyeSettings(TrainedSettings):
    """Settings of `bullseye`.

    Attributes:
        epsilon: as ever, but None is the paper's 0.1, and 1 for l2.
        surrogates: m, how many networks to train, with seeds seed, seed + 1, ...
    """

    EPSILON: ClassVar[Mapping[str, float]] = {"linf": 0.1, "l2": 1.0}

    surrogates: int


PRESETS = {
    "cpu": BullseyeSettings(steps=150, step=0.08, epochs=15, surrogates=2, lr=0.2, batch_size=64),
    "full": BullseyeSettings(steps=1500, step=0.08, epochs=40, surrogates=6, network="resnet18", bfloat16=False),
}


@attack_on_target("bullseye", PRESETS, purpose=_ATTACK, default=lambda clean: _COUNT)
def bullseye(clean: Clean, few: Few, networks: Sequence[nn.Module], settings: BullseyeSettings, seed: int) -> Poisons:
    """Move a few images of one class, 5 unless said, until their features have a test image's as their mean.

    The settings of the poisoned set hold the options, and for each network what it calls the target, and how far the
    poisons' mean is from the target before and after, in features: |f(t) - mean f(x)| / |f(t)|.
    """
    aim_of = aims(networks, few.target_1CHW)

    def objective(x_KCHW: Tensor) -> Iterator[Tensor]:
        for network, aim_1F in zip(networks, aim_of, strict=True):
            yield off_centre(features(network, x_KCHW), aim_1F) / (2 * len(networks))

    delta = approach(objective, few.base_KCHW, settings, clean.bar, index_K=few.index_K, seed=seed)
    images = add(clean, delta, settings.bound, few.index_K)
    return few, images, distances(few, images, networks, aim_of, apart, settings.batch_size)


def off_centre(feature_KF: Tensor, aim_1F: Tensor) -> Tensor:
    """|f(t) - mean f(x)|^2 / |f(t)|^2."""
    return (aim_1F - feature_KF.mean(dim=0)).square().sum() / aim_1F.square().sum()


def apart(feature_KF: Tensor, aim_1F: Tensor) -> Tensor:
    """|f(t) - mean f(x)| / |f(t)|."""
    return off_centre(feature_KF, aim_1F).sqrt()
