"""An Accelerate script: the prepared loader in a `PurifiedLoader`, nothing else.

    python examples/integrations/accelerate_training.py
    accelerate launch examples/integrations/accelerate_training.py      # on as many GPUs as there are

A prepared loader leaves its batches on the process's device, and that is where they are purified. Each process draws
noise of its own.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sample import MEAN, STD, Sample, arguments, model, report
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from purifyloader import PurifiedLoader, recipes
from purifyloader.transforms import Compensate

if __name__ == "__main__":
    options = arguments(__doc__)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(Sample(options.images, transform), batch_size=128, shuffle=True, num_workers=options.workers)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    loader = PurifiedLoader(  # <-
        loader,
        recipes.eclipse("cifar10-sparse", sigma=0.05),
        accelerator.device,
        compensate=Compensate(),
        normalize=(MEAN, STD),
    )
    for epoch in range(options.epochs):
        losses = []
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        if accelerator.is_main_process:
            report(epoch, losses)
