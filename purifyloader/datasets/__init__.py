"""Datasets by name, folder or tar; their samples, splits and selections."""

from purifyloader.datasets.named import ImageFiles, TarDataset, open_dataset, read_image

__all__ = ["ImageFiles", "TarDataset", "open_dataset", "read_image"]
