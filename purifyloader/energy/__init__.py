"""Energy models: a scalar that is low on clean images, and the dynamics that walk downhill in it."""

from purifyloader.energy.network import EnergyConfig, EnergyNetwork, image_energies
from purifyloader.energy.walking import langevin, walk

__all__ = ["EnergyConfig", "EnergyNetwork", "image_energies", "langevin", "walk"]
