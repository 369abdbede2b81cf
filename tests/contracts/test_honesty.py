"""No command measures a model on images that it was trained on, whatever folder they lie in, without saying so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from purifyloader import pretrained
from purifyloader.commands import main as cli
from purifyloader.core import sizes
from purifyloader.core.images import quantize, to_engine
from purifyloader.files.hashes import hashes_as_text, image_hashes
from purifyloader.files.weights import weights_sha256
from tests.conftest import random_images, tiny_denoiser, tiny_energy


def pngs(folder: Path, images) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"picture-{number:03}.png")
    return folder


SAMPLE = random_images(32, 32).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return SAMPLE[:12]


def details(images, **more):
    return {"image_hashes": hashes_as_text(image_hashes(images)), **more}


@pytest.fixture
def folder(images, tmp_path) -> Path:
    """12 images, of which the last 7 are learned from: renamed and in another order than the card has them."""
    return pngs(tmp_path / "pictures", images)


@pytest.fixture
def models(images, tmp_path) -> Path:
    seen = images[5:][::-1]
    pretrained.save(tiny_denoiser(), tmp_path / "denoiser", details=details(seen, data="CIFAR-10", data_length=50000))
    pretrained.save(tiny_energy(), tmp_path / "energy", details=details(seen))
    return tmp_path


QUICK = ["--device", "cpu", "--json"]

MEASURING = {
    "evaluate": ["denoiser", "evaluate", "{0}/denoiser", "--sigma-px", "25", "--poisoned", "none", "--data"],
    "dynamics": ["dynamics", "--model", "{0}/denoiser", "--sigma-px", "25", "--poisoned", "none", "--data"],
    "dynamics-energy": ["dynamics", "--energy", "{0}/energy", "--steps", "1", "--poisoned", "none", "--data"],
    "tune": ["tune", "--model", "{0}/denoiser", "--sigma-px", "25", "--poisoned", "ar", "--clean"],
    "audit": ["audit", "energy", "--energy", "{0}/energy", "--data", "{0}/pictures", "--clean"],
}


def data_of(command: str, results: dict) -> dict:
    return {"tune": lambda: results["curves"]["data"], "audit": lambda: results["reference"]}.get(
        command, lambda: results["data"]
    )()


@pytest.mark.parametrize("command", MEASURING)
def test_images_trained_on_are_left_out_and_said_to_be(command, folder, models, capsys):
    words = [word.format(models) for word in MEASURING[command]]
    assert cli.main([*words, str(folder), *QUICK]) == 0
    said = capsys.readouterr()
    found = data_of(command, json.loads(said.out))
    assert (found["trained_on_left_out"], found["trained_on_known"]) == (7, True)
    assert found.get("indices", [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]
    assert "left out 7 of the 12 images in " in said.err
    # of nothing but these there is nothing to measure
    all_seen = pngs(models / "seen", SAMPLE[5:9])
    assert cli.main([*words, str(all_seen), *QUICK]) == 2
    assert "was trained on all of these" in capsys.readouterr().err


@pytest.mark.parametrize("command", MEASURING)
def test_a_model_that_does_not_say_is_warned_of(command, folder, models, capsys):
    for kind, make in (("denoiser", tiny_denoiser), ("energy", tiny_energy)):
        pretrained.save(make(), models / kind, overwrite=True)
    words = [word.format(models) for word in MEASURING[command]]
    assert cli.main([*words, str(folder), *QUICK]) == 0
    said = capsys.readouterr()
    assert "does not say which images it was trained on" in said.err
    assert data_of(command, json.loads(said.out))["trained_on_known"] is False
    assert cli.main([*words, str(folder), *QUICK[:-1]]) == 0
    assert "trained on some of these images" in capsys.readouterr().out


def test_the_data_that_is_looked_at_says_how_many_were_trained_on(folder, models, capsys):
    """What a user wants to know about, `audit --data` and `tune --data`, stays whole."""
    assert cli.main(["audit", "energy", "--energy", str(models / "energy"), "--data", str(folder), *QUICK]) == 0
    said = capsys.readouterr()
    assert (json.loads(said.out)["data"]["count"], json.loads(said.out)["data"]["trained_on"]) == (12, 7)
    assert "was trained on 7 of the 12 images in the data" in said.err
    clean = pngs(models / "clean", SAMPLE[20:32])
    words = ["tune", "--model", str(models / "denoiser"), "--sigma-px", "25", "--poisoned", "ar", "--clean", str(clean)]
    assert cli.main([*words, "--data", str(folder), *QUICK]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["data"]["trained_on"] == 7
    pretrained.save(tiny_denoiser(), models / "denoiser", overwrite=True)
    assert cli.main([*words, "--data", str(folder), *QUICK]) == 0
    unknown = capsys.readouterr()
    assert json.loads(unknown.out)["data"]["trained_on_known"] is False
    assert "note: " in unknown.err
    assert "--data may have some" in unknown.err
    assert "was trained on 7 of the 12 images chosen from --data" in said.err


def test_bench_and_certify_refuse_images_trained_on(images, models, tmp_path, capsys):
    labels = (0, 1)
    for split, some in (("train", images[:6]), ("test", images[6:])):
        for label in labels:
            pngs(tmp_path / "set" / split / str(label), some[label::2])
    words = ["--data", "imagefolder", "--root", str(tmp_path / "set")]
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["bench", *words, *out, "--defence", "A", "--model", str(models / "denoiser")]) == 2
    assert "must have no image in common" in capsys.readouterr().err
    more = ["--model", str(models / "denoiser"), "--sigma", "0.1", "--estimate"]
    assert cli.main(["certify", *words, *out, *more]) == 2
    assert "test images that no model has learned from" in capsys.readouterr().err


def test_what_a_training_started_from_counts(images, folder, tmp_path, capsys):
    first = tiny_denoiser()
    pretrained.save(first, tmp_path / "first", details=details(images[:3]))
    start = {"name": str(tmp_path / "first"), "weights_sha256": weights_sha256(first)}
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=details(images[9:], train={"start_from": start}))
    words = ["denoiser", "evaluate", str(tmp_path / "m"), "--sigma-px", "25", "--poisoned", "none", *QUICK]
    assert cli.main([*words, "--data", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["indices"] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("measured", [None, 8], ids=["as they are", "at another size"])
def test_images_resized_for_training_are_compared_at_that_size(measured, images, folder, tmp_path, capsys):
    small = [quantize(sizes.resize(to_engine(image)[0], 16, 16)).permute(1, 2, 0).numpy() for image in images[:4]]
    card = details(np.stack(small), resized=16, image_size=[16, 16])
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=card)
    words = ["denoiser", "evaluate", str(tmp_path / "m"), "--sigma-px", "25", "--poisoned", "none", *QUICK]
    words += [] if measured is None else ["--size", str(measured)]
    for data in (folder, pngs(tmp_path / "small", [*small, *[np.zeros((16, 16, 3), np.uint8)] * 2])):
        assert cli.main([*words, "--data", str(data)]) == 0
        assert json.loads(capsys.readouterr().out)["data"]["trained_on_left_out"] == 4
