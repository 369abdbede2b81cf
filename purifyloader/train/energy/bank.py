"""Keep a bank of samples that walk on from step to step (persistent contrastive divergence).

What is drawn is a function of (seed, step, position in the batch), so that a stopped run goes on with the very same
samples, and several processes walk the very ones that one would.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from purifyloader.core import noise
from purifyloader.errors import ConfigError
from purifyloader.train.energy.config import EnergyTrainConfig

__all__ = ["DATA_NOISE", "WALK", "Bank", "image_positions", "outside", "step_keys"]

# The purpose of each number drawn for a position of a step; the Langevin steps have the words from `WALK` on.
DATA_NOISE, FRESH, WALK = 0, 1, 2  # normals; FRESH uniforms too, where the bank is of noise
_ANEW = 0  # uniform: whether a sample begins anew

# Keys beside those of (seed, step): of the bank as it begins, and of the orders in which it and the images are drawn.
_BEGIN, _SLOTS, _IMAGES = -1, -2, -3


def step_keys(config: EnergyTrainConfig, step: int, first: int, last: int) -> Tensor:
    """Return int64 keys of the positions first..last of a step's batch."""
    return noise.image_keys(config.seed, step, torch.arange(first, last))


@functools.lru_cache(maxsize=4)  # of this round and the next, of slots and images
def _order(seed: int, purpose: int, turn: int, length: int) -> Tensor:
    return noise.uniform(noise.image_keys(seed, purpose, turn), (length,))[0].argsort()


def _drawn(seed: int, purpose: int, step: int, batch_size: int, length: int) -> Tensor:
    """Draw a batch without repetition: all in a new order each time around, but for a last part of a batch."""
    batches = length // batch_size
    turn, batch = divmod(step, batches)
    return _order(seed, purpose, turn, length)[batch * batch_size : (batch + 1) * batch_size]


def image_positions(config: EnergyTrainConfig, count: int, step: int) -> Tensor:
    """Return which of `count` images a step compares its samples with, where they are not paired; (batch_size,)."""
    if count < config.batch_size:  # then with repetition
        keys_B = noise.fold_in(step_keys(config, step, 0, config.batch_size), _IMAGES)
        return (noise.uniform(keys_B, (1,))[:, 0] * count).floor().to(torch.int64)
    return _drawn(config.seed, _IMAGES, step, config.batch_size, count)


def outside(x_BCHW: Tensor, config: EnergyTrainConfig) -> float:
    """Return the share of the pixels that are further outside of [0, 1] than noise alone takes them."""
    return float(((x_BCHW < -config.margin) | (x_BCHW > 1 + config.margin)).float().mean())


class Bank:
    """Hold the `samples`, float32 (M, C, H, W), on the device of the uint8 images (N, C, H, W).

    `origin` is the image at which each began, and begins anew; int64 (M,), on the CPU.
    """

    def __init__(self, config: EnergyTrainConfig, images: Tensor) -> None:
        size = len(images) if config.bank_size is None else config.bank_size
        if size < config.batch_size:
            raise ConfigError(
                f"The bank needs a sample for each image of a batch, {config.batch_size}. Got {size}, one for each "
                "training image: give a smaller batch_size, or a bank_size."
            )
        self.config, self._images = config, images
        turns = -(-size // len(images))
        order = torch.cat([_order(config.seed, _BEGIN, turn, len(images)) for turn in range(turns)])
        self.origin = order[:size]
        keys = noise.image_keys(config.seed, _BEGIN, torch.arange(size))
        self.samples = torch.cat([self._fresh(self.origin[rows], keys[rows]) for rows in torch.arange(size).split(512)])

    def _fresh(self, origin_B: Tensor, keys_B: Tensor) -> Tensor:
        shape = self._images.shape[1:]
        keys_B = keys_B.to(self._images.device)
        if self.config.bank == "noise":
            return noise.uniform(keys_B, shape, FRESH).to(torch.float32)
        x = self._images[origin_B.to(self._images.device)].to(torch.float32) / 255
        return x + self.config.data_noise * noise.normal(keys_B, shape, FRESH)

    def slots(self, step: int) -> Tensor:
        """Choose the samples that a step walks with; int64 (batch_size,), none twice."""
        return _drawn(self.config.seed, _SLOTS, step, self.config.batch_size, len(self.samples))

    def take(self, slots_B: Tensor, keys_B: Tensor) -> Tensor:
        """Return the samples at `slots_B`, those of them that begin anew from their origin."""
        x = self.samples[slots_B.to(self.samples.device)]
        anew_B = noise.uniform(keys_B, (1,), _ANEW)[:, 0] < self.config.rejuvenation
        if bool(anew_B.any()):
            x[anew_B.to(x.device)] = self._fresh(self.origin[slots_B[anew_B]], keys_B[anew_B])
        return x

    def put(self, slots_B: Tensor, x_BCHW: Tensor) -> None:
        self.samples[slots_B.to(self.samples.device)] = x_BCHW
