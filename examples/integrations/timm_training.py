"""A timm script: the loader of `create_loader`, which normalises, in a `PurifiedLoader` that undoes and redoes it.

python examples/integrations/timm_training.py
python examples/integrations/timm_training.py --prefetcher        # timm's own device prefetcher inside
"""

from __future__ import annotations

import sys

import timm
import torch
from sample import MEAN, STD, Sample, arguments, report
from timm.data import create_loader
from timm.optim import create_optimizer_v2

from purifyloader import PurifiedLoader, recipes
from purifyloader.transforms import Compensate

if __name__ == "__main__":
    prefetcher = "--prefetcher" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--prefetcher"]
    options = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = create_loader(
        Sample(options.images),
        input_size=(3, 32, 32),
        batch_size=128,
        is_training=True,
        use_prefetcher=prefetcher,
        scale=(0.6, 1.0),
        hflip=0.5,
        mean=MEAN,
        std=STD,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        device=device,
    )
    loader = PurifiedLoader(  # <-
        loader, recipes.eclipse("cifar10-sparse", sigma=0.05), device, compensate=Compensate(), normalize=(MEAN, STD)
    )
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=10).to(device)
    optimizer = create_optimizer_v2(net, opt="sgd", lr=0.05)
    for epoch in range(options.epochs):
        losses = []
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        report(epoch, losses)
