"""A torchvision script: one line in front of the transform, one behind the augmentation.

    python examples/integrations/torchvision_training.py

Transforms run in the loader's workers, image by image: the place for a cheap purifier, such as JPEG. `Purify(purifier)`
in its place takes any, but a network costs there as much for one image as for a batch of 32: a cache or a
PurifiedLoader is the place for it.
"""

from __future__ import annotations

import torch
from sample import MEAN, STD, Sample, arguments, model, report
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from purifyloader.transforms import Compensate, Squeeze

options = arguments(__doc__)
transform = v2.Compose(
    [
        Squeeze("jpeg", quality=10),  # <- first: on the image as it is stored
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        Compensate(),  # <- after the augmentation, before Normalize
        v2.Normalize(MEAN, STD),
    ]
)
if __name__ == "__main__":
    loader = DataLoader(Sample(options.images, transform), batch_size=128, shuffle=True, num_workers=options.workers)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(options.epochs):
        losses = []
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        report(epoch, losses)
