"""Name the datasets with two splits that a bench and a certification take; needs no torch, for help texts."""

from __future__ import annotations

__all__ = ["DATA"]

DATA = ("sample", "cifar10", "cifar100", "tiny-imagenet", "imagefolder")
