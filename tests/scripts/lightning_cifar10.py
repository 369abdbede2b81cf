"""After Lightning's tutorial `cifar10-baseline`: one set split in two, a module, OneCycle stepped by the batch."""

from __future__ import annotations

from pathlib import Path

import lightning as pl
import torch
import torchvision
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, random_split

from purifyloader import PurifiedDataset
from purifyloader.purifiers import Purifier
from purifyloader.transforms import Compensate
from tests.scripts.data import write_cifar10

BATCH_SIZE = 16


class LitResnet(pl.LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=10)
        self.model.conv1[0] = nn.Conv2d(3, 24, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
        self.model.maxpool = nn.AvgPool2d(4)  # theirs is nn.Identity: a tenth of the time
        self.losses: list[float] = []

    def forward(self, x):
        return functional.log_softmax(self.model(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.nll_loss(self(x), y)
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", functional.nll_loss(self(x), y), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    CIFAR10 = write_cifar10(out)
    pl.seed_everything(7, verbose=False)
    normalize = torchvision.transforms.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    to_tensor = [torchvision.transforms.ToTensor(), normalize]
    augment = [torchvision.transforms.RandomCrop(32, padding=4), torchvision.transforms.RandomHorizontalFlip()]

    def split(transform, train):
        dataset = CIFAR10(out, train=True, download=True, transform=torchvision.transforms.Compose(transform))
        return random_split(dataset, [32, 8], generator=torch.Generator().manual_seed(42))[0 if train else 1]

    dataset_train = split([*augment, *to_tensor], True)
    dataset_train = PurifiedDataset(dataset_train, purifier, Compensate(), cache=out / "cache", progress=False)  # <-
    dataset_val = split(to_tensor, False)
    dataset_test = CIFAR10(out, train=False, download=True, transform=torchvision.transforms.Compose(to_tensor))
    train_dataloader = DataLoader(dataset_train, batch_size=BATCH_SIZE, shuffle=True, num_workers=0)
    val_dataloader = DataLoader(dataset_val, batch_size=BATCH_SIZE, shuffle=False, num_workers=0)
    test_dataloader = DataLoader(dataset_test, batch_size=BATCH_SIZE, shuffle=False, num_workers=0)
    model = LitResnet(lr=0.05)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(save_dir=out / "logs"),
        callbacks=[LearningRateMonitor(logging_interval="step")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_dataloaders=train_dataloader, val_dataloaders=val_dataloader)
    trainer.test(model, dataloaders=test_dataloader, verbose=False)
    return model, model.losses
