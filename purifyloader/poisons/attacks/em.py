"""Error-minimising noise, "unlearnable examples" (Huang et al. 2021, arXiv:2101.04898). For testing defences.

    min over theta  E  min over |delta| <= epsilon  loss(f_theta(x + delta), y)                              (eq. 2)

A few steps of training and a descent of the noise take turns until the network is right on nearly all of the training
set. What is left to learn from an image is then its noise, which is much the same shortcut for every victim.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import starts
from purifyloader.poisons.attacks.pgd import ascend, pgd
from purifyloader.poisons.attacks.presets import AttackSettings, integer, number
from purifyloader.poisons.attacks.surrogate import Training, cross_entropy
from purifyloader.poisons.attacks.views import View, itself
from purifyloader.victims.augment import crop_and_flip

__all__ = ["PRESETS", "EmSettings", "em", "min_min", "with_defaults"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmSettings(AttackSettings):
    """Settings of `em`.

    Attributes:
        class_wise: one noise a class, in place of one an image.
        train_steps: batches that the network is trained on between descents of the noise.
        stop_accuracy: share of the images that the network must be right on, as it has learned from them: with the
            noise of the round before.
        rounds: of training and descent, at most.
        pad, flip: crop and flip of the training, after the noise is added; none in the paper.
    """

    class_wise: bool = False
    train_steps: int = 10
    stop_accuracy: float = number(0, 1, default=0.99)
    rounds: int = 100
    pad: int = integer(0, default=0)
    flip: bool = False


PRESETS = {
    "cpu": EmSettings(steps=10, step=0.2, train_steps=30, rounds=15, batch_size=64),
    "full": EmSettings(steps=20, step=0.1, network="resnet18", bfloat16=False),
}

# A step for each batch is many for each class's noise in a round; the paper stops at a tenth of errors.
_CLASS_WISE: dict[str, Any] = {"steps": 1, "step": 0.1, "stop_accuracy": 0.9}


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options with what class-wise noise has by default in place of a preset's."""
    return {**(_CLASS_WISE if options.get("class_wise") is True else {}), **options}


@attack_with_networks("em", PRESETS, with_defaults)
def em(clean: Clean, settings: EmSettings, seed: int) -> Made:
    """Add error-minimising noise to all images of a dataset.

    The settings of the poisoned set hold the options, the rounds taken, and the network's accuracy on it. With
    class_wise=True, steps is 1 for each batch and stop_accuracy 0.9 unless said.
    """
    noise, measured = min_min(clean, settings, seed, "em")
    return Made(add(clean, noise, settings.bound), measured)


def min_min(
    clean: Clean, settings: EmSettings, seed: int, attack: str, view: View = itself
) -> tuple[Tensor, dict[str, Any]]:
    """Find the noise of each image (N, C, H, W), and JSON values to record; `attack` is named in the log.

    The network sees images through the view: see `views`.
    """
    turn = count()
    row_N, noise = _start(clean, settings, seed)
    training = Training(clean, settings, seed)
    for round_ in range(1, settings.rounds + 1):
        for _ in range(settings.train_steps):  # min over theta
            index_B, uniform_B3 = training.next_batch()
            x = (clean.images(index_B) + noise[row_N[index_B]]).clamp(0, 1)
            x = crop_and_flip(view(x, index_B, next(turn)), uniform_B3, settings.pad, settings.flip)
            training.learn(x.detach(), clean.y[index_B])
        network = training.network.eval()
        # Before the descent: after it, a network that has learned nothing yet would be right on everything.
        accuracy = _accuracy(network, clean, noise, row_N, view, turn)
        for index_B in clean.batches(settings.batch_size):  # min over delta
            noise = _descend(noise, network, clean, index_B, settings, view, turn)
            clean.bar.update(settings.steps)
        clean.bar.set_postfix(round=round_, accuracy=accuracy)
        if accuracy >= settings.stop_accuracy:
            break
    else:
        _log.warning(
            "%s: after %d rounds the network is right on %.1f %% of the poisoned images, less than stop_accuracy=%g"
            ": the noise is weaker than it could be. Raise rounds or train_steps.",
            attack,
            settings.rounds,
            100 * accuracy,
            settings.stop_accuracy,
        )
    return noise[row_N], {"rounds_taken": round_, "accuracy": accuracy}


def _start(clean: Clean, settings: EmSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Start the noise: each image's row of it (N,), and the noise (rows, C, H, W), a row an image or a class."""
    if settings.class_wise:
        classes = torch.arange(clean.classes, device=clean.y.device)
        return clean.y, starts(clean, classes, settings.bound, seed)
    noise = torch.cat([starts(clean, index_B, settings.bound, seed) for index_B in clean.batches(1024)])
    return torch.arange(len(clean), device=clean.y.device), noise


def _descend(
    noise: Tensor,
    network: nn.Module,
    clean: Clean,
    index_B: Tensor,
    settings: EmSettings,
    view: View,
    turn: Iterator[int],
) -> Tensor:
    """Take some steps that make the loss of these images small."""
    x, plain = clean.images(index_B), cross_entropy(network, clean.y[index_B])

    def loss(x_BCHW: Tensor) -> Tensor:
        return plain(view(x_BCHW, index_B, next(turn)))

    if not settings.class_wise:
        noise[index_B] = pgd(
            loss,
            x,
            settings.bound,
            steps=settings.steps,
            step_size=settings.step_size,
            minimise=True,
            start=noise[index_B],
        )
        return noise
    # A matrix product, as the gradient of indexing adds up in any order.
    one_hot_BK = F.one_hot(clean.y[index_B], clean.classes).float()

    def of_noise(noise_KCHW: Tensor) -> Tensor:
        delta = (one_hot_BK @ noise_KCHW.flatten(1)).reshape(x.shape)
        return -loss((x + delta).clamp(0, 1))

    for _ in range(settings.steps):
        noise = ascend(of_noise, noise, settings.bound, settings.step_size)
    return noise


@torch.no_grad()
def _accuracy(network: nn.Module, clean: Clean, noise: Tensor, row_N: Tensor, view: View, turn: Iterator[int]) -> float:
    right = 0
    for index_B in clean.batches(500):
        x = view((clean.images(index_B) + noise[row_N[index_B]]).clamp(0, 1), index_B, next(turn))
        right += int((network(x).argmax(dim=1) == clean.y[index_B]).sum())
    return right / len(clean)
