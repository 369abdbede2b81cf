"""Train denoisers from a few clean images; `purifyloader.train.energy` trains energy models."""

from purifyloader.train.denoiser.config import RECIPES, TrainConfig, recipe
from purifyloader.train.denoiser.task import train_denoiser
from purifyloader.train.fields import distilled_from, started_from

__all__ = ["RECIPES", "TrainConfig", "distilled_from", "recipe", "started_from", "train_denoiser"]
