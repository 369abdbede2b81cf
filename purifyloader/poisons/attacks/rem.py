"""Robust error-minimising noise (Fu et al. 2022, arXiv:2203.14533). For testing defences.

    min over theta  E  min over |u| <= rho_u  E over t  max over |a| <= rho_a  loss(f_theta(t(x + u) + a), y)

As EM, but the loss is small for all that a victim may do to the image: a random crop and flip t, and a worst-case
perturbation a of adversarial training. The expectation over t is a mean of some samples (expectation over
transformation, EOT); the maximum is taken at each sample and held fixed while u takes its step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import starts
from purifyloader.poisons.attacks.pgd import Loss, pgd
from purifyloader.poisons.attacks.presets import AdversarialSettings
from purifyloader.poisons.attacks.surrogate import Surrogate, Training, cross_entropy, worst_case
from purifyloader.victims.augment import crop_and_flip

__all__ = ["PRESETS", "RemSettings", "rem"]


@dataclass(frozen=True, kw_only=True)
class RemSettings(AdversarialSettings):
    """Settings of `rem`; epsilon is the paper's rho_u and attack_epsilon its rho_a.

    Attributes:
        train_steps: batches; for each the noise of its images is improved, and then the network learns from it.
        views: samples of the crop and flip for each step of the noise.
    """

    train_steps: int
    views: int


PRESETS = {
    "cpu": RemSettings(
        steps=5, step=0.2, train_steps=400, views=1, attack_steps=2, attack_step=0.5, lr=0.1, batch_size=64
    ),
    "full": RemSettings(
        steps=10,
        step=0.2,
        train_steps=5000,
        views=5,
        attack_steps=10,
        attack_step=0.2,
        network="resnet18",
        bfloat16=False,
    ),
}


@attack_with_networks("rem", PRESETS)
def rem(clean: Clean, settings: RemSettings, seed: int) -> Made:
    """Add robust error-minimising noise to all images of a dataset.

    The settings of the poisoned set hold the options, and the network's loss on it, cropped, flipped and perturbed
    at worst, beside that on the clean images.
    """
    random = torch.Generator().manual_seed(seed)
    training = Training(clean, settings, seed, settings.train_steps)
    noise = torch.cat([starts(clean, index_B, settings.bound, seed) for index_B in clean.batches(1024)])

    def improve(index_B: Tensor) -> None:  # min over u
        noise[index_B] = pgd(
            _robust(training.network.eval(), clean.y[index_B], settings, random),
            clean.images(index_B),
            settings.bound,
            steps=settings.steps,
            step_size=settings.step_size,
            minimise=True,
            start=noise[index_B],
        )
        clean.bar.update(settings.steps * settings.views * (settings.attack_steps + 1))

    for _ in range(settings.train_steps):
        index_B, uniform_B3 = training.next_batch()
        improve(index_B)
        x, y = clean.images(index_B) + noise[index_B], clean.y[index_B]
        view = crop_and_flip(x, uniform_B3, settings.pad, settings.flip)
        training.learn(view + worst_case(training.network, view, y, settings, random), y)  # min over theta
    for index_B in clean.batches(settings.batch_size):
        improve(index_B)
    images = add(clean, noise, settings.bound)
    worst = {
        name: _worst_loss(training.network, clean, shown, settings, random)
        for name, shown in (("worst_loss", torch.from_numpy(images)), ("worst_loss_clean", clean.x.permute(0, 2, 3, 1)))
    }
    return Made(images, worst)


def _robust(network: Surrogate, y_B: Tensor, settings: RemSettings, random: torch.Generator) -> Loss:
    """Return the loss of each image cropped and flipped at random and perturbed at worst, a mean over views."""
    plain = cross_entropy(network, y_B)

    def of_image(x_BCHW: Tensor) -> Tensor:
        losses = []
        for _ in range(settings.views):
            drawn = torch.rand(len(x_BCHW), 3, generator=random).to(x_BCHW.device)
            view = crop_and_flip(x_BCHW, drawn, settings.pad, settings.flip)
            losses.append(plain(view + worst_case(network, view, y_B, settings, random)))
        return torch.stack(losses).mean(dim=0)

    return of_image


def _worst_loss(
    network: Surrogate, clean: Clean, images_NHWC: Tensor, settings: RemSettings, random: torch.Generator
) -> float:
    """Measure the mean loss of images of 8 bits, perturbed at worst."""
    total = 0.0
    for index_B in clean.batches(settings.batch_size):
        x = images_NHWC[index_B.to(images_NHWC.device)].to(clean.x.device).permute(0, 3, 1, 2).float() / 255
        y = clean.y[index_B]
        x = x + worst_case(network, x, y, settings, random)
        with torch.no_grad():
            total += float(cross_entropy(network, y)(x).sum())
    return total / len(clean)
