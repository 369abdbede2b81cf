"""Measure how purification moves clean and poisoned images, level by level (PureGen's Figure 2), and choose a level.

`dynamics` measures it as JSON and `picture` draws that; `tune` proposes a level from such curves. From the command
line they are `purifyloader dynamics` and `purifyloader tune`.
"""

from purifyloader.dynamics.measuring import Measured, dynamics, measure
from purifyloader.dynamics.paths import DiffusionPath, LangevinPath, Path
from purifyloader.dynamics.pictures import picture
from purifyloader.dynamics.tuning import Choice, choose_level, tune

__all__ = [
    "Choice",
    "DiffusionPath",
    "LangevinPath",
    "Measured",
    "Path",
    "choose_level",
    "dynamics",
    "measure",
    "picture",
    "tune",
]
