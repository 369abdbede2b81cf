"""Training denoisers from a few clean images."""

from purifyloader.train.config import RECIPES, TrainConfig, recipe
from purifyloader.train.loop import started_from, train_denoiser

__all__ = ["RECIPES", "TrainConfig", "recipe", "started_from", "train_denoiser"]
