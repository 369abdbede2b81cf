"""Energy models: a scalar that is low on clean images, and the dynamics that walk downhill in it."""

from purifyloader.energy.energies import image_energies
from purifyloader.energy.langevin import langevin, walk
from purifyloader.energy.network import EnergyConfig, EnergyNetwork

__all__ = ["EnergyConfig", "EnergyNetwork", "image_energies", "langevin", "walk"]
