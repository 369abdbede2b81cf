"""A script on Hugging Face datasets: two ways, each a line.

    python examples/integrations/hf_datasets_training.py             # purify the dataset, once, into a cache
    python examples/integrations/hf_datasets_training.py --loader    # or the batches, on the fly

A dataset of theirs is map-style and gives dicts with a PIL image, which `PurifiedDataset` takes as it is.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image
from sample import MEAN, STD, Sample, arguments, model, report
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, PurifiedLoader, recipes
from purifyloader.transforms import Compensate

TRANSFORM = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


def examples(rows: dict[str, Any]) -> dict[str, Any]:
    """As their guides have it: the images of a batch of rows, transformed when they are read."""
    return {"pixel_values": [TRANSFORM(image) for image in rows["image"]], "label": rows["label"]}


if __name__ == "__main__":
    on_the_fly = "--loader" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--loader"]
    options = arguments(__doc__)
    sample = Sample(options.images)
    rows = {"image": [image for image, _ in sample], "label": sample.targets}
    data = Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(num_classes=10)}))
    purifier = recipes.eclipse("cifar10-sparse", sigma=0.05)
    with tempfile.TemporaryDirectory() as cache:
        if on_the_fly:
            loader: Any = DataLoader(data.with_transform(examples), 128, shuffle=True, num_workers=options.workers)
            loader = PurifiedLoader(  # <-
                loader, purifier, compensate=Compensate(), normalize=(MEAN, STD), image_key="pixel_values"
            )
        else:
            purified = PurifiedDataset(data, purifier, Compensate(), cache, transform=TRANSFORM, progress=False)  # <-
            loader = DataLoader(purified, 128, shuffle=True, num_workers=options.workers)
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(options.epochs):
            if not on_the_fly:
                purified.set_epoch(epoch)
            losses = []
            for batch in loader:
                images = batch["pixel_values" if on_the_fly else "image"]
                loss = torch.nn.functional.cross_entropy(net(images), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            report(epoch, losses)
