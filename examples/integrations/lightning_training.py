"""A Lightning script: `train_dataloader` gives a `PurifiedLoader`, on each of several devices of its share.

python examples/integrations/lightning_training.py
"""

from __future__ import annotations

import lightning as L
import torch
from sample import MEAN, STD, Sample, arguments, model, report
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

from purifyloader import PurifiedLoader, recipes
from purifyloader.transforms import Compensate


class Classifier(L.LightningModule):
    def __init__(self, data: Sample, workers: int) -> None:
        super().__init__()
        self.net = model()
        self.data, self.workers = data, workers
        self.losses: list[float] = []

    def train_dataloader(self) -> PurifiedLoader:
        # Lightning puts a sampler of its own into loaders of torch's only
        share = DistributedSampler(self.data, self.trainer.world_size, self.trainer.global_rank)
        loader = DataLoader(self.data, batch_size=128, sampler=share, num_workers=self.workers)
        return PurifiedLoader(  # <-
            loader, recipes.eclipse("cifar10-sparse", sigma=0.05), compensate=Compensate(), normalize=(MEAN, STD)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.net(images), labels)
        self.losses.append(float(loss))
        return loss

    def on_train_epoch_end(self) -> None:
        report(self.current_epoch, self.losses)
        self.losses = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    options = arguments(__doc__)
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        devices="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(Sample(options.images, transform), options.workers))
