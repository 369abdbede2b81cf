"""A WebDataset script: `purified` right after `decode`, `compensated` after the augmentation.

    python examples/integrations/webdataset_training.py

The stages take some samples at a time and give them back one by one, each with noise of its own key.
"""

from __future__ import annotations

import torch
import webdataset as wds
from sample import DATA, MEAN, STD, arguments, model, report
from torchvision.transforms import v2

from purifyloader import recipes
from purifyloader.transforms.webdataset import compensated, purified

AUGMENT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage()])
NORMALIZE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

if __name__ == "__main__":
    options = arguments(__doc__)
    shards = sorted(str(path) for path in DATA.glob("train-*.tar.gz"))
    data = (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .slice(options.images)
        .decode("pil")
        .compose(purified(recipes.eclipse("cifar10-sparse", sigma=0.05)))  # <-
        .map_dict(png=AUGMENT)
        .compose(compensated())  # <-
        .map_dict(png=NORMALIZE)
        .to_tuple("png", "cls")
        .batched(128)
    )
    loader = wds.WebLoader(data, batch_size=None, num_workers=options.workers)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(options.epochs):
        losses = []
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), torch.as_tensor(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        report(epoch, losses)
