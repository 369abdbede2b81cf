"""The sample, the victim network and its training."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from purifyloader.core import noise
from purifyloader.datasets.splits import load_sample
from purifyloader.errors import ConfigError, InputError, TrainingError
from purifyloader.victims.networks import resnet9
from purifyloader.victims.presets import Training
from purifyloader.victims.training import _learning_rate, accuracy, train_victim

DATA = Path(__file__).parents[2] / "examples" / "data"
ORDER = noise.uniform(noise.image_keys(2026, 0, 0), (50_000,))[0].argsort()


@pytest.fixture
def train(sample):
    return sample.train, sample.train_labels


# the sample


@pytest.mark.parametrize(
    ("split", "count", "first", "sha256"),
    [
        ("train", 4000, [2, 4, 3, 5, 8], "665369b7189e9ba5bb8203067e906e84815e8a3c6d9439757396602d32adaab7"),
        ("test", 1000, [8, 0, 7, 0, 3], "95d74794a2ad548bd129efcc33d9a7ebad99947282a4ae179abf0b2d482bc72d"),
    ],
)
def test_sample_is_the_one_described(split, count, first, sha256, sample):
    images, labels = (getattr(sample, name) for name in (split, f"{split}_labels"))
    assert images.shape == (count, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    assert labels[:5].tolist() == first
    assert hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest() == sha256


def test_sample_keys_are_the_rows_after_the_denoisers():
    import webdataset

    rows = []
    for path in sorted(DATA.glob("train-*.tar.gz")):
        with gzip.open(path) as stream:
            files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            rows += [int(sample["__key__"]) for sample in webdataset.tariterators.group_by_keys(files)]
    assert rows == ORDER[2000:6000].sort().values.tolist()
    assert not set(rows) & set(ORDER[:2000].tolist())


def test_sample_is_small_and_its_card_is_true():
    card = (DATA / "README.md").read_text(encoding="utf-8")
    paths = sorted(DATA.glob("*.tar.gz"))
    assert sum(path.stat().st_size for path in paths) <= 12_000_000
    for path in paths:
        content = path.read_bytes()
        assert len(content) < 4_000_000
        assert f"| {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |" in card


def test_sample_reads_plain_tar_too(sample, tmp_path):
    (tmp_path / "test-000000.tar").write_bytes(gzip.decompress((DATA / "test-000000.tar.gz").read_bytes()))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(load_sample(tmp_path, "test"), (sample.test, sample.test_labels), strict=True)
    )


def test_missing_sample_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere"):
        load_sample(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match=r"train-000000\.tar\.gz"):
        load_sample(tmp_path, "train")
    shutil.copy(DATA / "train-000001.tar.gz", tmp_path)
    with pytest.raises(InputError, match=r"Shard train-000000 must come next"):
        load_sample(tmp_path, "train")


@pytest.mark.parametrize("keep", [0, 5, 100_000, -1])
def test_truncated_shard_is_named(tmp_path, keep):
    (tmp_path / "test-000000.tar.gz").write_bytes((DATA / "test-000000.tar.gz").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"test-000000\.tar\.gz must be"):
        load_sample(tmp_path, "test")


@pytest.mark.parametrize("keep", [0, 512, 100 * 512, 100_000])
def test_truncated_plain_tar_is_named(tmp_path, keep):
    whole = gzip.decompress((DATA / "test-000000.tar.gz").read_bytes())
    (tmp_path / "test-000000.tar").write_bytes(whole[:keep])
    with pytest.raises(InputError, match=r"test-000000\.tar must"):
        load_sample(tmp_path, "test")


def test_damaged_image_is_named(tmp_path):
    whole = bytearray(gzip.decompress((DATA / "test-000000.tar.gz").read_bytes()))
    whole[512:520] = b"notapng!"
    (tmp_path / "test-000000.tar").write_bytes(whole)
    with pytest.raises(InputError, match=r"test-000000\.tar: sample 00002"):
        load_sample(tmp_path, "test")


# the network


def test_resnet9_has_the_parameters_it_says():
    model = resnet9()
    assert sum(p.numel() for p in model.parameters()) == 412_944
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert resnet9(classes=7, width=4, image_channels=1)(torch.zeros(2, 1, 8, 16)).shape == (2, 7)


@pytest.mark.parametrize("name", ["classes", "width", "image_channels"])
def test_resnet9_rejects_empty_sizes(name):
    with pytest.raises(ConfigError, match=name):
        resnet9(**{name: 0})


# training


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


SMALL = {"training": Training(2, 32, 0.2, 0.2), "width": 4, "bfloat16": False}  # which a CPU may only emulate


def test_training_is_reproducible(train):
    x, y = train[0][:70, ::2, ::2], train[1][:70]
    state = torch.random.get_rng_state()
    first, second, other = (weights(train_victim(x, y, seed=seed, **SMALL).model) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_arrays_tensors_floats_and_functions_train_alike(train):
    x, y = np.ascontiguousarray(train[0][:64, ::2, ::2]), train[1][:64]
    as_float = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    frozen = x.copy()
    frozen.flags.writeable = False
    seen = []

    def by_epoch(epoch):
        seen.append(epoch)
        return x

    expected = weights(train_victim(x, y, **SMALL).model)
    for images in (as_float, torch.from_numpy(x), frozen, by_epoch):
        assert torch.equal(weights(train_victim(images, y.tolist(), **SMALL).model), expected)
    assert seen == [0, 1]


def test_training_overfits_a_tiny_set(train):
    x, y = train[0][:32, ::2, ::2], train[1][:32]
    trained = train_victim(x, y, Training(30, 8, 0.2, 0.2), width=8, pad=0, flip=False, bfloat16=False)
    assert accuracy(trained.model, x, y) == 1.0
    assert trained.seconds > 0
    assert not trained.model.training


def test_batch_transform_gets_augmented_images_and_their_indices():
    # image i is constant i/255, which flips and the middle of crops leave alone
    x = np.broadcast_to(np.arange(70, dtype=np.uint8).reshape(70, 1, 1, 1), (70, 16, 16, 3))
    seen = {0: [], 1: []}

    def transform(x_BCHW, index_B, epoch):
        assert x_BCHW.dtype == torch.float32
        middle = (x_BCHW * 255).round()[:, :, 4:-4, 4:-4]
        assert torch.equal(middle, index_B.reshape(-1, 1, 1, 1).expand_as(middle).float())
        seen[epoch] += index_B.tolist()
        return x_BCHW * 0.5

    plain = weights(train_victim(x, [i % 10 for i in range(70)], **SMALL).model)
    changed = weights(train_victim(x, [i % 10 for i in range(70)], batch_transform=transform, **SMALL).model)
    assert not torch.equal(plain, changed)
    assert [len(set(indices)) for indices in seen.values()] == [64, 64]  # 2 whole batches of 32
    assert seen[0] != seen[1]


def test_learning_rate_is_one_cycle():
    assert _learning_rate(0.1, 1.0, 0.2) == pytest.approx(0.5)
    assert _learning_rate(0.2, 1.0, 0.2) == pytest.approx(1.0)
    assert _learning_rate(0.6, 1.0, 0.2) == pytest.approx(0.5)
    assert _learning_rate(0.0, 1.0, 0.0) == pytest.approx(1.0)


def test_accuracy_counts_in_evaluation_mode(train):
    class Redness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_BCHW):
            assert not self.training
            return x_BCHW.mean(dim=(2, 3)) + self.weight

    x = np.zeros((6, 8, 8, 3), np.uint8)
    for i in range(6):
        x[i, :, :, i % 3] = 255
    model = Redness()
    assert accuracy(model, x, [0, 1, 2, 0, 1, 0], batch_size=4) == pytest.approx(5 / 6)
    assert model.training


def test_bad_training_input():
    x, y = np.zeros((4, 32, 32, 3), np.uint8), [0, 1, 2, 3]
    bad = [
        (lambda: train_victim(x[0], y), "Images must be uint8"),
        (lambda: train_victim(x.astype(np.int64), y), "Images must be uint8"),
        (lambda: train_victim(x.transpose(0, 3, 1, 2), y), "3 channels"),
        (lambda: train_victim(x, y[:3]), "one label per image"),
        (lambda: train_victim(x, [0, 1, 2, 10]), r"Labels must lie in \[0, 10\)"),
        (lambda: train_victim(x, [0.5, 1, 2, 3]), "Labels must be integers"),
        (lambda: train_victim(x, []), "Labels must be integers"),
        (lambda: train_victim(x, y, Training(0, 64, 0.2, 0.2)), "epochs and batch_size"),
        (lambda: train_victim(lambda epoch: x[:2], y), "one label per image"),
        (lambda: accuracy(resnet9(), x, [0]), "one label per image"),
    ]
    for call, message in bad:
        with pytest.raises(InputError, match=message):
            call()


def test_a_loss_that_blows_up_stops_training():
    x = torch.full((4, 3, 32, 32), float("nan"))
    with pytest.raises(TrainingError, match="finite"):
        train_victim(x, [0, 1, 2, 3], **SMALL)
