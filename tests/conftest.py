"""Small denoisers and datasets that the tests share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import VisionDataset

from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.plain import PlainUNet, PlainUNetConfig
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.energy import EnergyConfig, EnergyNetwork

pytest_plugins = ["tests.cpu"]


@pytest.hookimpl(tryfirst=True)  # before fixtures, of modules too: a network is the same whichever tests ran before
def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread_from_the_start() -> None:
    """Tests share two cores with their own worker processes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _quick_workers_of_the_fork_server() -> None:
    """They unpickle what they get, as spawned ones do, but are there in a tenth of a second, not in five."""
    multiprocessing.set_forkserver_preload(
        [
            "tests.conftest",
            "webdataset",
            "purifyloader.purified.dataset",
            "purifyloader.transforms.kornia",
            "purifyloader.transforms.webdataset",
        ]
    )


@pytest.fixture(autouse=True)
def _one_thread_again() -> Generator[None]:
    """A command that a test runs in this process sets its threads, which change the last bits of what comes after."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def tiny_network(
    channels: int = 3, learned_variance: bool = False, seed: int = 0, width: int = 8, multipliers: tuple = (1, 2)
) -> UNet:
    """A U-Net with random, not zero, output layers: every part of it changes the pixels."""
    config = UNetConfig.small(
        channels=width,
        multipliers=multipliers,
        norm_groups=width // 2,
        image_channels=channels,
        learned_variance=learned_variance,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def plain_network(config: PlainUNetConfig | None = None, seed: int = 0) -> PlainUNet:
    """A plain U-Net with random, not zero, output layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PlainUNet(PlainUNetConfig((8, 16), (1, 1)) if config is None else config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def plain_denoiser(seed: int = 0) -> NetworkDenoiser:
    return NetworkDenoiser(plain_network(seed=seed), "edm", (0.001, 0.3))


def tiny_denoiser(channels: int = 3, parameterization: str = "edm", seed: int = 0) -> NetworkDenoiser:
    return NetworkDenoiser(tiny_network(channels, seed=seed), parameterization, (0.001, 0.3))


def slim_denoiser(seed: int = 0) -> NetworkDenoiser:
    """A quarter of the arithmetic of `tiny_denoiser`: one level of half the width, for any size of image."""
    return NetworkDenoiser(tiny_network(seed=seed, width=4, multipliers=(1,)), "edm", (0.001, 0.3))


def tiny_energy(channels: int = 3, seed: int = 0) -> EnergyNetwork:
    """An energy with random weights, of a slope that moves an image by some px a step at PureGen's temperature."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EnergyNetwork(EnergyConfig(channels=8, image_channels=channels)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def denoiser() -> NetworkDenoiser:
    return tiny_denoiser()


@pytest.fixture(scope="session")
def discrete_denoiser() -> NetworkDenoiser:
    schedule = CosineSchedule(4000)
    sigma_range = (float(schedule.sigmas[1]), float(schedule.sigmas[-1]))
    return NetworkDenoiser(tiny_network(learned_variance=True), "epsilon", sigma_range, schedule)


def random_images(count: int, size: int = 16, seed: int = 0, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


class PictureDataset(VisionDataset):
    """A torchvision dataset in memory, with torchvision's own handling of transforms."""

    classes = ["even", "odd"]

    def __init__(
        self,
        images_NCHW: Tensor,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        transforms: Callable | None = None,
        mode: str = "RGB",
    ) -> None:
        super().__init__("memory", transforms, transform, target_transform)
        self.data = images_NCHW.permute(0, 2, 3, 1).numpy()
        self.mode = mode

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(np.squeeze(self.data[index])).convert(self.mode)
        target = index % 2
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target

    def __len__(self) -> int:
        return len(self.data)


@pytest.fixture
def blank_figures(monkeypatch) -> None:
    """Write a blank PNG for each figure of matplotlib: drawing one takes longer than a tiny training."""

    def blank(self, path, **_) -> None:
        Image.new("RGB", (400, 400)).save(path, format="png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Write results without a picture: drawing takes longer than measuring."""
    monkeypatch.setattr("purifyloader.results.folder.has_matplotlib", lambda: False)
