"""After `train.py` of timm: datasets and loaders of its factories, mixup switched off in mid-run, erasing with noise.

`main` adds the line behind `create_loader`, `before_the_loader` in front of it, to the dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm import utils
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from purifyloader import PurifiedDataset, PurifiedLoader
from purifyloader.purifiers import Purifier
from purifyloader.transforms import Compensate


def main(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    return run(data, out, purifier, wrap_loader=True, prefetcher=True)


def before_the_loader(data: Path, out: Path, purifier: Purifier) -> tuple[nn.Module, list[float]]:
    return run(data, out, purifier, wrap_loader=False, prefetcher=False)


def run(
    data: Path, out: Path, purifier: Purifier, *, wrap_loader: bool, prefetcher: bool
) -> tuple[nn.Module, list[float]]:
    device = torch.device("cpu")
    model = timm.create_model("test_resnet", pretrained=False, num_classes=4, drop_rate=0.0)
    data_config = resolve_data_config({"img_size": 32}, model=model, verbose=False)
    model.to(device=device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, weight_decay=2e-5, momentum=0.9)
    model_ema = utils.ModelEmaV3(model, decay=0.9)
    dataset_train = create_dataset("", root=str(data), split="train", is_training=True, batch_size=16)
    if not wrap_loader:
        dataset_train = PurifiedDataset(dataset_train, purifier, Compensate())  # <-
    dataset_eval = create_dataset("", root=str(data), split="val", is_training=False, batch_size=16)
    common: dict[str, Any] = {"use_prefetcher": prefetcher, "device": device, "num_workers": 0}
    common |= {"mean": data_config["mean"], "std": data_config["std"], "persistent_workers": False}
    mixup = FastCollateMixup(mixup_alpha=0.2, cutmix_alpha=0.0, num_classes=4) if prefetcher else None
    loader_train = create_loader(
        dataset_train,
        input_size=data_config["input_size"],
        batch_size=16,
        is_training=True,
        re_prob=0.5,
        re_mode="pixel",
        scale=(0.6, 1.0),
        hflip=0.5,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5",
        interpolation="random",
        collate_fn=mixup,
        **common,
    )
    if wrap_loader:
        loader_train = PurifiedLoader(  # <-
            loader_train,
            purifier,
            device,
            compensate=Compensate(),
            normalize=(data_config["mean"], data_config["std"]),
            keep_outside=True,
        )
    loader_eval = create_loader(
        dataset_eval, input_size=data_config["input_size"], batch_size=16, is_training=False, **common
    )
    soft, smooth = SoftTargetCrossEntropy(), LabelSmoothingCrossEntropy(smoothing=0.1)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=2, updates_per_epoch=len(loader_train)
    )
    losses = []
    for epoch in range(num_epochs):
        if hasattr(loader_train.dataset, "set_epoch"):
            loader_train.dataset.set_epoch(epoch)
        if hasattr(loader_train.batch_sampler, "set_epoch"):
            loader_train.batch_sampler.set_epoch(epoch)
        elif hasattr(loader_train.sampler, "set_epoch"):
            loader_train.sampler.set_epoch(epoch)
        if prefetcher and epoch >= 1 and loader_train.mixup_enabled:
            loader_train.mixup_enabled = False
            assert not mixup.mixup_enabled
        model.train()
        last = len(loader_train) - 1
        for batch_idx, (input, target) in enumerate(loader_train):
            loss_fn = soft if target.ndim == 2 else smooth
            loss = loss_fn(model(input.contiguous(memory_format=torch.channels_last)), target)
            optimizer.zero_grad()
            loss.backward()
            utils.dispatch_clip_grad(model.parameters(), value=1.0)
            optimizer.step()
            model_ema.update(model, step=batch_idx)
            losses.append(loss.item())
            assert batch_idx <= last
        with torch.inference_mode():
            for input, target in loader_eval:
                utils.accuracy(model_ema.module(input), target, topk=(1,))
        scheduler.step(epoch + 1)
        utils.update_summary(epoch, {"loss": losses[-1]}, {}, out / "summary.csv", write_header=epoch == 0)
    return model, losses
