"""The kernels behind the transforms: pure functions of image batches, what they draw given as keys."""

from purifyloader.core.corruptions import bit_depth, coin, compensate, grayscale, jpeg

__all__ = ["bit_depth", "coin", "compensate", "grayscale", "jpeg"]
