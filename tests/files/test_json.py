"""JSON that somebody else made: whatever is wrong with it is one error that names the file, at no cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from purifyloader import pretrained, recipes
from purifyloader.certify.votes import VoteFolder
from purifyloader.commands.training import fields_of
from purifyloader.datasets.select import read_indices
from purifyloader.diffusion.denoiser import denoiser_from_config
from purifyloader.diffusion.schedule import schedule_from_config
from purifyloader.diffusion.unet import UNetConfig
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import ConfigError, PurifyError
from purifyloader.files.json import DEEPEST, JsonError, parse_json, read_json
from purifyloader.files.opening import UnusableFile
from purifyloader.purifiers import Chain, Diffuse, EnergyAbove, Jpeg, Langevin, Repeat, Tiles, Where, from_config
from purifyloader.recipes.models import from_file
from purifyloader.results import rows
from purifyloader.train.denoiser.config import TrainConfig
from purifyloader.train.energy.config import EnergyTrainConfig
from tests.conftest import slim_denoiser, tiny_energy

BAD: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"a": [1, 2',
    "two": b"{} {}",
    "deep lists": b"[" * 100_000,
    "deep and closed": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "a number of 5,000 digits": b"[" + b"1" * 5_000 + b"]",
    "a number of 1,100 bits": b"[%d]" % 2**1100,
    "infinite by its exponent": b"[1e999]",
    "NaN": b"[NaN]",
    "minus infinity": b'{"a": -Infinity}',
    "a key twice": b'{"schema": 1, "schema": 2}',
    "half a surrogate pair": b'["\\ud800"]',
    "half a surrogate pair in a key": b'{"\\udfff": 1}',
    "Latin-1": '["\xe9"]'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-8 with a mark": '{"a": 1}'.encode("utf-8-sig"),
    "NUL": b"\0" * 64,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BAD[name])
    with pytest.raises(JsonError):
        read_json(tmp_path / "x")


def test_good_text_is_what_json_reads() -> None:
    text = json.dumps({"a": [1, -2.5, None, True, "é"], "b": {"c": [2**64, 1e308]}, "": []})
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    for value in ("NaN", "-Infinity", str(2**4096), '"\\ud800"'):
        assert repr(parse_json(value, any_value=True)) == repr(json.loads(value))


def test_length_is_of_what_is_read_and_not_of_what_the_file_says(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for path in (tmp_path / "sparse", Path("/dev/zero")):
        with pytest.raises(UnusableFile, match=r"sparse file|a device"):
            read_json(path, 1000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**29)  # which may be so sparse
    with pytest.raises(JsonError, match="longer than 1,000 bytes"):
        read_json(tmp_path / "sparse", 1000)
    with pytest.raises(JsonError, match="longer"):
        parse_json("[" + "1," * 1000 + "1]", 1000)


def _model(path: Path) -> object:
    return pretrained.load(path.parent)


def _rows(path: Path) -> object:
    read = rows.read(path)
    assert read  # a file of nothing has none
    return read


PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "purifier": ("purifier.json", from_file),
    "indices": ("indices.json", read_indices),
    "fields of a training": ("fields.json", fields_of),
    "model": ("config.json", _model),
    "rows": ("rows.jsonl", _rows),
    "votes": ("settings.json", lambda path: VoteFolder(path.parent, {}, models=2, inputs=3, classes=2)),
}
"""Kind of file → its name, and what opens it."""


@pytest.mark.parametrize("place", PLACES)
def test_each_place_names_the_file(place: str, tmp_path: Path) -> None:
    name, opened = PLACES[place]
    for number, (what, data) in enumerate(BAD.items()):
        if (place, what) == ("rows", "nothing"):
            continue
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(PurifyError) as caught:
            opened(folder / name)
        assert folder.name in str(caught.value), what


BATCH, WIDTH, TIMESTEPS = 10**5, 10**5, 10**8
LARGE: dict[str, Callable[[], object]] = {
    "timesteps": lambda: schedule_from_config({"kind": "cosine", "timesteps": TIMESTEPS}),
    "timesteps, linear": lambda: schedule_from_config({"kind": "linear", "timesteps": TIMESTEPS}),
    "timesteps, continuous": lambda: schedule_from_config({"kind": "continuous-vp", "timesteps": 1e300}),
    "timesteps, text": lambda: schedule_from_config({"kind": "continuous-vp", "timesteps": "4000"}),
    "k1": lambda: schedule_from_config({"kind": "continuous-vp", "k1": -1e300}),
    "betas without numbers": lambda: schedule_from_config(
        {"kind": "linear", "timesteps": 10**6, "beta_start": 0.5, "beta_end": 0.9}
    ),
    "betas of nothing": lambda: schedule_from_config(
        {"kind": "scaled-linear", "timesteps": 1000, "beta_start": 1e-300, "beta_end": 1e-299}
    ),
    "times": lambda: Repeat(Jpeg(), 10**9),
    "times of times": lambda: Repeat(Repeat(Jpeg(), 1000), 1000),
    "times in a chain": lambda: Chain(Repeat(Jpeg(), 60_000), Repeat(Jpeg(), 60_000)),
    "tile": lambda: Tiles(Jpeg(), 10**6),
    "overlap": lambda: Tiles(Jpeg(), 32, 10**9),
    "compute_batch, diffusion": lambda: Diffuse(slim_denoiser(), sigma=0.1, compute_batch=BATCH),
    "compute_batch, energy": lambda: Langevin(tiny_energy(), compute_batch=BATCH),
    "compute_batch, condition": lambda: EnergyAbove(tiny_energy(), 0.1, compute_batch=BATCH),
    "steps": lambda: Langevin(tiny_energy(), steps=10**9),
    "steps, diffusion": lambda: Diffuse(slim_denoiser(), sigma=0.1, steps=10**9),
    "sigma": lambda: Diffuse(slim_denoiser(), sigma=10**300),
    "step_size": lambda: Langevin(tiny_energy(), step_size=1e200),
    "temperature": lambda: EnergyNetwork(EnergyConfig(channels=4), temperature=5e-324),
    "width, energy": lambda: EnergyConfig(channels=WIDTH),
    "channels, energy": lambda: EnergyConfig(image_channels=2**31),
    "blocks": lambda: UNetConfig(blocks=20_000),
    "width": lambda: UNetConfig(channels=2**20),
    "levels": lambda: UNetConfig(multipliers=(1,) * 1000),
    "multiplier": lambda: UNetConfig(multipliers=(1, 1e300)),
    "multiplier of many digits": lambda: UNetConfig(multipliers=(10**400,)),
    "multipliers, a number": lambda: UNetConfig(multipliers=5),  # type: ignore[arg-type]
    "attention_levels, none": lambda: UNetConfig(attention_levels=None),  # type: ignore[arg-type]
    "heads": lambda: UNetConfig(heads=2**31),
    "groups": lambda: UNetConfig(norm_groups=2**63),
    "steps of a training": lambda: TrainConfig(steps=10**12),
    "batch": lambda: EnergyTrainConfig(batch_size=2**31),
    "bank": lambda: EnergyTrainConfig(bank_size=10**12),
    "patch": lambda: TrainConfig(patch_size=10**6),
    "copies": lambda: TrainConfig(replicate=10**9),
    "timesteps of a training": lambda: TrainConfig(timesteps=TIMESTEPS),
}


@pytest.mark.parametrize("name", LARGE)
def test_sizes_are_bounded_before_they_cost_anything(name: str) -> None:
    began = time.process_time()
    with pytest.raises(PurifyError):
        LARGE[name]()
    assert time.process_time() - began < 2


def test_honest_sizes_are_taken() -> None:
    UNetConfig(channels=512, multipliers=(1, 1, 2, 2, 4, 4, 8, 8), blocks=16, heads=64)
    EnergyConfig(channels=2048, image_channels=200)
    TrainConfig(steps=10_000_000, batch_size=65_536, timesteps=100_000)
    assert Repeat(Repeat(Chain(Jpeg(), Jpeg()), 100), 100).output_shape((3, 8, 8)) == (3, 8, 8)
    Langevin(tiny_energy(), steps=100_000, compute_batch=8192)


def _nested(levels: int) -> dict[str, Any]:
    config: dict[str, Any] = {"kind": "jpeg", "quality": 10}
    for _ in range(levels):
        config = {"kind": "chain", "stages": [config]}
    return config


DENOISER = {"name": "cifar10-sparse", "weights_sha256": "0" * 64}
CROWDED: dict[str, dict[str, Any]] = {
    "40 levels": _nested(40),
    "200,000 stages": {"kind": "chain", "stages": [{"kind": "jpeg", "quality": 10}] * 200_000},
    "20,000 times nothing": {"kind": "chain", "stages": [{}] * 20_000},
    "100 models": {"kind": "chain", "stages": [{"kind": "denoise-once", "sigma": 0.1, "denoiser": DENOISER}] * 100},
    "doubled 40 times": {"kind": "repeat", "times": 2, "purifier": _nested(0)},
}
for _ in range(39):
    CROWDED["doubled 40 times"] = {"kind": "repeat", "times": 2, "purifier": CROWDED["doubled 40 times"]}


@pytest.mark.parametrize("name", CROWDED)
def test_a_purifier_of_too_many_parts_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "crowded.json"
    path.write_text(json.dumps({"schema": 1, "purifier": CROWDED[name]}))
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"crowded\.json"):
        from_file(path)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("levels", [40, 300, 10_000])
def test_a_purifier_in_memory_is_refused_too(levels: int) -> None:
    with pytest.raises(ConfigError, match=r"level|recursion"):
        from_config(_nested(levels), lambda entry, kind="denoiser": None)


WRONG_KINDS: list[dict[str, Any]] = [
    {"kind": "chain", "stages": 3},
    {"kind": "chain", "stages": {"kind": "jpeg"}},
    {"kind": "chain", "stages": [], "more": 1},
    {"kind": "jpeg", "quality": [10]},
    {"kind": "compensation", "p": "0.4"},
    {"kind": "compensation", "sigma": None},
    {"kind": "resize", "size": "32"},
    {"kind": "tiles", "size": "32", "purifier": _nested(0)},
    {"kind": "diffuse", "denoiser": "cifar10-sparse"},
    {"kind": "diffuse", "denoiser": DENOISER, "schedule": 4000},
    {"kind": "denoise-once", "denoiser": {"name": {}, "weights_sha256": []}, "sigma": 0.1},
    {"kind": "langevin", "energy": {}, "steps": 3},
    {"kind": "where", "condition": None, "purifier": _nested(0)},
    {"kind": "where", "condition": {"kind": "energy-above"}, "purifier": _nested(0)},
]


@pytest.mark.parametrize("config", WRONG_KINDS, ids=str)
def test_values_of_another_kind_are_one_error(config: dict[str, Any]) -> None:
    with pytest.raises(PurifyError):
        recipes.from_json(json.dumps({"schema": 1, "purifier": config}))


def test_a_denoisers_configuration_of_another_kind() -> None:
    good = slim_denoiser().config()
    for change in (
        {"network": 3},
        {"sigma_range": ["0.1", "0.2"]},
        {"sigma_range": [True, 2]},
        {"parameterization": ["v"]},
        {"time": {}},
        {"schedule": "cosine"},
        {"schedule": [["kind", "cosine"], ["timesteps", "4000"]]},
    ):
        with pytest.raises((PurifyError, TypeError, ValueError)) as caught:
            denoiser_from_config({**good, **change})
        assert isinstance(caught.value, PurifyError), change


def test_a_message_is_short_whatever_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"schema": 1, "purifier": {"kind": "x" * 10_000_000}}))
    with pytest.raises(ConfigError) as caught:
        from_file(path)
    assert len(str(caught.value)) < 50_000


def test_where_takes_a_condition_whose_plan_is_one() -> None:
    for planned in ({"threshold": 1, "purified": 2**70, "images": 5}, {"threshold": "1", "purified": 2, "images": 5}):
        condition = {"kind": "energy-above", "energy": DENOISER, "k": 0.5, "compute_batch": 32, "planned": planned}
        with pytest.raises(ConfigError):
            from_config(
                {"kind": "where", "condition": condition, "purifier": _nested(0)},
                lambda entry, kind="denoiser": tiny_energy(),
            )
    assert isinstance(Where(EnergyAbove(tiny_energy(), 0.1), Jpeg()), Where)


ROWS: dict[str, Any] = {
    "no attack": {"attack": None},
    "seed as text": {"seed": "0"},
    "accuracy as a list": {"accuracy": [1.0]},
    "seconds of nothing": {"seconds": {}},
    "settings of nothing": {"settings": {}},
    "versions as a list": {"versions": []},
    "success as text": {"clean_success": {"lsp": "1"}},
    "training as an object": {"training": {}},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_what_the_tables_read(name: str, tmp_path: Path) -> None:
    sample = Path(__file__).parents[2] / "examples" / "bench" / "results" / "sample" / "rows.jsonl"
    good = json.loads(sample.read_text(encoding="utf-8").splitlines()[0])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good))
    assert len(rows.read(path)) == 1
    path.write_text(json.dumps({**good, **ROWS[name]}))
    with pytest.raises(PurifyError, match=r"rows\.jsonl.*Line 1"):
        rows.read(path)
