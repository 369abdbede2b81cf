"""After Lightning's tutorial `augmentation_kornia`: a submodule that augments a batch after its transfer."""

from __future__ import annotations

from pathlib import Path

import lightning as pl
import numpy as np
import torch
import torchvision
from kornia.augmentation import ColorJitter, RandomChannelShuffle, RandomHorizontalFlip, RandomThinPlateSpline
from kornia.utils import image_to_tensor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from purifyloader.purifiers import Purifier
from purifyloader.transforms import RandomCompensate, RandomPurify
from tests.scripts.data import write_cifar10


class DataAugmentation(nn.Module):
    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.transforms = nn.Sequential(
            RandomPurify(purifier),  # <-
            RandomCompensate(),
            RandomHorizontalFlip(p=0.75),
            RandomChannelShuffle(p=0.75),
            RandomThinPlateSpline(p=0.75),
        )
        self.jitter = ColorJitter(0.5, 0.5, 0.5, 0.5)

    @torch.no_grad()
    def forward(self, x):
        return self.jitter(self.transforms(x))


class Preprocess(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return image_to_tensor(np.array(x), keepdim=True).float() / 255.0


class CoolSystem(pl.LightningModule):
    def __init__(self, root: Path, purifier: Purifier) -> None:
        super().__init__()
        self.cifar10 = write_cifar10(root)
        self.root = root
        self.model = torchvision.models.squeezenet1_1(weights=None)
        self.preprocess = Preprocess()
        self.transform = DataAugmentation(purifier)
        self.losses: list[float] = []

    def forward(self, x):
        return self.model(x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (self.transform(x) if self.trainer.training else x), y

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=False)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("valid_loss", functional.cross_entropy(self(x), y), prog_bar=False)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs, 0)]

    def train_dataloader(self):
        return DataLoader(self.cifar10(self.root, train=True, transform=self.preprocess), batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.cifar10(self.root, train=False, transform=self.preprocess), batch_size=16)


def main(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    model = CoolSystem(out, purifier)
    imgs, _ = next(iter(model.train_dataloader()))
    torchvision.utils.make_grid(model.transform(imgs), nrow=8)  # their show_batch, which purifies a batch by itself
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=CSVLogger(save_dir=out / "logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    return model, model.losses
