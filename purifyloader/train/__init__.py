"""Training denoisers from a few clean images."""

from purifyloader.train.denoiser import PRESETS, TrainConfig, train_denoiser

__all__ = ["PRESETS", "TrainConfig", "train_denoiser"]
