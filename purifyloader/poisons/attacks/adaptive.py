"""Attack purification knowing all of it but its noise: ours. For testing defences.

    delta = argmin over |delta| <= epsilon  E_z  loss(f(C(D(x + delta; z))), g(y)),    g(y) = (y + shift) mod classes

Targeted adversarial poisoning (see `tap`) through the whole defence: D adds noise z and denoises in one network call,
with the defender's own weights, and C is ECLIPSE's compensation. The surrogate f learned from clean images as D leaves
them, under C, as a victim behind this defence does. The gradient goes through the denoiser, and z and C are drawn
afresh at each step, so that the descent is on their expectation: the draw in the defender's cache is all that is
unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from purifyloader.core.images import quantize
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.clean import Clean, Made, add, attack_with_networks
from purifyloader.poisons.attacks.descent import descend, shifted
from purifyloader.poisons.attacks.pgd import Loss
from purifyloader.poisons.attacks.presets import TrainedSettings, number
from purifyloader.poisons.attacks.surrogate import Surrogate, cross_entropy, share_called, train
from purifyloader.poisons.attacks.views import View, compensated, purified
from purifyloader.pretrained.kinds import identity_of
from purifyloader.recipes.denoising import eclipse
from purifyloader.recipes.models import Model, as_denoiser
from purifyloader.victims.augment import crop_and_flip, uniforms

__all__ = ["PRESETS", "AdaptiveSettings", "adaptive"]

_VIEW = 0x61647677  # "advw": what the keys drawn here are for
_CACHED = 0  # the turn of what is drawn once; the descent counts from 1


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings(TrainedSettings):
    """Settings of `adaptive`.

    Attributes:
        sigma: of D's noise, in image units.
        grey: probability of C's grayscale, an image; 0 with noise=0 is a defence without compensation.
        noise: standard deviation of C's noise, in image units.
        shift: the target class is (y + shift) mod classes.
    """

    sigma: float = number(1e-6, 100, default=0.05)
    grey: float = number(0, 1, default=0.4)
    noise: float = number(0, 1, default=0.05)
    shift: int = 3


PRESETS = {
    "cpu": AdaptiveSettings(steps=30, step=0.1, epochs=15, lr=0.2, batch_size=64),
    "full": AdaptiveSettings(steps=250, step=0.1, epochs=40, network="resnet18", bfloat16=False),
}


@attack_with_networks("adaptive", PRESETS)
def adaptive(clean: Clean, settings: AdaptiveSettings, seed: int, *, model: Model = "cifar10-sparse") -> Made:
    """Turn all images of a dataset into adversarial examples of another class that stay so through purification.

    They have as many channels as the denoiser's images. The settings of the poisoned set hold the options, and the
    shares of it that the network calls by the label and by the target class, as they are and purified once.
    """
    denoiser = as_denoiser(model)
    purifier = eclipse(denoiser, sigma=settings.sigma, fast=settings.bfloat16)
    if purifier.image_channels != clean.x.shape[1]:
        raise InputError(
            f"The denoiser takes images of {purifier.image_channels} channels. Got {clean.x.shape[1]}: convert the "
            "images, or give another model=."
        )
    purify = purified(purifier.to(clean.x.device), seed)
    compensate = compensated(settings.grey, settings.noise, seed)
    turn = count(1)

    def defended(x_BCHW: Tensor, index_B: Tensor) -> Tensor:
        now = next(turn)
        x = purify(x_BCHW, index_B, now)
        if settings.augment:  # of what is in the victim's cache
            x = crop_and_flip(x, uniforms(seed, _VIEW, now, index_B, (3,)), settings.pad, settings.flip)
        return compensate(x, index_B, now)

    def corrupted(network: Surrogate, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        return compensate(x_BCHW, torch.arange(len(x_BCHW), device=x_BCHW.device), next(turn))

    target_N = shifted(clean, settings.shift)
    (network,) = train(_purified(clean, clean.x, purify), settings, seed, adversary=corrupted)

    def loss_of(index_B: Tensor) -> Loss:
        loss = cross_entropy(network, target_N[index_B])
        return lambda x_BCHW: loss(defended(x_BCHW, index_B))

    images = add(clean, descend(clean, replace(settings, augment=False), seed, loss_of), settings.bound)
    after = _purified(clean, torch.from_numpy(images).permute(0, 3, 1, 2), purify).x
    shares = {
        f"called_{name}{where}": share_called(network, seen, labels_N)
        for where, seen in (("", images), ("_purified", after.permute(0, 2, 3, 1).cpu().numpy()))
        for name, labels_N in (("label", clean.y), ("target", target_N))
    }
    return Made(images, {**shares, "model": identity_of(denoiser)})


def _purified(clean: Clean, x_NCHW: Tensor, purify: View) -> Clean:
    """Purify the images once, in 8 bits, as a cache holds them."""
    seen = torch.empty_like(clean.x)
    with torch.no_grad():
        for index_B in clean.batches(256):
            x = x_NCHW[index_B.to(x_NCHW.device)].to(clean.x.device).float() / 255
            seen[index_B] = quantize(purify(x, index_B, _CACHED))
    return replace(clean, x=seen)
