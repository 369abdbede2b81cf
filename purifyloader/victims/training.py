"""Train a victim: SGD on arrays in memory, the same weights again for the same seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from purifyloader.core import noise
from purifyloader.core.devices import warn_of_bfloat16
from purifyloader.errors import InputError, TrainingError
from purifyloader.victims.augment import crop_and_flip
from purifyloader.victims.networks import resnet9, victim
from purifyloader.victims.presets import TRAININGS, Training, Transfer

__all__ = ["CIFAR_MEAN", "CIFAR_STD", "BatchTransform", "Images", "Normalised", "Trained", "accuracy", "train_victim"]

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)

Images = Tensor | NDArray[np.uint8] | NDArray[np.float32]
"""uint8 (N, H, W, C), as a cache and `load_sample` give them, or float (N, C, H, W) in [0, 1]."""

BatchTransform = Callable[[Tensor, Tensor, int], Tensor]
"""(x_BCHW float32 in [0, 1], index_B int64, epoch) -> x_BCHW, called after crop and flip."""

_AUGMENT = 0x61756774  # "augt": purpose of the keys drawn here
_MOMENTUM = 0.9


class Trained(NamedTuple):
    model: nn.Module
    seconds: float


def _as_images(images: Images, count: int) -> Tensor:
    """Check images, and return them as a tensor (N, C, H, W), uint8 or float32, not copied."""
    if isinstance(images, np.ndarray) and not images.flags.writeable:
        images = images.copy()  # torch warns about sharing memory that it must not write
    x = torch.as_tensor(images)
    bytes_ = x.dtype == torch.uint8
    if x.ndim != 4 or len(x) == 0 or not (bytes_ or x.dtype.is_floating_point) or x.shape[3 if bytes_ else 1] != 3:
        raise InputError(
            "Images must be uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1], at least one, of 3 channels. "
            f"Got {x.dtype} {tuple(x.shape)}."
        )
    if len(x) != count:
        raise InputError(f"There must be one label per image. Got {len(x)} images and {count} labels.")
    return x.permute(0, 3, 1, 2) if bytes_ else x.to(torch.float32)


def _as_labels(labels: Tensor | NDArray | Sequence[int], classes: int) -> Tensor:
    y = labels if isinstance(labels, Tensor) else torch.tensor(np.asarray(labels))
    if y.ndim != 1 or len(y) == 0 or y.dtype.is_floating_point or y.dtype == torch.bool:
        raise InputError(f"Labels must be integers (N,), at least one. Got {y.dtype} {tuple(y.shape)}.")
    y = y.to(torch.int64)
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise InputError(f"Labels must lie in [0, {classes}), or classes= be given. Got {low} to {high}.")
    return y


def _to_float(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.to(torch.float32).div_(255) if x_BCHW.dtype == torch.uint8 else x_BCHW


def _normalise(x_BCHW: Tensor) -> Tensor:
    # CIFAR-10's numbers for every set: batch normalisation makes a victim indifferent to small differences
    mean = torch.tensor(CIFAR_MEAN, device=x_BCHW.device).reshape(1, 3, 1, 1)
    std = torch.tensor(CIFAR_STD, device=x_BCHW.device).reshape(1, 3, 1, 1)
    return ((x_BCHW - mean) / std).contiguous(memory_format=torch.channels_last)


class Normalised(nn.Module):
    """Network that takes images (B, 3, H, W) in [0, 1], and normalises them itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.network(_normalise(x_BCHW))
        return logits


def _learning_rate(progress: float, peak: float, warmup: float | None) -> float:
    """Rise from 0 to `peak` over the share `warmup` of the steps, then fall to 0, linearly; None is constant."""
    if warmup is None:
        return peak
    return peak * min(progress / warmup if warmup else 1.0, (1 - progress) / (1 - warmup))


def _going_on(start: nn.Module, classes: int, head_only: bool, keep_head: bool) -> nn.Module:
    """Copy a network whose last linear layer is initialised again, or kept; `head_only` freezes all else."""
    model = copy.deepcopy(start).cpu()  # so that every device starts from the same layer
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features != classes:
        got = f"{linear[-1].out_features} outputs" if linear else "no linear layer"
        raise InputError(f"network must end in a linear layer with an output for each of {classes} classes. Got {got}.")
    model.requires_grad_(not head_only)
    linear[-1].requires_grad_(True)
    if not keep_head:
        linear[-1].reset_parameters()
    # frozen features are those of evaluation: batch normalisation would go on counting, and dropout drawing
    return model.train(not head_only)


