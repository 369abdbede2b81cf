"""Train the attacker's own network, a stand-in for the victim that nobody knows yet.

Other than `victims.training.train_victim`, which trains from start to end, this training stops after any number of
steps, as an attack may change the images or take a copy of the network there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from purifyloader.core.devices import warn_of_bfloat16
from purifyloader.errors import InputError, TrainingError
from purifyloader.poisons.attacks.clean import Clean
from purifyloader.poisons.attacks.pgd import Loss, pgd, random_start
from purifyloader.poisons.attacks.presets import AdversarialSettings, AttackSettings, TrainedSettings
from purifyloader.victims.augment import crop_and_flip, uniforms
from purifyloader.victims.networks import last_features, resnet9, victim

__all__ = ["Surrogate", "Training", "adversary", "cross_entropy", "share_called", "train", "worst_case"]

_AUGMENT = 0x61756774  # "augt": what the keys drawn here are for
_WARMUP = 0.2


class Surrogate(nn.Module):
    """A network of `victims.networks` with the normalisation inside: images (B, 1 or 3, H, W) in [0, 1] to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, clean: Clean, settings: AttackSettings, seed: int) -> None:
        super().__init__()
        # torch.manual_seed would seed the user's CUDA generators as well
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            own = settings.network == "resnet9"
            self.network = resnet9(clean.classes, settings.width) if own else victim(settings.network, clean.classes)
        self.in_bfloat16 = settings.bfloat16
        if settings.bfloat16:
            warn_of_bfloat16(clean.x.device)
        # from counts of the 256 levels, which are exact on any device and need no copy in floating point
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in clean.x.unbind(1)]).cpu()
        level = torch.arange(256, dtype=torch.float64) / 255
        share = counts / counts.sum(dim=1, keepdim=True).double()
        mean = (share * level).sum(dim=1)
        variance = (share * level.square()).sum(dim=1) - mean.square()
        self.register_buffer("mean", mean.float().reshape(1, -1, 1, 1))
        self.register_buffer("std", variance.clamp_min(1e-4).sqrt().float().reshape(1, -1, 1, 1))
        self.to(clean.x.device)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = ((x_BCHW - self.mean) / self.std).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        # Without the cache, which lives as long as the outermost autocast: its weights would be those of step 1.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=False):
            logits: Tensor = self.network(x)
        return logits.float()

    def features(self, x_BCHW: Tensor) -> Tensor:
        return last_features(self, x_BCHW)


def cross_entropy(network: nn.Module, y_B: Tensor) -> Loss:
    """Return a function that gives the loss of each image for these labels."""
    return lambda x_BCHW: F.cross_entropy(network(x_BCHW), y_B, reduction="none")


def worst_case(
    network: Surrogate, x_BCHW: Tensor, y_B: Tensor, settings: AdversarialSettings, random: torch.Generator
) -> Tensor:
    """Find the perturbation within the attack's bound that makes the loss of each image large, from a random start."""
    bound = settings.attack_bound
    start = random_start(torch.rand(x_BCHW.shape, generator=random).to(x_BCHW.device), bound)
    return pgd(
        cross_entropy(network, y_B),
        x_BCHW.detach(),
        bound,
        steps=settings.attack_steps,
        step_size=settings.attack_step * bound.epsilon,
        start=start,
    )


def adversary(settings: AdversarialSettings, seed: int) -> Callable[[Surrogate, Tensor, Tensor], Tensor]:
    """Return what puts images at their `worst_case` in adversarial training: (network, x_BCHW, y_B) -> x_BCHW."""
    random = torch.Generator().manual_seed(seed)
    return lambda network, x_BCHW, y_B: x_BCHW + worst_case(network, x_BCHW, y_B, settings, random)


class Training:
    """SGD on shuffled batches, one step at a time.

    What an epoch draws (order, crop, flip) is a function of (seed, epoch, index). The learning rate rises and falls
    over `total` steps; with None it is constant. After a step the network is in training mode.
    """

    def __init__(self, clean: Clean, settings: AttackSettings, seed: int, total: int | None = None) -> None:
        self.clean, self.settings, self.seed, self.total = clean, settings, seed, total
        self.network = Surrogate(clean, settings, seed)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        self.taken = 0
        self._epoch = -1
        self._order = self._uniform = torch.empty(0)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Indices of the next batch (B,) and its uniforms (B, 3) for `crop_and_flip`."""
        count = len(self.clean.y)
        size = min(self.settings.batch_size, count)
        epoch, step = divmod(self.taken, count // size)  # what is left over is left out of the epoch
        if epoch != self._epoch:
            drawn = uniforms(self.seed, _AUGMENT, epoch, torch.arange(count), (4,))
            self._order = drawn[:, 0].argsort(stable=True).to(self.clean.y.device)
            self._uniform, self._epoch = drawn[:, 1:].to(self.clean.y.device), epoch
        index_B = self._order[step * size : (step + 1) * size]
        return index_B, self._uniform[index_B]

    def learn(self, x_BCHW: Tensor, y_B: Tensor) -> None:
        """Take a step on these images; a loss that is not finite is a `TrainingError`."""
        lr = self.settings.lr
        if self.total is not None:
            progress = (self.taken + 0.5) / self.total
            lr *= min(progress / _WARMUP, (1 - progress) / (1 - _WARMUP))
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.network.train()
        loss = F.cross_entropy(self.network(x_BCHW), y_B)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.taken += 1
        self.clean.bar.update()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The surrogate's loss must be finite: lower lr={self.settings.lr}. Got {loss.item()} in step "
                f"{self.taken}."
            )


def train(
    clean: Clean,
    settings: TrainedSettings,
    seed: int,
    *,
    checkpoints: int = 1,
    adversary: Callable[[Surrogate, Tensor, Tensor], Tensor] | None = None,
) -> list[Surrogate]:
    """Train a surrogate on the clean images; return it as it was at equidistant steps, the end the last.

    `adversary` maps (network in evaluation mode, x_BCHW, y_B) to x_BCHW to learn from instead: adversarial training.
    """
    size = min(settings.batch_size, len(clean.y))
    total = settings.epochs * (len(clean.y) // size)
    if checkpoints > total:
        raise InputError(f"There can be as many checkpoints as steps of training, {total}. Got {checkpoints}.")
    training = Training(clean, settings, seed, total)
    found: list[Surrogate] = []
    for step in range(1, total + 1):
        index_B, uniform_B3 = training.next_batch()
        x, y = crop_and_flip(clean.images(index_B), uniform_B3, settings.pad, settings.flip), clean.y[index_B]
        if adversary is not None:
            x = adversary(training.network.eval(), x, y)
        training.learn(x, y)
        if step * checkpoints // total > len(found):
            found.append(copy.deepcopy(training.network).eval().requires_grad_(False))
    return found


@torch.no_grad()
def share_called(network: nn.Module, images: NDArray[np.uint8], labels_N: Tensor, batch_size: int = 500) -> float:
    """Return the share of images, uint8 (N, H, W, C), that the network in evaluation mode calls by these labels."""
    network.eval()
    device = next(network.parameters()).device
    right = 0
    for start in range(0, len(images), batch_size):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2)))
        called = network(part.to(device).float() / 255).argmax(dim=1)
        right += int((called == labels_N[start : start + batch_size].to(device)).sum())
    return right / len(images)
