"""The calls of well-known training scripts with our line among them: see `tests/scripts`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.purifiers import DenoiseOnce
from tests.scripts.data import TRAIN, write_folder

# What these packages warn of, of few images and few workers too, is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


class Witness(DenoiseOnce):
    """The one-call purifier, and how many images it was given in this process."""

    seen = 0

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert x_BCHW.min() >= 0
        assert x_BCHW.max() <= 1
        type(self).seen += len(x_BCHW)
        return super().run(x_BCHW, seeds_B)


@pytest.mark.parametrize(
    ("script", "main", "purified", "batches"),
    [
        pytest.param("imagenet", "main", 2 * TRAIN, 6, id="PyTorch's ImageNet example"),
        pytest.param("torchvision_reference", "main", 2 * TRAIN, 6, id="torchvision's reference"),
        pytest.param("cifar", "main", TRAIN, 6, id="pytorch-cifar"),
        pytest.param("timm_train", "main", 2 * 32, 4, id="timm"),
        pytest.param("timm_train", "before_the_loader", 2 * 32, 4, id="timm, the dataset"),
        pytest.param("lightning_cifar10", "main", 32, 4, id="Lightning's CIFAR-10"),
        pytest.param("lightning_kornia", "main", 16 + 2 * TRAIN, 6, id="Lightning's kornia"),
    ],
)
def test_a_script_with_one_line_changed(script, main, purified, batches, tmp_path: Path) -> None:
    """Every training image is purified once an epoch, or once in all for a cache; no other image is."""
    write_folder(tmp_path / "data")
    (out := tmp_path / "out").mkdir()
    Witness.seen = 0
    network = UNet(UNetConfig.small(channels=8, multipliers=(1,), norm_groups=4))
    purifier = Witness(NetworkDenoiser(network, "edm", (0.001, 0.3)), 0.1, compute_batch=8)
    before = [value.clone() for value in purifier.state_dict().values()]
    torch.manual_seed(0)
    # timm and Lightning take seconds to import, so each script is imported when it runs
    run = getattr(import_module(f"tests.scripts.{script}"), main)
    model, losses = run(tmp_path / "data", out, purifier)
    assert Witness.seen == purified
    assert len(losses) == batches
    assert all(0 < loss < 20 for loss in losses)
    assert all(torch.equal(old, new) for old, new in zip(before, purifier.state_dict().values(), strict=True))
    assert not {id(p) for p in purifier.parameters()} & {id(p) for p in model.parameters()}
