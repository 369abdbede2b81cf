"""Draw the batches of a denoiser's training: images, noise levels and noise, as functions of (seed, step, position)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.train.denoiser.augment import geometric, mixup, patches
from purifyloader.train.denoiser.config import TrainConfig

__all__ = ["batch_indices", "draw_examples", "draw_sigma"]

# The purpose of each number drawn for an image of a step; augmentations have the ones above.
_TIME, _NOISE = 0, 1


@functools.lru_cache(maxsize=2)  # of this epoch and the next: drawing it takes milliseconds, in every step
def _order(seed: int, epoch: int, length: int) -> Tensor:
    return noise.uniform(noise.image_keys(seed, epoch, 0), (length,))[0].argsort()


def batch_indices(config: TrainConfig, count: int, step: int) -> Tensor:
    """Return which of `count` images a step takes, int64 (batch_size,).

    The replicated set is shuffled anew in each epoch, and batches run on across epochs.
    """
    length = count * (1 + config.replicate)
    positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    chosen = torch.empty(config.batch_size, dtype=torch.int64)
    for epoch in (positions // length).unique().tolist():
        order = _order(config.seed, epoch, length)
        here = positions // length == epoch
        chosen[here] = order[positions[here] % length] % count
    return chosen


def draw_sigma(config: TrainConfig, keys_B: Tensor) -> Tensor:
    """Draw truncated log-normal noise levels by inverting the distribution function; (B,) float64."""
    ends = torch.tensor(config.sigma_range, dtype=torch.float64).log()
    low, high = torch.special.ndtr((ends - math.log(config.sigma_center)) / config.sigma_spread)
    u = low + (high - low) * noise.uniform(keys_B, (1,), _TIME)[:, 0]
    sigma = (math.log(config.sigma_center) + config.sigma_spread * torch.special.ndtri(u)).exp()
    return sigma.clamp(*config.sigma_range)


def draw_examples(config: TrainConfig, images: Tensor, step: int, own: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the positions `own` of a step's batch: clean images in [0, 1], noise levels (B,), and standard normal noise.

    The levels are timesteps for the objective "hybrid" and sigmas for "sigma".
    """
    chosen_B = batch_indices(config, len(images), step)
    device = images.device
    keys_B = noise.image_keys(config.seed, step, torch.arange(own.start, own.stop))
    x0 = images[chosen_B[own].to(device)].to(torch.float32) / 255
    if "mixup" in config.augment:
        # a batch is a random draw, so the image before is as good as any other
        other = chosen_B.roll(1)[own].to(device)
        x0 = mixup(x0, images[other].to(torch.float32) / 255, keys_B)
    if config.patch_size is not None:
        x0 = patches(x0, keys_B, config.patch_size)
    x0 = geometric(x0, keys_B, config.augment)
    z = noise.normal(keys_B.to(device), x0.shape[1:], _NOISE)
    if config.objective == "sigma":
        return x0, draw_sigma(config, keys_B), z
    u = noise.uniform(keys_B, (1,), _TIME)[:, 0]
    return x0, (u * config.top_timestep).floor().to(torch.int64) + 1, z
