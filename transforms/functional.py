"""The kernels behind the transforms: pure functions of image batches, what they draw given as keys."""

from purifyloader.corruptions import compensate, jpeg

__all__ = ["compensate", "jpeg"]
