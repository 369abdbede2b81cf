"""After `main.py` of kuangliu/pytorch-cifar: a dataset with its transform, global names, a checkpoint of the best."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import transforms

from purifyloader import PurifiedDataset
from purifyloader.purifiers import Purifier
from purifyloader.transforms import Compensate
from tests.scripts.data import write_cifar10


def main(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    CIFAR10 = write_cifar10(out)
    normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    transform_train = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    )
    transform_test = transforms.Compose([transforms.ToTensor(), normalize])
    trainset = CIFAR10(root=out, train=True, download=True, transform=transform_train)
    trainset = PurifiedDataset(trainset, purifier, Compensate(), cache=out / "purified", progress=False)  # <-
    trainloader = DataLoader(trainset, batch_size=16, shuffle=True, num_workers=2)
    testset = CIFAR10(root=out, train=False, download=True, transform=transform_test)
    testloader = DataLoader(testset, batch_size=100, shuffle=False, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    losses, best_acc = [], -1.0
    for epoch in range(2):
        net.train()
        for inputs, targets in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        net.eval()
        correct = 0
        with torch.no_grad():
            for inputs, targets in testloader:
                _, predicted = net(inputs).max(1)
                correct += predicted.eq(targets).sum().item()
        if correct > best_acc:
            torch.save({"net": net.state_dict(), "acc": correct, "epoch": epoch}, out / "ckpt.pth")
            best_acc = correct
        scheduler.step()
    return net, losses