def train_victim(
    images: Images | Callable[[int], Images],
    labels: Tensor | NDArray | Sequence[int],
    training: Training = TRAININGS["short"],
    *,
    classes: int = 10,
    network: str | nn.Module = "resnet9",
    width: int = 16,
    keep_head: bool = False,
    pad: int = 4,
    flip: bool = True,
    batch_transform: BatchTransform | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    bfloat16: bool = True,
) -> Trained:
    """Train a network with SGD, and time it.

    Its draws in an epoch (order, crop, flip) are a function of (seed, epoch, index); on the CPU with one number of
    threads the same arguments give the same weights.

    Args:
        images: uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1]; or a function of the epoch that gives
            them, always N in the same order, for a training set that changes.
        labels: integers (N,) in [0, classes).
        training: its steps; images that are left over at the end of an epoch are left out of it.
        network: one of `victims.VICTIMS`, a "resnet9" of this `width`; or a network to go on from, which is copied, and
            its last linear layer made anew unless `keep_head`.
        pad: pixels of black border for the random crop, 0 for none; flip: mirror half of the images.
        batch_transform: called after crop and flip with the float batch in [0, 1], the indices of its images and the
            epoch; its result, clamped by nobody, is normalised and trained on.
        bfloat16: autocast the network's arithmetic; weights stay float32.

    Returns:
        The model in evaluation mode, and seconds of training (of `images(epoch)` and transforms too).

    Raises:
        InputError: images, labels or arguments that do not fit.
        TrainingError: the loss is not finite.
    """
    y = _as_labels(labels, classes)
    epochs, lr, warmup = training.epochs, training.lr, training.warmup
    if epochs < 1 or training.batch_size < 1 or not lr > 0 or not (warmup is None or 0 <= warmup < 1) or pad < 0:
        raise InputError(
            "epochs and batch_size must be at least 1, lr above 0, warmup in [0, 1) or None, pad at least 0. "
            f"Got {epochs}, {training.batch_size}, {lr}, {warmup}, {pad}."
        )
    head_only = isinstance(training, Transfer) and training.head_only
    if head_only and isinstance(network, str):
        raise InputError(
            "head_only leaves the features of a network as they are: network must be one that has learned. "
            f"Got the name {network!r}."
        )
    device = torch.device(device)
    if bfloat16:
        warn_of_bfloat16(device)
    # numbers that a network draws by itself, as dropout does, come from the seed too
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if not isinstance(network, str):
            model = _going_on(network, classes, head_only, keep_head)
        else:
            model = resnet9(classes, width) if network == "resnet9" else victim(network, classes)
        model = model.to(device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(
            trained, lr=lr, momentum=_MOMENTUM, weight_decay=training.weight_decay, nesterov=True
        )
        size = min(training.batch_size, len(y))
        steps = epochs * (len(y) // size)
        y = y.to(device)
        began = time.perf_counter()
        taken = 0
        for epoch in range(epochs):
            x = _as_images(images(epoch) if callable(images) else images, len(y)).to(device)
            for index_B, batch in _batches(x, size, pad, flip, seed, epoch):
                if batch_transform is not None:
                    batch = batch_transform(batch, index_B, epoch)
                for group in optimiser.param_groups:
                    group["lr"] = _learning_rate((taken + 0.5) / steps, lr, warmup)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    logits = model(_normalise(batch))
                loss = F.cross_entropy(logits.float(), y[index_B], label_smoothing=training.label_smoothing)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                taken += 1
            if not torch.isfinite(loss):
                raise TrainingError(f"The loss must be finite: lower lr={lr}. Got {loss.item()} in epoch {epoch}.")
    return Trained(model.requires_grad_(True).eval(), time.perf_counter() - began)


def _batches(x_NCHW: Tensor, size: int, pad: int, flip: bool, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle, crop and flip the images of an epoch, as a function of (seed, epoch, index): (indices, float batch)."""
    count, device = len(x_NCHW), x_NCHW.device
    # drawn on the CPU, so that every device trains on the same crops
    key = noise.fold_in(noise.fold_in(noise.key_from_seed(seed), _AUGMENT), epoch)
    uniform = noise.uniform(noise.fold_in(key, torch.arange(count)), (4,))
    order, uniform = uniform[:, 0].argsort(stable=True).to(device), uniform[:, 1:].to(device)
    for step in range(count // size):
        index_B = order[step * size : (step + 1) * size]
        yield index_B, crop_and_flip(_to_float(x_NCHW[index_B]), uniform[index_B], pad, flip)


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Images, labels: Tensor | NDArray | Sequence[int], *, batch_size: int = 500
) -> float:
    """Compute the share of images whose largest logit is their label's, in [0, 1], in evaluation mode and float32."""
    y = (labels if isinstance(labels, Tensor) else torch.tensor(np.asarray(labels))).cpu()
    x = _as_images(images, len(y))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(x), batch_size):
        logits = model(_normalise(_to_float(x[start : start + batch_size].to(device))))
        right += int((logits.argmax(dim=1).cpu() == y[start : start + batch_size]).sum())
    model.train(was_training)
    return right / len(x)
