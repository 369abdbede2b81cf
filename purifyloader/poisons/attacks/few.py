"""Move a few images of one class towards a test image in the features of networks.

A network that learns them takes that image for their class. Poison Frogs and Bullseye Polytope share this module.

    x <- P(B(x - Adam of the objective's gradient)),    P the bound around the bases and the range of pixels

B is the backward step of an attack that has one. Adam is used because the length of a gradient in features, and with
it the step of a plain descent, differs by orders of magnitude between networks.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from purifyloader.errors import InputError
from purifyloader.poisons.attacks.choice import as_target, drawn_of_class
from purifyloader.poisons.attacks.clean import Clean, Made, attack_with_networks
from purifyloader.poisons.attacks.pgd import project
from purifyloader.poisons.attacks.presets import TrainedSettings
from purifyloader.poisons.attacks.surrogate import Surrogate, train
from purifyloader.poisons.poisoned import Bound, Poisoned, Target
from purifyloader.victims.augment import crop_and_flip, uniforms
from purifyloader.victims.networks import last_features

__all__ = [
    "Few",
    "Objective",
    "Poisons",
    "aims",
    "approach",
    "attack_on_target",
    "distances",
    "features",
    "rate",
    "trained",
    "within",
]

_VIEW = 0x66657776  # "fewv": what the keys drawn here are for
_TINY = 1e-12  # of Adam, far below any gradient: that of one among a thousand poisons is a thousandth

Objective = Callable[[Tensor], Iterable[Tensor]]
"""(x_KCHW in [0, 1]) -> terms to add up, one after the other, so that only one graph is in memory at a time."""


@dataclass(frozen=True, eq=False)
class Few:
    """Hold the bases to poison (rising indices, images in [0, 1]) and the target whose features they shall have."""

    target: Target
    target_1CHW: Tensor
    index_K: Tensor
    base_KCHW: Tensor


def _few(clean: Clean, aim: Target, index_K: Tensor) -> Few:
    image_1CHW = torch.from_numpy(np.array(aim.image.transpose(2, 0, 1)[None], order="C"))  # torch may not write to it
    return Few(aim, image_1CHW.to(clean.x.device).to(torch.float32) / 255, index_K, clean.images(index_K))


@contextmanager
def _evaluated(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put the networks into evaluation mode, and restore the mode of each of their modules afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_networks(networks: Any, image_1CHW: Tensor) -> list[nn.Module]:
    """Refuse networks of the user's that do not map one image to logits through a last linear layer."""
    listed = isinstance(networks, list | tuple) and len(networks) > 0
    if not listed or not all(isinstance(network, nn.Module) for network in networks):
        got = f"[{', '.join(type(each).__name__ for each in networks)}]" if listed else repr(networks)
        raise InputError(f"networks must be a list of one nn.Module or more, or None to train surrogates. Got {got}.")
    for number, network in enumerate(networks):
        if not any(isinstance(module, nn.Linear) for module in network.modules()):
            raise InputError(
                f"networks[{number}] must have an nn.Linear, whose input the features are. Got "
                f"{type(network).__name__} without one: end it in an nn.Linear."
            )
        with _evaluated([network]), torch.no_grad():
            try:
                shapes = network(image_1CHW.expand(-1, 3, -1, -1)).shape, features(network, image_1CHW).shape
            except (RuntimeError, IndexError, AttributeError) as error:
                raise InputError(
                    f"networks[{number}] must map float32 images (B, 3, {image_1CHW.shape[2]}, {image_1CHW.shape[3]}) "
                    f"on {image_1CHW.device} to logits through its last nn.Linear. Got {error}: move it there, or "
                    "wrap it."
                ) from error
        if any(len(shape) != 2 or shape[0] != 1 for shape in shapes):
            raise InputError(
                f"networks[{number}] must give logits (B, classes), and its last nn.Linear read features (B, F). Got "
                f"{tuple(shapes[0])} and {tuple(shapes[1])} of an image: wrap it, or flatten before that layer."
            )
    return list(networks)


