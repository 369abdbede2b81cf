"""Poison Frogs (Shafahi et al. 2018, "Poison frogs! Targeted clean-label poisoning attacks on neural networks",
arXiv:1804.00792): feature collision. For testing defences.

    p = argmin over x   |f(x) - f(t)|^2 + beta |x - b|^2                                            (Eq. 1)

with f the last layer's input, t the test image and b an image of the class that t is to be taken for. The poison p
looks like b and keeps its label, but lies where t does, so that the last layer learns to give t that label. Algorithm 1
splits it into a step on the features, and one that is exact on the pixels:

    forward     x_hat = x - lr * gradient of |f(x) - f(t)|^2
    backward    x     = (x_hat + lr * beta * b) / (1 + lr * beta),    beta = 0.25 * (features / values of an image)^2

Other than there, the forward step is one of Adam (see `few`; the poisoning benchmark of Schwarzschild et al. 2021,
arXiv:2006.12557, shortens a plain one when the objective grows), and x is brought within a bound around b, as that
benchmark does. Within 8/255 the bound decides, and beta, which is to keep p like b, hardly pulls. With several networks
the objective is the mean of theirs. For a victim that learns its features anew, the paper starts from
gamma * t + (1 - gamma) * b, a watermark of gamma = 0.3, with 50 poisons; norm="linf" with epsilon=1, which is no bound,
leaves it whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from purifyloader.poisons.attacks.clean import Clean, add
from purifyloader.poisons.attacks.few import Few, Poisons, aims, approach, attack_on_target, distances, features, rate
from purifyloader.poisons.attacks.presets import TrainedSettings, number

__all__ = ["PRESETS", "FrogsSettings", "backward", "collision", "poison_frogs"]

_ATTACK = 0x66726F67  # "frog"
_COUNT = 10


@dataclass(frozen=True, kw_only=True)
class FrogsSettings(TrainedSettings):
    """Settings of `poison_frogs`.

    Attributes:
        beta: how much a poison is pulled back to its base, before the scaling by (features / values of an image)^2.
        watermark: gamma, how much of the target a poison starts from, within the bound.
    """

    beta: float = number(0, default=0.25)
    watermark: float = number(0, 1, default=0.0)


PRESETS = {
    "cpu": FrogsSettings(steps=120, step=0.1, epochs=15, lr=0.2, batch_size=64),
    "full": FrogsSettings(steps=1000, step=0.05, epochs=40, network="resnet18", bfloat16=False),
}


@attack_on_target("poison-frogs", PRESETS, purpose=_ATTACK, default=lambda clean: _COUNT)
def poison_frogs(clean: Clean, few: Few, networks: Sequence[nn.Module], settings: FrogsSettings, seed: int) -> Poisons:
    """Move a few images of one class, 10 unless said, each onto a test image in feature space.

    The settings of the poisoned set hold the options, and for each network what it calls the target, and how far the
    poisons' features are from the target's before and after: the mean of |f(p) - f(t)| / |f(t)|.
    """
    aim_of = aims(networks, few.target_1CHW)

    def objective(x_KCHW: Tensor) -> Iterator[Tensor]:
        for network, aim_1F in zip(networks, aim_of, strict=True):
            for x_BCHW in x_KCHW.split(settings.batch_size):
                yield collision(features(network, x_BCHW), aim_1F) / len(networks)

    base_KCHW = few.base_KCHW
    shares = [(aim_1F.shape[1] / base_KCHW[0].numel()) ** 2 for aim_1F in aim_of]
    delta = approach(
        objective,
        base_KCHW,
        settings,
        clean.bar,
        index_K=few.index_K,
        seed=seed,
        start=settings.watermark * few.target_1CHW + (1 - settings.watermark) * base_KCHW,
        backward=partial(
            backward, base_KCHW=base_KCHW, lr=rate(settings, base_KCHW), beta=settings.beta * sum(shares) / len(shares)
        ),
    )
    images = add(clean, delta, settings.bound, few.index_K)
    return few, images, distances(few, images, networks, aim_of, apart, settings.batch_size)


def collision(feature_KF: Tensor, aim_1F: Tensor) -> Tensor:
    """Sum |f(x) - f(t)|^2 over the images, which have nothing to do with each other."""
    return (feature_KF - aim_1F).square().sum()


def backward(x_hat_KCHW: Tensor, base_KCHW: Tensor, lr: float, beta: float) -> Tensor:
    """Pull back to the base: the x that makes |x - x_hat|^2 / 2 + lr * beta / 2 * |x - b|^2 small."""
    return (x_hat_KCHW + lr * beta * base_KCHW) / (1 + lr * beta)


def apart(feature_KF: Tensor, aim_1F: Tensor) -> Tensor:
    """|f(x) - f(t)| / |f(t)|, the mean over the images."""
    return (feature_KF - aim_1F).norm(dim=1).mean() / aim_1F.norm()
