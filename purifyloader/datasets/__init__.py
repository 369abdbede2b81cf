"""Datasets by name, folder or tar; their samples, splits and selections. Needs no torch, for help texts."""

from __future__ import annotations

DATA = ("sample", "cifar10", "cifar100", "tiny-imagenet", "imagefolder")  # with two splits, for bench and certify
