"""Which images of a dataset are used, and reading them into one tensor."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader.datasets.named import open_dataset
from purifyloader.datasets.select import choose, hold_out, load_images, read_indices
from purifyloader.errors import ConfigError, InputError, PurifyError
from tests.conftest import random_images

# -- which images -----------------------------------------------------------------------------------


def test_the_choice_is_a_function_of_the_seed():
    assert choose(100, 10, 1) == choose(100, 10, 1) != choose(100, 10, 2)
    assert set(choose(100, 10, 1)) < set(choose(100, 20, 1))
    assert choose(50000, 3, 2026) == sorted(choose(50000, 3, 2026))
    assert choose(7, 7, 0) == list(range(7))
    for count in (0, -1, 101):
        with pytest.raises(InputError, match=f"Got {count}"):
            choose(100, count, 0)


def test_the_choice_is_even():
    counts = np.bincount([i for seed in range(300) for i in choose(10, 3, seed)], minlength=10)
    assert abs(counts - 90).max() < 45


def test_what_is_held_out_is_not_trained_on():
    chosen = choose(1000, 300, 4)
    trained, held_out = hold_out(1000, chosen, 4)
    assert trained == chosen
    assert len(held_out) == 200
    assert not set(trained) & set(held_out)
    assert held_out == sorted(set(held_out))
    assert hold_out(1000, chosen, 4) == (trained, held_out)
    assert hold_out(1000, list(reversed(chosen)), 4) == (trained, held_out)
    assert hold_out(1000, chosen, 5)[1] != held_out
    # fewer are some of them, and all there are where more are asked for
    assert set(hold_out(1000, chosen, 4, 50)[1]) < set(held_out)
    assert hold_out(1000, chosen, 4, 5000)[1] == sorted(set(range(1000)) - set(chosen))


def test_where_all_were_chosen_a_twentieth_is_taken_back():
    chosen = list(range(100))
    trained, held_out = hold_out(100, chosen, 0)
    assert len(held_out) == 5
    assert sorted(trained + held_out) == chosen
    assert hold_out(100, chosen, 0, 3)[1] != held_out
    assert len(hold_out(100, chosen, 0, 3)[1]) == 3
    assert hold_out(100, chosen, 0, 50) == (trained, held_out)  # no more than a twentieth
    assert [len(part) for part in hold_out(19, list(range(19)), 0)] == [18, 1]  # one at least
    assert hold_out(1, [0], 0) == ([0], [])
    # that is a choice too, and training again from it takes the same
    assert hold_out(100, trained, 0) == (trained, held_out)


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_held_out_leaves_all_to_train_on(count):
    """Never a handful to train on because a number was strange."""
    try:
        trained, held_out = hold_out(100, list(range(100)), 0, count)
    except PurifyError as error:
        assert "Got" in str(error)  # noqa: PT017
        assert count < 0
    else:
        assert (trained, held_out) == (list(range(100)), [])


def test_indices_from_a_list_and_from_a_checkpoint(tmp_path):
    file = tmp_path / "indices.json"
    file.write_text("[4, 0, 2]")
    assert sorted(read_indices(file)) == [0, 2, 4]
    assert read_indices(str(file)) == read_indices(file)
    (tmp_path / "config.json").write_text(json.dumps({"format": "x", "details": {"indices": [1, 5]}}))
    assert read_indices(tmp_path / "config.json") == [1, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2, 1, 1]", "each index once.*Got 1 more than once"),
        ("[]", "one or more indices"),
        ("[-1]", "from 0"),
        ("[1.5]", "Got"),
        ("[true]", "Got"),
        ('["1"]', "Got"),
        ("{}", "Got"),
        ('{"details": {}}', "Got"),
        ("no json", "Got"),
        ("\\ud800", "Got"),
    ],
)
def test_bad_indices(text, message, tmp_path):
    file = tmp_path / "indices.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"(?s)indices.json must .*{message}"):
        read_indices(file)
    with pytest.raises(InputError, match=r"none\.json must be a JSON list"):
        read_indices(tmp_path / "none.json")


# -- reading them -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, image in enumerate(random_images(12, 16)):
        path = tmp_path / "images" / str(i % 2) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "images"


def test_a_folder_of_images(folder):
    dataset = open_dataset(str(folder))
    images = load_images(dataset, [0, 1, 11])
    assert torch.equal(images[0], random_images(12, 16)[0])
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    for bad in (12, -1):
        with pytest.raises(InputError, match=rf"12 images\. Got the index {bad}"):
            load_images(dataset, [0, bad])


def test_a_damaged_file_is_named(folder):
    (folder / "0" / "000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000\.png is no readable image"):
        load_images(open_dataset(str(folder)), [0])


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_images_of_other_sizes_need_a_size():
    mixed: Any = [picture(16, 16), picture(20, 16), picture(33, 47)]
    with pytest.raises(InputError, match=r"size must be given for images of several sizes.* Got .*at index 1 after"):
        load_images(mixed, range(3))
    images = load_images(mixed, range(3), size=16)
    assert images.shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(images[0], np.asarray(mixed[0]).transpose(2, 0, 1))
    # shorter side to 16, the middle of the longer one: near PIL's own antialiased bilinear filter
    want = np.asarray(mixed[2].resize((22, 16), Image.Resampling.BILINEAR))[:, 3:19].transpose(2, 0, 1)
    assert np.abs(images[2].numpy().astype(int) - want).mean() < 2
    with pytest.raises(ConfigError, match="Got 0"):
        load_images(mixed, range(3), size=0)


def test_grey_images_among_rgb_ones():
    mixed: Any = [picture(16, 16), picture(16, 16, "L"), picture(16, 16)]
    images = load_images(mixed, range(3), channels=3)
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(images[1, 0], images[1, 1])
    assert torch.equal(images[1, 0], torch.from_numpy(np.array(mixed[1])))
    grey: Any = [picture(16, 16, "L")] * 2
    assert load_images(grey, range(2)).shape == (2, 1, 16, 16)
    with pytest.raises(InputError, match=r"must have 1 channels\. Got 3"):
        load_images(mixed, [0], channels=1)


def make_dataset() -> list[tuple[torch.Tensor, int]]:
    return [(image, 0) for image in random_images(7, 16)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", "no dataset 'imagenet'.*package.module:function"),
        ("no_such_module:f", "No module named"),
        ("tests.train.test_config:nothing", "no attribute"),
        ("os:getpid", "map-style"),
        ("cifar10", "download=True"),
    ],
)
def test_bad_sources(spec, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_dataset(spec, root=tmp_path)


def test_a_function_names_a_dataset():
    assert load_images(open_dataset("tests.datasets.test_select:make_dataset"), range(7)).shape == (7, 3, 16, 16)


def test_tars_are_a_source(tmp_path):
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for i, image in enumerate(random_images(3, 16)):
            data = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="png")
            member = tarfile.TarInfo(f"{i:04}.png")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)
    images = load_images(open_dataset(str(tmp_path / "train-0000.tar")), range(3))
    assert torch.equal(images, random_images(3, 16))
