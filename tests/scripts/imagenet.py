"""After `imagenet/main.py` of PyTorch's examples: ImageFolder, a pinned loader, meters, a checkpoint an epoch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from purifyloader import PurifiedLoader
from purifyloader.purifiers import Purifier


def main(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    device = torch.device("cpu")
    model = models.__dict__["squeezenet1_1"]()
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalize = transforms.Normalize(mean=mean, std=std)
    cropped = transforms.Compose(
        [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    )
    train_dataset = datasets.ImageFolder(str(data / "train"), cropped)
    centred = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), normalize])
    val_dataset = datasets.ImageFolder(str(data / "val"), centred)
    train_loader = DataLoader(train_dataset, batch_size=16, shuffle=True, num_workers=2, pin_memory=False, sampler=None)
    val_loader = DataLoader(val_dataset, batch_size=16, shuffle=False, num_workers=0, sampler=None)
    train_loader = PurifiedLoader(train_loader, purifier, device, normalize=(mean, std))  # <-
    losses = []
    for epoch in range(2):
        model.train()
        batches = len(train_loader)
        for i, (images, target) in enumerate(train_loader):
            images = images.to(device, non_blocking=True)
            target = target.to(device, non_blocking=True)
            loss = criterion(model(images), target)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert i < batches
        model.eval()
        with torch.no_grad():
            for images, target in val_loader:
                criterion(model(images), target)
        assert len(val_loader) * val_loader.batch_size >= len(val_loader.dataset)
        scheduler.step()
        torch.save(
            {"epoch": epoch + 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()},
            out / "checkpoint.pth.tar",
        )
    return model, losses
