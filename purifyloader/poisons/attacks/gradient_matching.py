"""Gradient matching (Witches' Brew; Geiping et al. 2021, arXiv:2009.02276, eq. 3, Algorithm 1). For testing defences.

    B(delta) = 1 - <g_t, g(delta)> / (|g_t| |g(delta)|),    delta = argmin over |delta| <= epsilon  B(delta)

    g_t = grad_theta loss(f(x_t), y_adv),    g(delta) = grad_theta 1/P sum_i loss(f(x_i + delta_i), y_i),   y_i = y_adv

Who learns the P poisons, images of class y_adv under that label, takes the steps that would teach it to call the
target x_t so. B is lowered by signed Adam (plain Adam for l2), whose steps become a tenth as long after 3/8, 5/8 and
7/8 of them, through crops and flips drawn again each time; the best of R restarts is kept. Of several surrogates it is
the mean B that is lowered. As in the published code, more poisons than fit in a batch are matched batch by batch, each
batch's gradient with the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from purifyloader.errors import InputError
from purifyloader.poisons.attacks.clean import Clean, add
from purifyloader.poisons.attacks.few import Few, Poisons, attack_on_target, rate, trained, within
from purifyloader.poisons.attacks.pgd import random_start
from purifyloader.poisons.attacks.presets import TrainedSettings
from purifyloader.victims.augment import crop_and_flip, uniforms

__all__ = ["PRESETS", "GradientMatchingSettings", "gradient_matching", "loss_gradient", "mismatch"]

_ATTACK = 0x676D6368  # "gmch"
_START, _VIEW = 0x676D7374, 0x676D7677  # "gmst", "gmvw": what the keys drawn here are for
_TINY = 1e-20  # far below any gradient, and its square; one of zero, of a network that is certain, has B = 1

Gradient = tuple[Tensor, ...]  # of a loss in each parameter of a network
Matched = list[tuple[nn.Module, Gradient]]  # surrogates, and the gradient that would teach each to call the target so


@dataclass(frozen=True, kw_only=True)
class GradientMatchingSettings(TrainedSettings):
    """Settings of `gradient_matching`. An epsilon of None is 16/255 here, and 1 for l2.

    bfloat16 is of the training alone: a gradient's gradient gains little speed by it, and B falls less far.

    Attributes:
        restarts: R, how often to begin again from another random perturbation, for `steps` each.
        surrogates: how many networks to train, from as many seeds, where none are given.
        bases: which images of the target class to poison, those of the "largest" gradient at the surrogates or, as the
            published code does, "random" ones.
    """

    EPSILON: ClassVar[Mapping[str, float]] = {"linf": 16 / 255, "l2": 1.0}

    restarts: int
    surrogates: int = 1
    bases: Literal["largest", "random"] = "largest"


# The published step, 0.1 for images divided by their standard deviation of about 1/4, is 0.4 of 16/255.
PRESETS = {
    "cpu": GradientMatchingSettings(steps=100, step=0.4, restarts=1, epochs=15, augment=True, lr=0.2, batch_size=64),
    "full": GradientMatchingSettings(
        steps=250,
        step=0.4,
        restarts=8,
        epochs=40,
        augment=True,
        network="resnet18",
        lr=0.2,
        batch_size=512,
        bfloat16=False,
    ),
}


def _in_float32(clean: Clean, settings: GradientMatchingSettings, seed: int) -> Sequence[nn.Module]:
    networks = trained(clean, settings, seed)
    for network in networks:
        network.in_bfloat16 = False
    return networks


@attack_on_target(
    "gradient-matching",
    PRESETS,
    purpose=_ATTACK,
    default=lambda clean: max(1, round(0.01 * len(clean))),
    surrogates=_in_float32,
)
def gradient_matching(
    clean: Clean, few: Few, networks: Sequence[nn.Module], settings: GradientMatchingSettings, seed: int
) -> Poisons:
    """Have a victim, trained from scratch on the set, call one test image by the class of a few: 1 % unless said.

    The settings of the poisoned set hold the options; for each surrogate B of the bases and of the poisons, without
    crops, and the class that it calls the target; and the mean B of each restart.
    """
    label_1 = torch.tensor([few.target.label], device=clean.y.device)
    _check_classes(networks, few)
    matched = [(network, loss_gradient(network, few.target_1CHW, label_1)) for network in networks]
    if settings.bases == "largest":
        index_K = _largest(clean, networks, few.target.label, len(few.index_K))
        few = replace(few, index_K=index_K, base_KCHW=clean.images(index_K))
    tried = [_brew(few, matched, settings, seed, restart, clean.bar) for restart in range(settings.restarts)]
    scores = [sum(_losses(matched, few, few.base_KCHW + delta, settings)) / len(networks) for delta in tried]
    images = add(clean, tried[scores.index(min(scores))], settings.bound, few.index_K)
    which = few.index_K.cpu().numpy()
    poison_KCHW = torch.from_numpy(images[which]).permute(0, 3, 1, 2).to(clean.x.device).float() / 255
    before, after = (_losses(matched, few, x_KCHW, settings) for x_KCHW in (few.base_KCHW, poison_KCHW))
    return few, images, {"b_before": before, "b_after": after, "b_of_restart": scores}


def loss_gradient(network: nn.Module, x_BCHW: Tensor, y_B: Tensor, *, again: bool = False) -> Gradient:
    """Compute the gradient of the mean loss in all parameters of a network, which may be frozen and stays as it is.

    With `again` it has a gradient itself.
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in network.named_parameters()}  # no copies
    logits = functional_call(network, weights, (x_BCHW.expand(-1, 3, -1, -1),))
    loss = F.cross_entropy(logits, y_B)
    # a parameter that the logits do not depend on has a gradient of zero
    return torch.autograd.grad(loss, list(weights.values()), create_graph=again, materialize_grads=True)