def features(network: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Return what the network's last linear layer reads of images in colour or grey, (B, F); with a gradient."""
    return last_features(network, x_BCHW.expand(-1, 3, -1, -1))


@torch.no_grad()
def _features_in_each(networks: Sequence[nn.Module], x_KCHW: Tensor, batch_size: int) -> list[Tensor]:
    return [torch.cat([features(network, x_BCHW) for x_BCHW in x_KCHW.split(batch_size)]) for network in networks]


def aims(networks: Sequence[nn.Module], target_1CHW: Tensor) -> list[Tensor]:
    """Return the target's features (1, F) in each network; refuse those that are nothing to aim at."""
    features_of = _features_in_each(networks, target_1CHW, 1)
    for number, aim_1F in enumerate(features_of):
        length = float(aim_1F.norm())
        if not 0 < length < math.inf:
            raise InputError(
                f"The target's features in each network must be finite, and not all zero. Got {length} as the length "
                f"of those in network {number}: lower lr, or give networks that are trained."
            )
    return features_of


def rate(settings: TrainedSettings, x_KCHW: Tensor) -> float:
    """Return Adam's learning rate: each step moves a value by about `step` of epsilon, in the bound's norm."""
    return settings.step_size / (1.0 if settings.norm == "linf" else math.sqrt(x_KCHW[0].numel()))


def within(x_KCHW: Tensor, base_KCHW: Tensor, bound: Bound) -> Tensor:
    """Bring the images within the bound around the bases, and into [0, 1]."""
    return (base_KCHW + project(x_KCHW - base_KCHW, bound)).clamp(0, 1)


def approach(
    objective: Objective,
    base_KCHW: Tensor,
    settings: TrainedSettings,
    bar: Any,
    *,
    index_K: Tensor,
    seed: int,
    start: Tensor | None = None,
    backward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Find images that make the objective small, as perturbations of the bases (K, C, H, W).

    With `settings.augment` it is of views as a training would crop and flip them, drawn by the index and the seed. It
    starts from images brought within the bound, the bases if None; `backward` comes after each step of Adam, before
    the bound. A term of the objective is a unit of progress.
    """
    x = within(base_KCHW if start is None else start, base_KCHW, settings.bound).requires_grad_()
    adam = torch.optim.Adam([x], lr=rate(settings, base_KCHW), eps=_TINY)
    for turn in range(settings.steps):
        gradient = torch.zeros_like(x)
        seen = x
        if settings.augment:
            seen = crop_and_flip(x, uniforms(seed, _VIEW, turn, index_K, (3,)), settings.pad, settings.flip)
        for term in objective(seen):
            gradient += torch.autograd.grad(term, x, retain_graph=settings.augment)[0]  # the view is all terms' own
            bar.update()
        x.grad = gradient
        adam.step()
        with torch.no_grad():
            x.copy_(within(x if backward is None else backward(x), base_KCHW, settings.bound))
    return x.detach() - base_KCHW


@torch.no_grad()
def _predicted_labels(networks: Sequence[nn.Module], image_1CHW: Tensor) -> list[int]:
    return [int(network(image_1CHW.expand(-1, 3, -1, -1)).argmax()) for network in networks]


def distances(
    few: Few,
    images: NDArray[np.uint8],
    networks: Sequence[nn.Module],
    aim_of: Sequence[Tensor],
    apart: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> dict[str, list[float]]:
    """Measure how far from the target the poisons are in each network's features, before and after: JSON values.

    `images` are all of the set; `apart` takes features (K, F) of the poisons and those (1, F) of the target.
    """

    def of(x_KCHW: Tensor) -> list[float]:
        features_of = _features_in_each(networks, x_KCHW, batch_size)
        return [float(apart(feature_KF, aim_1F)) for feature_KF, aim_1F in zip(features_of, aim_of, strict=True)]

    after_KHWC = torch.from_numpy(images[few.index_K.cpu().numpy()]).to(few.base_KCHW.device)
    after_KCHW = after_KHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
    return {"distance_before": of(few.base_KCHW), "distance_after": of(after_KCHW)}


def trained(clean: Clean, settings: TrainedSettings, seed: int) -> list[Surrogate]:
    """Train as many surrogates as the settings say, one if they do not, from the seeds seed, seed + 1, ..."""
    seeds = range(operator.index(seed), operator.index(seed) + getattr(settings, "surrogates", 1))
    return [train(clean, settings, each)[0] for each in seeds]


Poisons = tuple[Few, NDArray[np.uint8], dict[str, Any]]
"""What was poisoned, all images uint8 (N, H, W, C), and JSON values to record beside the settings."""

Core = Callable[[Clean, Few, Sequence[nn.Module], Any, int], Poisons]
"""(clean, few, networks in evaluation mode, settings, seed) -> what an attack makes of them."""


def attack_on_target(
    name: str,
    presets: Mapping[str, TrainedSettings],
    *,
    purpose: int,
    default: Callable[[Clean], int],
    surrogates: Callable[[Clean, Any, int], Sequence[nn.Module]] = trained,
) -> Callable[[Core], Callable[..., Poisoned]]:
    """Make an attack that is aimed at one test image out of its core. A decorator; see `attack_with_networks`.

    Args:
        purpose: what the images are drawn by, beside the seed.
        default: how many images to poison if neither count nor share is set.
        surrogates: trains the networks if the caller passes none.
    """

    def decorate(core: Core) -> Callable[..., Poisoned]:
        def on_target(
            clean: Clean,
            settings: TrainedSettings,
            seed: int,
            *,
            target: Any,
            target_class: int | None = None,
            count: int | None = None,
            share: float | None = None,
            networks: Sequence[nn.Module] | None = None,
        ) -> Made:
            channels, height, width = clean.x.shape[1:]
            aim = as_target(target, target_class, (height, width, channels), clean.classes)
            labels, wanted = clean.y.cpu().numpy(), default(clean)
            which = drawn_of_class(labels, aim.label, share, count, default=wanted, seed=seed, attack=purpose)
            few = _few(clean, aim, which.to(clean.x.device))
            used = surrogates(clean, settings, seed) if networks is None else _check_networks(networks, few.target_1CHW)
            with _evaluated(used):
                few, images, measured = core(clean, few, used, settings, seed)
                facts = {
                    "target": {
                        "sha256": hashlib.sha256(few.target.image.tobytes()).hexdigest(),
                        "index": few.target.index,
                    },
                    "target_class": few.target.label,
                    "share": share,
                    "count": count,
                    "networks": None if networks is None else len(used),
                    "target_called": _predicted_labels(used, few.target_1CHW),
                }
            fields = {"poisoned": few.index_K.cpu().numpy(), "target": few.target}
            return Made(images, {**facts, **measured}, fields)

        return attack_with_networks(name, presets)(functools.wraps(core, updated=())(on_target))

    return decorate
