"""Every way into a script, in every kind of worker: containers x input types x dtypes x pickling x workers."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from purifyloader import PurifiedDataset, PurifiedLoader, recipes
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.transforms import Compensate, Purify, RandomCompensate, RandomPurify, RandomSqueeze, Squeeze
from purifyloader.transforms.webdataset import compensated, purified
from tests.conftest import PictureDataset, random_images, slim_denoiser

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

COUNT = 4


def once() -> Any:
    return recipes.denoise_once(slim_denoiser(), sigma=0.1)


def pictures() -> Tensor:
    return random_images(COUNT, 8)


def as_pil(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy())


IMAGES: dict[str, Callable[[Tensor], Any]] = {
    "pil": lambda x: as_pil(x[0]),
    "grey pil": lambda x: as_pil(x[0]).convert("L"),
    "tv image": lambda x: tv_tensors.Image(x[0]),
    "tv video": lambda x: tv_tensors.Video(x),
    "batch": lambda x: x,
    "float64": lambda x: x.double() / 255,
    "float32": lambda x: x.float() / 255,
    "float16": lambda x: (x.float() / 255).half(),
    "bfloat16": lambda x: (x.float() / 255).bfloat16(),
}
BATCHES = {name: IMAGES[name] for name in ("float64", "float32", "float16", "bfloat16")}

TRANSFORMS: dict[str, tuple[Callable[[], Any], dict[str, Callable[[Tensor], Any]]]] = {
    "Purify": (lambda: Purify(once()), IMAGES),
    "Compensate": (Compensate, IMAGES),
    "Squeeze": (lambda: Squeeze("jpeg", quality=20), IMAGES),
    "v1 Compose": (lambda: v1.Compose([Purify(once()), Compensate()]), IMAGES),
    "v2 Compose": (lambda: v2.Compose([Squeeze("coin"), Purify(once()), Compensate()]), IMAGES),
    "RandomPurify": (lambda: RandomPurify(once(), p=0.5), BATCHES),
    "RandomCompensate": (RandomCompensate, BATCHES),
    "AugmentationSequential": (
        lambda: K.AugmentationSequential(RandomPurify(once()), RandomCompensate(), data_keys=["input"]),
        BATCHES,
    ),
    "ImageSequential": (lambda: K.ImageSequential(RandomSqueeze("bit_depth"), RandomPurify(once())), BATCHES),
}


class Everything(Dataset[Any]):
    """Item i: what one transform makes of one kind of image, drawn from a seed of its own."""

    def __init__(self) -> None:
        self.cases = [(name, held) for name, (_, images) in TRANSFORMS.items() for held in images]
        self.transforms = {name: make() for name, (make, _) in TRANSFORMS.items()}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[int, str, str]:
        name, held = self.cases[index]
        image = IMAGES[held](pictures())
        torch.manual_seed(index)
        out = self.transforms[name](image)
        assert type(out) is type(image), (name, held, type(out))
        if isinstance(out, Tensor):
            assert (out.dtype, out.shape) == (image.dtype, image.shape), (name, held)
            values = out.double().numpy()
        else:
            assert (out.mode, out.size) == (image.mode, image.size), (name, held)
            values = np.asarray(out)
        return index, f"{name}, {held}", hashlib.sha256(values.tobytes()).hexdigest()


def first(samples: list[Any]) -> Any:
    return samples[0]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    data = Everything()
    return [data[i] for i in range(len(data))]


@pytest.mark.parametrize("start", [None, "fork", "forkserver"])
def test_every_transform_of_every_image_in_every_worker(start: str | None, expected: list[Any]) -> None:
    workers: dict[str, Any] = {} if start is None else {"num_workers": 2, "multiprocessing_context": start}
    data = pickle.loads(pickle.dumps(Everything())) if start is None else Everything()
    assert list(DataLoader(data, 1, collate_fn=first, **workers)) == expected


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_datasets_and_stages_in_every_worker(start: str) -> None:
    """Their draws are a function of the index, and so the pixels are those of the main process."""
    dataset = PurifiedDataset(PictureDataset(pictures(), v2.ToImage()), once(), Compensate())
    samples = [{"__key__": f"{i}", "png": as_pil(x)} for i, x in enumerate(pictures())]
    for make in (lambda: dataset, lambda: Stages(samples)):
        plain = [np.asarray(x).tobytes() for x, _ in DataLoader(make(), 1, collate_fn=first)]
        loader = DataLoader(make(), 1, collate_fn=first, num_workers=2, multiprocessing_context=start)
        assert [np.asarray(x).tobytes() for x, _ in loader] == plain


class Stages(Dataset[Any]):
    """A WebDataset pipeline of one sample an item, for a loader's workers."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples
        self.purified, self.compensated = purified(once()), compensated()
        self.compensated.set_epoch(3)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.compensated.set_epoch(3)  # each item is a pass of its own here
        (sample,) = self.compensated(self.purified([self.samples[index]]))
        return sample["png"], index


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_a_loader_around_workers(start: str) -> None:
    data = PictureDataset(pictures(), v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))

    def images(**workers: Any) -> list[bytes]:
        loader = PurifiedLoader(DataLoader(data, 2, **workers), once(), compensate=Compensate())
        return [x.numpy().tobytes() for _ in range(2) for x, _ in loader]

    assert images(num_workers=2, multiprocessing_context=start) == images()


