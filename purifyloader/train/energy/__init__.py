"""Train energy models by maximum likelihood."""

from purifyloader.train.energy.config import ENERGY_RECIPES, EnergyTrainConfig, energy_recipe
from purifyloader.train.energy.task import train_energy

__all__ = ["ENERGY_RECIPES", "EnergyTrainConfig", "energy_recipe", "train_energy"]
