"""Training denoisers from a few clean images."""

from purifyloader.train.denoiser.config import RECIPES, TrainConfig, recipe
from purifyloader.train.denoiser.task import started_from, train_denoiser

__all__ = ["RECIPES", "TrainConfig", "recipe", "started_from", "train_denoiser"]
