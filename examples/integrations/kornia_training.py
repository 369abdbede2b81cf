"""A kornia script: purification and compensation as augmentations of whole batches, on the device.

python examples/integrations/kornia_training.py
"""

from __future__ import annotations

import kornia.augmentation as K
import torch
from sample import MEAN, STD, Sample, arguments, model, report
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from purifyloader import recipes
from purifyloader.transforms import RandomCompensate, RandomPurify

if __name__ == "__main__":
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    loader = DataLoader(Sample(options.images, transform), batch_size=128, shuffle=True, num_workers=options.workers)
    augment = K.AugmentationSequential(
        RandomPurify(recipes.eclipse("cifar10-sparse", sigma=0.05)),  # <- first
        K.RandomCrop((32, 32), padding=4),
        K.RandomHorizontalFlip(),
        RandomCompensate(),  # <- before Normalize
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input", "class"],
    ).to(device)
    net = model().to(device)
    # its parameters are the model's alone: the purifier's are nobody's business
    optimizer = torch.optim.SGD([*net.parameters(), *augment.parameters()], lr=0.05, momentum=0.9)
    for epoch in range(options.epochs):
        losses = []
        for batch in loader:
            images, labels = augment(*(part.to(device) for part in batch))
            loss = torch.nn.functional.cross_entropy(net(images), labels.long().flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        report(epoch, losses)
