"""Caches of version 2, in which models have no function, are read and verified by their own rule, and not added to.

Those in tests/golden/cache-v2 were written before there was a version 3.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import PurifiedDataset, precompute, pretrained, recipes
from purifyloader.cache import CacheReader, CacheWriter
from purifyloader.cache import format as fmt
from purifyloader.cache.compare import compare
from purifyloader.cache.inspect import describe, read_folder, verify
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.commands.main import main
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import CacheError, ConfigError
from purifyloader.purified import plans
from purifyloader.purifiers import Purifier

GOLDEN = Path(__file__).parents[1] / "golden" / "cache-v2"
COUNT = 6


def source() -> list[tuple[Image.Image, int]]:
    y, x = np.mgrid[0:8, 0:8]
    planes = [
        np.stack([x * (i + 1) * 7 % 256, y * (i + 2) * 5 % 256, (x + y) * 3 * (i + 1) % 256], 2) for i in range(COUNT)
    ]
    return [(Image.fromarray(plane.astype(np.uint8)), i % 3) for i, plane in enumerate(planes)]


def eclipse(change: Callable[[NetworkDenoiser], object] = lambda denoiser: None, steps: int = 1) -> Purifier:
    """ECLIPSE with the shipped denoiser, changed."""
    denoiser = pretrained.load("cifar10-sparse")
    change(denoiser)
    return recipes.eclipse(denoiser, steps=steps)


PURIFIERS: dict[str, Callable[[], Purifier]] = {"eclipse": eclipse, "jpeg": lambda: recipes.jpeg(10)}


@pytest.fixture(params=PURIFIERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache(name: str, tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / name, tmp_path / "cache")


@pytest.fixture
def of_eclipse(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "eclipse", tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


def test_it_is_read_verified_and_used(cache: Path, name: str) -> None:
    before = contents(cache)
    purifier = PURIFIERS[name]()
    reader = precompute(source(), purifier, cache, check_source=True, progress=False)
    reader.verify()
    assert (reader.index.version, reader.config["schema"]) == (2, 1)
    dataset = PurifiedDataset(source(), purifier, cache=cache, progress=False)
    live = PurifiedDataset(source(), purifier)
    for i in range(COUNT):
        assert np.abs(np.asarray(dataset[i][0], int) - np.asarray(live[i][0], int)).max() <= 1
        assert dataset[i][1] == live[i][1]
    assert len(PurifiedDataset.from_cache(cache)) == COUNT
    assert contents(cache) == before


def test_commands_read_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", str(cache)]) == 0
    assert "version      2, which is read and not added to" in capsys.readouterr().out
    assert main(["cache", "verify", str(cache)]) == 0
    assert "whole" in capsys.readouterr().out
    assert (describe(cache)["version"], describe(cache)["state"]) == (2, "finished")


def test_it_is_compared_with_another(tmp_path: Path) -> None:
    old = CacheReader(GOLDEN / "eclipse")
    assert compare(old, CacheReader(GOLDEN / "eclipse")).same_fingerprint
    new = precompute(source(), eclipse(), tmp_path / "new", shard_size=4, progress=False)
    assert new.index.version == 3
    compared = compare(old, new)
    assert (compared.same_fingerprint, compared.sources_differ) == (False, 0)
    assert "version: 2 → 3" in compared.differences
    assert (compared.max_abs or 0) <= 1


def test_tars_of_it_are_what_they_were_and_give_it_back(of_eclipse: Path, tmp_path: Path) -> None:
    export_tars(CacheReader(of_eclipse), tmp_path / "tars")
    tars = {key: value for key, value in json.loads((GOLDEN / "tars.json").read_text()).items() if key != "sha256"}
    found = json.loads((tmp_path / "tars" / "cache.json").read_text())
    assert {key: found[key] for key in tars if key != "tars"} == {key: tars[key] for key in tars if key != "tars"}
    again = import_tars(tmp_path / "tars", tmp_path / "again")
    assert again.index.version == 2
    assert contents(tmp_path / "again") == contents(GOLDEN / "eclipse")
    (tmp_path / "again" / "shard-00001.safetensors").unlink()  # a stop
    (tmp_path / "again" / "index.json").unlink()
    import_tars(tmp_path / "tars", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(GOLDEN / "eclipse")


def changed(**fields: Any) -> Callable[[NetworkDenoiser], object]:
    return lambda denoiser: [setattr(denoiser, name, value) for name, value in fields.items()]


def other_eps(denoiser: NetworkDenoiser) -> None:
    denoiser.network.norm_out.eps = 1e-3


def other_weights(denoiser: NetworkDenoiser) -> None:
    with torch.no_grad():
        denoiser.network.stem.weight[0, 0, 0, 0] += 1


OTHERS: dict[str, tuple[Callable[[NetworkDenoiser], object], str]] = {
    "parameterization": (changed(parameterization="v"), 'function.parameterization: "edm" → "v"'),
    "schedule": (changed(schedule=CosineSchedule(4000)), "function.schedule: null → "),
    "range": (changed(sigma_range=(0.001, 0.5)), "function.sigma_range: "),
    "a layer": (other_eps, "function.structure_sha256: absent → "),
    "weights": (other_weights, "is none that ships with purifyloader"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_function_or_other_weights_are_refused(of_eclipse: Path, other: str) -> None:
    change, message = OTHERS[other]
    purifier, before = eclipse(change), contents(of_eclipse)
    for opened in (
        lambda: PurifiedDataset(source(), purifier, cache=of_eclipse, progress=False),
        lambda: precompute(source(), purifier, of_eclipse, progress=False),
    ):
        with pytest.raises(CacheError, match=r"of version 2.* by their weights alone") as error:
            opened()
        assert message in str(error.value)
        assert "Precompute into another folder" in str(error.value)
    assert contents(of_eclipse) == before


def test_a_model_that_does_not_ship_is_refused_whatever_its_name() -> None:
    class Own(NetworkDenoiser):
        pass

    shipped = pretrained.load("cifar10-sparse")
    own = Own(shipped.network, shipped.parameterization, shipped.sigma_range)
    own.name = "cifar10-sparse"
    with pytest.raises(CacheError, match=r'function\.class: "NetworkDenoiser" → '):
        PurifiedDataset(source(), recipes.eclipse(own, steps=1), cache=GOLDEN / "eclipse", progress=False)


def test_another_setting_is_refused_with_what_differs(of_eclipse: Path) -> None:
    with pytest.raises(CacheError, match=r"differs[\s\S]*purifier\.steps: 1 → 2"):
        PurifiedDataset(source(), eclipse(steps=2), cache=of_eclipse, progress=False)
    with pytest.raises(CacheError, match=r"another configuration[\s\S]*config\.seed: 0 → 1"):
        precompute(source(), eclipse(), of_eclipse, seed=1, progress=False)


def test_an_energy_model_that_ships_is_known_too() -> None:
    """By its weights and its temperature, which no weight is."""
    from purifyloader.purified.job import Job

    def former(energy: EnergyNetwork) -> dict[str, Any]:
        job = Job.__new__(Job)
        job.purifier, job.seed, job.draws = recipes.puregen_ebm(steps=1, energy=energy), 0, 1
        return job.former_config()

    shipped = pretrained.load("cifar10-energy", kind="energy")
    entry = former(shipped)["purifier"]["energy"]
    assert sorted(entry) == ["weights_sha256"]
    shipped.temperature = 1e-3
    with pytest.raises(ConfigError, match=r"function\.temperature: 0\.0001 → 0\.001"):
        former(shipped)


def damage(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


LACKING: dict[str, Callable[[Path], object]] = {
    "no index": lambda folder: (folder / "index.json").unlink(),
    "no index and a shard": lambda folder: [
        (folder / name).unlink() for name in ("index.json", "shard-00000.safetensors")
    ],
    "no shard": lambda folder: (folder / "shard-00001.safetensors").unlink(),
    "a damaged shard": damage,
}


@pytest.mark.parametrize("lacking", LACKING)
def test_it_is_neither_finished_nor_repaired(cache: Path, name: str, lacking: str) -> None:
    LACKING[lacking](cache)
    before, purifier = contents(cache), PURIFIERS[name]()
    refused = r"version 2 is read, and not added to[\s\S]*Delete the folder and precompute again, or finish it with"
    with pytest.raises(CacheError, match=refused):
        precompute(source(), purifier, cache, progress=False)
    if lacking.startswith("no index"):
        for missing in (None, "precompute", "purify"):
            with pytest.raises(CacheError, match=refused):
                PurifiedDataset(source(), purifier, cache=cache, missing=missing, progress=False)
    assert contents(cache) == before
    folder = read_folder(cache)
    words = " ".join(verify(folder).in_words(0.0))
    assert "of version 2 is not added to" in words
    assert "made anew" not in words


def test_nothing_is_written_into_it_by_hand(of_eclipse: Path) -> None:
    reader = CacheReader(of_eclipse)
    writer = CacheWriter(of_eclipse, reader.config, reader.layout)
    assert not writer.pending()
    with pytest.raises(CacheError, match="not added to"):
        writer.write(writer.shards[1], np.zeros((2, 8, 8, 3), np.uint8))


def test_a_shard_of_version_2_among_those_of_3_is_refused(tmp_path: Path) -> None:
    precompute(source(), recipes.jpeg(10), tmp_path, shard_size=4, progress=False)
    shutil.copy(GOLDEN / "jpeg" / "shard-00001.safetensors", tmp_path)
    with pytest.raises(CacheError, match="must hold images 4 to 5"):
        CacheReader(tmp_path)
    with pytest.raises(CacheError, match="version: 2 → 3"):
        precompute(source(), recipes.jpeg(10), tmp_path, progress=False)


def test_a_sanitation_is_kept_with_it(of_eclipse: Path) -> None:
    """It is no pixel: the shards stay, and the index stays one of version 2."""
    sanitation = plans.Sanitation(COUNT, suspects=(1,))
    reader = precompute(source(), eclipse(), of_eclipse, sanitation=sanitation, progress=False)
    assert reader.index.version == 2
    assert PurifiedDataset.from_cache(of_eclipse).sanitation == sanitation
    assert json.loads((of_eclipse / fmt.INDEX_FILE).read_text())["version"] == 2
