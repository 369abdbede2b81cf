"""What a checkpoint says of the images that it learned from goes with no weights but those that learned from them."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from purifyloader import pretrained
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.energy import EnergyConfig
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.hashes import hashes_as_text, image_hashes
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.checkpoint import read_config
from purifyloader.pretrained.learned import learned_from, learned_images
from purifyloader.train import TrainConfig, distilled_from, recipe, started_from, train_denoiser
from purifyloader.train.energy import EnergyTrainConfig, train_energy
from purifyloader.train.energy.task import build_energy
from tests.conftest import random_images, tiny_denoiser, tiny_energy

IMAGES = random_images(12, 8).permute(0, 2, 3, 1).numpy()


def claims(images: np.ndarray, **more: object) -> dict[str, object]:
    return {"image_hashes": hashes_as_text(image_hashes(images)), **more}


@pytest.fixture
def first(tmp_path) -> Path:
    """A denoiser that learned from seven images."""
    pretrained.save(tiny_denoiser(), tmp_path / "first", details=claims(IMAGES[:7], indices=[*range(7)]))
    return tmp_path / "first"


def details_of(folder: Path) -> dict[str, object]:
    return read_config(folder, None)["details"]


def not_known(folder: Path) -> bool:
    """The strict check refuses the model, and the lenient one names it."""
    with pytest.raises((InputError, CheckpointError)):
        learned_from(folder)
    learned = learned_images([folder], [(image, 0) for image in IMAGES], "images", 3)
    return learned.silent == (str(folder),) and not learned.hashes and not learned.doubtful


def moved(model: NetworkDenoiser) -> NetworkDenoiser:
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    return model


def pickled(model: NetworkDenoiser) -> NetworkDenoiser:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def filled(model: NetworkDenoiser) -> NetworkDenoiser:
    model.load_state_dict(tiny_denoiser(seed=1).state_dict())
    return model


def averaged(model: NetworkDenoiser) -> NetworkDenoiser:
    other = tiny_denoiser(seed=1).state_dict()
    model.load_state_dict({name: (value + other[name]) / 2 for name, value in model.state_dict().items()})
    return model


def rewrapped(model: NetworkDenoiser) -> NetworkDenoiser:
    return moved(NetworkDenoiser(model.network, model.parameterization, (0.001, 0.2)))


CHANGES = {
    "fine-tuned": moved,
    "other weights": filled,
    "averaged": averaged,
    "a copy": lambda model: moved(copy.deepcopy(model)),
    "a pickle": lambda model: moved(pickled(model)),
    "the network in another denoiser": rewrapped,
    "cast": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_loaded_and_changed_claims_nothing_without_its_start(change, first, tmp_path, caplog):
    model, before = CHANGES[change](pretrained.load(first)), weights_sha256(pretrained.load(first))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="details must be of the model that is saved"):
        pretrained.save(model, out, details=details_of(first))
    older = {name: value for name, value in details_of(first).items() if name != "weights_sha256"}
    for said in (older, claims(IMAGES[8:]), {"indices": [1]}, {"images_sha256": "0" * 64}):
        with pytest.raises(InputError, match="details must say from which weights a training started"):
            pretrained.save(model, out, details=said)
    assert not out.exists()
    assert not caplog.text
    pretrained.save(model, out, details={"note": "nothing is said"})
    assert not_known(out)
    assert "it no longer says what it learned from" in caplog.text
    start = {"start_from": {"name": str(first), "weights_sha256": before}}
    pretrained.save(model, out, details=claims(IMAGES[8:], train=start), overwrite=True)
    assert len(learned_from(out)) == 7 + 4


def test_a_model_that_was_not_changed_keeps_all_that_it_claims(first, tmp_path):
    model = pretrained.load(first)
    for fewer in (claims(IMAGES[:2]), claims(IMAGES[:0], indices=[]), {"indices": [*range(7)]}):
        with pytest.raises(InputError, match="details must name the images that the checkpoint of these weights names"):
            pretrained.save(model, tmp_path / "out", details=fewer)
    pretrained.save(model, tmp_path / "out", details={**details_of(first), "note": "renamed"})
    assert learned_from(tmp_path / "out").tolist() == learned_from(first).tolist()


@pytest.mark.parametrize("make", [tiny_denoiser, tiny_energy])
def test_details_of_another_model_are_refused(make, first, tmp_path):
    for other in (make(seed=3), pretrained.load("cifar10-energy", kind="energy")):
        for source in (details_of(first), details_of(Path(pretrained.__file__).parent / "cifar10-sparse")):
            with pytest.raises(InputError, match="of the model that is saved"):
                pretrained.save(other, tmp_path / "out", details=source)


def edited(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def file_swapped(first: Path, other: Path) -> Path:
    shutil.copy(other / "model.safetensors", first)
    return first


def config_copied(first: Path, other: Path) -> Path:
    shutil.copy(first / "config.json", other)
    return other


def config_adapted(first: Path, other: Path) -> Path:
    digest = json.loads((other / "config.json").read_text())["model_sha256"]
    shutil.copy(first / "config.json", other)
    edited(other, model_sha256=digest)
    return other


def details_copied(first: Path, other: Path) -> Path:
    edited(other, details=details_of(first))
    return other


def weights_gone(first: Path, other: Path) -> Path:
    (first / "model.safetensors").unlink()
    return first


FOLDERS = [file_swapped, config_copied, config_adapted, details_copied, weights_gone]


@pytest.mark.parametrize("mix", FOLDERS, ids=lambda mix: mix.__name__)
def test_a_folder_put_together_from_two_says_nothing(mix, first, tmp_path):
    pretrained.save(tiny_denoiser(seed=1), tmp_path / "other", details=claims(IMAGES[9:]))
    mixed = mix(first, tmp_path / "other")
    assert not_known(mixed)
    with pytest.raises(CheckpointError):
        pretrained.load(mixed)


def test_what_is_mixed_is_named_with_what_to_do(first, tmp_path):
    pretrained.save(tiny_denoiser(seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"Got details of the weights \w{16} beside \w{16}.*leave image_hashes"):
        pretrained.load(details_copied(first, tmp_path / "other"))
    edited(tmp_path / "other", details={})
    assert pretrained.load(tmp_path / "other").name is None


def test_a_checkpoint_of_before_is_read_as_before(first):
    older = {name: value for name, value in details_of(first).items() if name != "weights_sha256"}
    edited(first, details=older)
    assert len(learned_from(first)) == 7
    assert pretrained.load(first).name is None


def test_a_training_has_learned_from_what_its_start_did(first, tmp_path):
    """In Python too, where nobody writes the details for the user."""
    energy = EnergyConfig(channels=4)
    config = EnergyTrainConfig.from_dict({"network": {"channels": 4}, "steps": 1, "batch_size": 2, "langevin_steps": 1})
    start = build_energy(config)
    assert start.config == energy
    model, _ = train_energy(
        random_images(2, 8), tmp_path / "run", started_from(config, start), start=start, progress=False
    )
    with pytest.raises(InputError, match="from which weights a training started"):
        pretrained.save(model, tmp_path / "out", details=claims(IMAGES[:2]))
    pretrained.save(model, tmp_path / "out", details=claims(IMAGES[:2], train=started_from(config, start).to_dict()))
    with pytest.raises(InputError, match="from which weights a training started"):
        pretrained.save(model, tmp_path / "out", details=claims(IMAGES[:2], train=config.to_dict()), overwrite=True)


def test_a_training_has_learned_from_what_its_teacher_did(first, tmp_path):
    teacher = pretrained.load(first)
    network = {"kind": "plain-unet", "widths": [4], "blocks": [1]}
    values = {"network": network, "steps": 1, "batch_size": 2, "sigma_range": [0.05, 0.2], "dtype": "float32"}
    config = TrainConfig.from_dict(values, recipe("fast"))
    taught = distilled_from(config, teacher)
    model, _ = train_denoiser(random_images(2, 8), tmp_path / "run", taught, teacher=teacher, progress=False)
    out = tmp_path / "out"
    for copied in (model, copy.deepcopy(model), pickled(model)):
        for train in ({}, config.to_dict(), started_from(config, teacher).to_dict()):
            with pytest.raises(InputError, match="from which it was distilled"):
                pretrained.save(copied, out, details=claims(IMAGES[8:], train=train))
    named = {**taught.to_dict(), "distil_from": {"name": str(first), "weights_sha256": weights_sha256(teacher)}}
    pretrained.save(model, out, details=claims(IMAGES[8:], train=named))
    assert len(learned_from(out)) == 7 + 4
    fewer = claims(IMAGES[8:], train=config.to_dict())
    with pytest.raises(InputError, match="that the checkpoint of these weights names"):
        pretrained.save(pretrained.load(out), tmp_path / "again", details=fewer)
    shutil.rmtree(first)
    with pytest.raises(InputError, match="was distilled from the denoiser"):
        learned_from(out)


def test_what_a_model_learned_from_is_that_of_all_before_it(first, tmp_path):
    """Start and teacher, each with ones before it, and one of them twice."""
    entry = {"name": str(first), "weights_sha256": weights_sha256(pretrained.load(first))}
    middle = tmp_path / "middle"
    pretrained.save(tiny_denoiser(seed=1), middle, details=claims(IMAGES[7:8], train={"distil_from": entry}))
    other = {"name": str(middle), "weights_sha256": weights_sha256(pretrained.load(middle))}
    both = {"start_from": entry, "distil_from": other}
    pretrained.save(tiny_denoiser(seed=2), tmp_path / "last", details=claims(IMAGES[8:10], train=both))
    assert set(learned_from(tmp_path / "last").tolist()) == set(image_hashes(IMAGES[:10]).tolist())
    assert len(learned_from(middle)) == 8
