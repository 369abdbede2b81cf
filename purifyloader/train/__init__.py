"""Train denoisers from a few clean images; `purifyloader.train.energy` trains energy models."""

from purifyloader.train.denoiser.config import RECIPES, TrainConfig, recipe
from purifyloader.train.denoiser.task import train_denoiser
from purifyloader.train.fields import started_from

__all__ = ["RECIPES", "TrainConfig", "recipe", "started_from", "train_denoiser"]
