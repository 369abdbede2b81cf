"""What a training script imports: transforms for the pipelines people already have."""

from purifyloader.transforms.compensation import Compensate

__all__ = ["Compensate"]
