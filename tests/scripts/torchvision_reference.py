"""After `references/classification/train.py` of torchvision: erasing behind the normalisation, mixup in collate_fn."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from purifyloader import PurifiedLoader
from purifyloader.purifiers import Purifier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    train = v2.Compose(
        [
            v2.RandomResizedCrop(32, interpolation=InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
            v2.RandomErasing(p=0.5),
        ]
    )
    evaluate = v2.Compose(
        [
            v2.Resize(40, antialias=True),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(str(data / "train"), train)
    dataset_test = torchvision.datasets.ImageFolder(str(data / "val"), evaluate)
    num_classes = len(dataset.classes)
    mixupcutmix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=num_classes), v2.CutMix(num_classes=num_classes)])
    data_loader = DataLoader(
        dataset,
        batch_size=16,
        sampler=RandomSampler(dataset),
        num_workers=0,
        collate_fn=lambda batch: mixupcutmix(*default_collate(batch)),
    )
    data_loader_test = DataLoader(dataset_test, batch_size=16, sampler=SequentialSampler(dataset_test), num_workers=0)
    data_loader = PurifiedLoader(data_loader, purifier, "cpu", normalize=(MEAN, STD))  # <-
    model = torchvision.models.__dict__["shufflenet_v2_x0_5"](weights=None, num_classes=num_classes)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    decayed, others = ([p for p in model.parameters() if (p.ndim > 1) is big] for big in (True, False))
    optimizer = torch.optim.SGD(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 2e-5}], lr=0.02, momentum=0.9
    )
    ema = torch.optim.swa_utils.AveragedModel(model, device="cpu", use_buffers=True)
    losses = []
    for _ in range(2):
        model.train()
        for image, target in data_loader:
            loss = criterion(model(image), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(model)
            losses.append(loss.item())
        ema.eval()
        seen = 0
        with torch.inference_mode():
            for image, _ in data_loader_test:
                seen += len(ema(image))
        assert seen == len(data_loader_test.dataset)
    return model, losses