# -- compiled ----------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_denoiser_compiles_as_one_graph(dtype: torch.dtype) -> None:
    network = UNet(UNetConfig.small(channels=4, multipliers=(1,), norm_groups=2)).eval().requires_grad_(False)
    denoiser, x = NetworkDenoiser(network, "edm", (0.001, 0.3)), pictures().float() / 255
    sigma = torch.full((COUNT,), 0.1, dtype=dtype)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, sigma), denoiser(x, sigma))


@pytest.mark.usefixtures("_fresh")
def test_compensation_is_part_of_a_compiled_graph() -> None:
    model = nn.Sequential(RandomCompensate(), nn.Conv2d(3, 4, 3))
    x = pictures().float() / 255
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.usefixtures("_fresh")
def test_a_compiled_model_behind_them_compiles_once() -> None:
    """What they give is alike in strides, types and gradients, whatever was drawn."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(nn.Conv2d(3, 4, 3), backend=backend, fullgraph=True)
    x = pictures().float() / 255
    ways = [RandomPurify(once(), p=p) for p in (0.0, 0.5, 1.0)]
    ways += [
        RandomCompensate(),
        RandomCompensate(same_on_batch=True),
        RandomSqueeze("jpeg"),
        RandomSqueeze("grayscale"),
    ]
    for way in [*ways, Compensate(), Purify(once()), Squeeze("coin")]:
        for _ in range(2):
            model(way(x))
    for batch in PurifiedLoader([x, x], once(), compensate=Compensate()):
        model(batch)
    assert len(graphs) == 1


# -- a default device ---------------------------------------------------------------------------------


def test_the_default_device_of_a_script_is_not_that_of_its_images(tmp_path: Path) -> None:
    """What is made without a device goes to "meta" here, as to a GPU in a script that says so."""
    source, purify = PictureDataset(pictures()), once()
    batch, labels = pictures() / 255, torch.arange(COUNT)

    def results(folder: Path) -> list[Any]:
        read = {"live": {}, "cached": {"cache": folder, "progress": False}, "compensated": {"compensate": Compensate()}}
        sets = [PurifiedDataset(source, purify, **options) for options in read.values()]
        out = [np.asarray(dataset[i][0]) for dataset in sets for i in range(2)]
        tensors = PurifiedDataset(source, purify, transform=v1.Compose([v1.ToTensor(), v1.Normalize(0.5, 0.5)]))
        out += [image.numpy() for image, _ in tensors.__getitems__([1, 2])]
        torch.manual_seed(0)
        for transform in (RandomPurify(purify), Purify(purify), Compensate(), RandomSqueeze(), Squeeze()):
            out.append(transform(batch).numpy())
        samples = [{"__key__": str(i), "png": image, "cls": int(labels[i])} for i, image in enumerate(batch)]
        return [*out, *(sample["png"].numpy() for sample in purified(purify)(samples))]

    expected = results(tmp_path / "a")
    with torch.device("meta"):
        got = results(tmp_path / "b")
    assert len(got) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
