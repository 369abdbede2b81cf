"""Energy models: a scalar that is low on clean images."""

from purifyloader.energy.network import EnergyConfig, EnergyNetwork

__all__ = ["EnergyConfig", "EnergyNetwork"]