def mismatch(found: Gradient, wanted: Gradient) -> Tensor:
    """Compute B: 1 less the cosine of the angle between two gradients, over all parameters together."""
    product = torch.stack([(a * b).sum() for a, b in zip(found, wanted, strict=True)]).sum()
    return 1 - product / (_length(found) * _length(wanted))


def _length(gradient: Gradient) -> Tensor:
    return torch.stack([part.square().sum() for part in gradient]).sum().clamp_min(_TINY).sqrt()


def _losses(matched: Matched, few: Few, x_KCHW: Tensor, settings: GradientMatchingSettings) -> list[float]:
    parts = x_KCHW.split(settings.batch_size)
    return [
        sum(float(mismatch(loss_gradient(network, x, _labels(few, x)), wanted)) for x in parts) / len(parts)
        for network, wanted in matched
    ]


def _labels(few: Few, x_BCHW: Tensor) -> Tensor:
    return torch.full((len(x_BCHW),), few.target.label, device=x_BCHW.device)


def _brew(few: Few, matched: Matched, settings: GradientMatchingSettings, seed: int, restart: int, bar: Any) -> Tensor:
    """Find a perturbation of each base, (K, C, H, W), that makes B small."""
    base, bound = few.base_KCHW, settings.bound
    uniform_KCHW = uniforms(seed, _START, restart, few.index_K, tuple(base.shape[1:]))
    x = within(base + random_start(uniform_KCHW, bound), base, bound)
    first = rate(settings, base)
    adam = torch.optim.Adam([x], lr=first, eps=_TINY)
    for step in range(settings.steps):
        view_K3 = uniforms(seed, _VIEW, restart * settings.steps + step, few.index_K, (3,))
        gradient = torch.zeros_like(x)
        for part in torch.arange(len(x), device=x.device).split(settings.batch_size):
            for network, wanted in matched:
                x_BCHW = x[part].requires_grad_()
                seen = crop_and_flip(x_BCHW, view_K3[part], settings.pad, settings.flip) if settings.augment else x_BCHW
                b = mismatch(loss_gradient(network, seen, _labels(few, x_BCHW), again=True), wanted)
                gradient[part] += torch.autograd.grad(b, x_BCHW)[0]
                bar.update()
        x.grad = gradient.sign() if bound.norm == "linf" else gradient
        adam.param_groups[0]["lr"] = first * 0.1 ** sum(8 * step >= eighths * settings.steps for eighths in (3, 5, 7))
        adam.step()
        x.copy_(within(x, base, bound))
    return x - base


def _largest(clean: Clean, networks: Sequence[nn.Module], label: int, count: int) -> Tensor:
    """Return rising indices of the images of a class whose own gradients are longest, in the mean over the networks."""
    members = (clean.y == label).nonzero()[:, 0]
    lengths = []
    for index_1 in members.split(1):
        x_1CHW, label_1 = clean.images(index_1), clean.y[index_1]
        lengths.append(sum(float(_length(loss_gradient(network, x_1CHW, label_1))) for network in networks))
        clean.bar.update()
    order = torch.tensor(lengths).argsort(descending=True, stable=True)
    return members[order[:count].to(members.device)].sort().values


@torch.no_grad()
def _check_classes(networks: Sequence[nn.Module], few: Few) -> None:
    """Refuse a network that does not know the target class, with an InputError."""
    for number, network in enumerate(networks):
        classes = network(few.target_1CHW.expand(-1, 3, -1, -1)).shape[1]
        if classes <= few.target.label:
            raise InputError(
                f"networks[{number}] must have a logit for target_class {few.target.label}. Got {classes} logits: give "
                "a network for the classes of the set."
            )
