"""Plans in a cache: made once, the same in every process and after every stop, and seen by whoever reads it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from purifyloader import PurifiedDataset, plans
from purifyloader.cache import CacheReader
from purifyloader.cache import format as fmt
from purifyloader.cache.inspect import describe
from purifyloader.commands.main import execute
from purifyloader.core.devices import kind_of_device
from purifyloader.energy import image_energies
from purifyloader.errors import CacheError, ConfigError
from purifyloader.purified.filling import precompute
from purifyloader.purified.job import Job
from purifyloader.purifiers import Chain, Coin, EnergyAbove, Jpeg, Purifier, Resize, Where
from tests import processes
from tests.conftest import PictureDataset, random_images, tiny_energy

COUNT = 23
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


HERE = kind_of_device(torch.device("cpu"))


def main(arguments: list[str]) -> int:
    """The command; errors of the user's are raised."""
    return execute(["cache", *arguments])


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def source(seed: int = 0) -> PictureDataset:
    return PictureDataset(random_images(COUNT, 8, seed=seed))


def half(k: float = 0.5, inner: Purifier | None = None) -> Where:
    return Where(EnergyAbove(tiny_energy(), k=k), inner or Coin())


def filled(folder: Path, purifier: Purifier | None = None, dataset: Any = None, **options: Any) -> CacheReader:
    return precompute(
        dataset or source(), purifier or half(), folder, **{"shard_size": 4, "progress": False, **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All of it: a finished run leaves no hidden files, and no plan beside the index."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def purified(reader: CacheReader, dataset: Any = None) -> list[bool]:
    return [not np.array_equal(reader[i], np.asarray(image)) for i, (image, _) in enumerate(dataset or source())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes in one go."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    filled(folder)
    return contents(folder)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass over the dataset that a plan has made."""
    made: list[int] = []
    make = plans.make

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return make(*arguments, **options)

    monkeypatch.setattr(plans, "make", counted)
    return made


class Stopped(Jpeg):
    """A purifier that a signal interrupts after some images; it says that it is Coin, which it is not."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left, self.inner = after, Coin()

    def config(self) -> dict[str, Any]:
        return self.inner.config()

    def run(self, x_BCHW: torch.Tensor, seeds_B: torch.Tensor) -> torch.Tensor:
        self._left -= len(x_BCHW)
        if self._left < 0:
            raise KeyboardInterrupt
        return self.inner.run(x_BCHW, seeds_B)


def interrupted(folder: Path, after: int = 0, k: float = 0.5, dataset: Any = None) -> None:
    with pytest.raises(KeyboardInterrupt):
        filled(folder, half(k, Stopped(after)), dataset)


# -- made once, and kept -----------------------------------------------------------------------------


def test_the_cache_says_which_images_were_purified(tmp_path: Path, passes: list[int]) -> None:
    reader = filled(tmp_path)
    energies = image_energies(tiny_energy(), random_images(COUNT, 8).float() / 255)
    threshold = float(energies.topk(12).values[-1])
    assert purified(reader) == (energies >= threshold).tolist()
    where = (reader.plan or {})["where"]
    assert where["source"] == reader.identity["source"]
    (condition,) = where["conditions"]
    assert condition["k"] == 0.5
    assert condition["planned"] == {"threshold": threshold, "purified": 12, "images": COUNT}
    assert condition["energy"]["weights_sha256"] == half().condition.config()["energy"]["weights_sha256"]
    assert reader.config["purifier"] == half().identity()
    assert (reader.index.notes or {})["purifier"]["condition"] == condition
    assert passes == [1]


@pytest.mark.parametrize("missing", [None, "precompute", "purify"])
def test_a_dataset_makes_the_same_cache(tmp_path: Path, missing: str | None, passes: list[int]) -> None:
    dataset = PurifiedDataset(source(), half(), cache=tmp_path / "a", missing=missing, progress=False)
    images = [image.tobytes() for image, _ in (dataset[i] for i in range(COUNT))]
    reader = filled(tmp_path / "b")
    assert images == [reader[i].tobytes() for i in range(COUNT)]
    other = CacheReader(tmp_path / "a")
    assert (other.plan, other.fingerprint) == (reader.plan, reader.fingerprint)
    assert passes == [1, 1]
    assert not (tmp_path / "a/plan.json").exists()


def test_a_finished_cache_is_opened_without_another_pass(tmp_path: Path, passes: list[int]) -> None:
    filled(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    dataset = PurifiedDataset(source(), half(), cache=tmp_path, progress=False)
    filled(tmp_path)
    CacheReader(tmp_path, {"purifier": half().identity(), "schema": 2, "seed": 0, "draws": 1})
    assert passes == [1]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    # whoever has the dataset sees the threshold too
    assert dataset.purifier is not None
    assert not plans.is_open(dataset.purifier)
    assert len(PurifiedDataset.from_cache(tmp_path)) == COUNT


def test_a_stopped_run_goes_on_with_its_plan(tmp_path: Path, whole: dict[str, bytes], passes: list[int]) -> None:
    for after in (0, 5):
        interrupted(tmp_path, after)
        assert (tmp_path / "plan.json").exists()
        assert not (tmp_path / "index.json").exists()
    assert len(list(tmp_path.glob("shard-*"))) >= 1
    filled(tmp_path)
    assert passes == [1]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"format":"purifyloader-cache","version":3}', None])
def test_a_damaged_plan_is_made_again(
    tmp_path: Path, whole: dict[str, bytes], passes: list[int], damage: bytes | None, caplog: Any
) -> None:
    interrupted(tmp_path, 5)
    path = tmp_path / "plan.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"purified":12', b'"purified":13') if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        interrupted(tmp_path, 0)
    assert "plan.json will be made again" in caplog.text
    assert path.read_bytes() == good
    filled(tmp_path)
    assert passes == [1, 1]
    assert contents(tmp_path) == whole


def test_a_lost_plan_is_made_again(tmp_path: Path, whole: dict[str, bytes], passes: list[int]) -> None:
    interrupted(tmp_path, 5)
    (tmp_path / "plan.json").unlink()
    filled(tmp_path)
    (tmp_path / "index.json").unlink()
    filled(tmp_path)
    assert passes == [1, 1, 1]
    assert contents(tmp_path) == whole


def test_killed_between_index_and_tidying(tmp_path: Path, whole: dict[str, bytes], passes: list[int]) -> None:
    interrupted(tmp_path / "a")
    left = (tmp_path / "a/plan.json").read_bytes()
    filled(tmp_path / "b")
    (tmp_path / "b/plan.json").write_bytes(left)
    (tmp_path / "b/.plan.json.lock").touch()
    filled(tmp_path / "b")
    assert contents(tmp_path / "b") == whole
    assert passes == [1, 1]


def test_a_plan_of_another_kind_of_device_is_made_again(
    tmp_path: Path, whole: dict[str, bytes], passes: list[int]
) -> None:
    interrupted(tmp_path)
    plan = fmt.read_plan(tmp_path)
    fmt.write_plan(tmp_path, fmt.Plan(plan.config, plan.length, "cuda", plan.found))
    filled(tmp_path)
    assert passes == [1, 1]
    assert contents(tmp_path) == whole


def test_no_pass_for_a_cache_that_another_kind_of_device_began(
    tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, after=10)
    assert list(tmp_path.glob("shard-*"))
    before = (tmp_path / fmt.PLAN_FILE).read_bytes()
    made = Job.made
    monkeypatch.setattr(Job, "made", lambda job: {**made(job), "device": "cuda"})
    with pytest.raises(CacheError, match="cuda"):
        filled(tmp_path)
    assert passes == [1]
    assert (tmp_path / fmt.PLAN_FILE).read_bytes() == before


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 1000}, {"workers": 2, "batch_size": 5}])
def test_batches_and_workers_decide_nothing(tmp_path: Path, whole: dict[str, bytes], options: dict[str, int]) -> None:
    filled(tmp_path, **options)
    assert contents(tmp_path) == whole


def test_every_draw_is_of_the_same_images(tmp_path: Path) -> None:
    reader = filled(tmp_path, Chain(Resize(8, 8), half()), draws=3)
    raw = [np.asarray(image) for image, _ in source()]
    for draw in range(3):
        changed = [not np.array_equal(a, b) for a, b in zip(reader.batch(range(COUNT), draw), raw, strict=True)]
        assert sum(changed) == 12
        assert changed == purified(reader)
    assert not np.array_equal(reader.batch(range(COUNT), 0), reader.batch(range(COUNT), 1))


# -- several processes -------------------------------------------------------------------------------

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import torch
torch.set_num_threads(1)
from purifyloader.files import locks
rank, world_size, folder, has_locks = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
if not has_locks:
    locks.fcntl = None
from tests.purified.test_plans import filled
filled(folder, rank=rank, world_size=world_size)
"""


@pytest.mark.parametrize(("order", "has_locks"), [([0, 1], True), ([1, 0], False)])
def test_processes_agree_without_a_group(
    tmp_path: Path, whole: dict[str, bytes], order: list[int], has_locks: bool
) -> None:
    running = [processes.start(processes.Code(SCRIPT), rank, 2, tmp_path / "out", has_locks) for rank in order]
    done = [process.wait() for process in running]
    assert [process.returncode for process in done] == [0, 0], done
    found = contents(tmp_path / "out")
    planned = sum(d.stdout.count("Planned: k 0.5: 12 of 23 images purified") for d in done)
    assert planned == 1 if has_locks else planned in (1, 2)
    assert {name: data for name, data in found.items() if not name.startswith(".")} == whole


# -- what it refuses ---------------------------------------------------------------------------------


def test_another_share_is_refused(tmp_path: Path, passes: list[int]) -> None:
    differs = r"purifier\.condition\.k: 0\.5 → 0\.3"
    interrupted(tmp_path / "planned")
    interrupted(tmp_path / "begun", 5)
    filled(tmp_path / "finished")
    for state in ("planned", "begun", "finished"):
        with pytest.raises(CacheError, match=differs):
            filled(tmp_path / state, half(0.3))
        with pytest.raises(CacheError, match=differs):
            PurifiedDataset(source(), half(0.3), cache=tmp_path / state, missing="precompute", progress=False)
    assert passes == [1, 1, 1]
    with pytest.raises(CacheError, match=r"claim\.json was made with another(.|\n)*length: 23 → 5"):
        filled(tmp_path / "planned", dataset=PictureDataset(random_images(5, 8)))


def test_a_source_that_changes_after_the_plan_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(CacheError, match="the dataset changed meanwhile"):
        filled(tmp_path, dataset=source(seed=1))
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(CacheError, match=r"from the source that it is used with"):  # not what the shards are of
        filled(tmp_path)
    with pytest.raises(CacheError, match="the dataset changed meanwhile"):  # nor what the plan is of
        filled(tmp_path, dataset=source(seed=1), check_source=True)


def test_a_plan_of_another_version_is_left_alone(tmp_path: Path) -> None:
    interrupted(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"version":3', '"version":4'))
    with pytest.raises(CacheError, match=r"of version 2 or 3\. Got version 4"):
        filled(tmp_path)
    assert '"version":4' in path.read_text()


def test_a_purifier_with_the_plan_of_another_dataset_is_refused(tmp_path: Path) -> None:
    own, foreign = (plans.plan(half(), source(seed), progress=False) for seed in (0, 9))
    reader = filled(tmp_path / "own", own)
    assert reader.fingerprint == filled(tmp_path / "open").fingerprint
    with pytest.raises(ConfigError, match=r"must have the one of this dataset.*give it without a plan"):
        filled(tmp_path / "foreign", foreign)
    assert not list((tmp_path / "foreign").glob("shard-*"))
    with pytest.raises(ConfigError, match="must have the one of this dataset"):
        PurifiedDataset(source(), foreign, cache=tmp_path / "own", progress=False)


# -- beside a plan of the user's ---------------------------------------------------------------------


def test_a_users_plan_stands_beside_it(tmp_path: Path, whole: dict[str, bytes]) -> None:
    where = (CacheReader(filled(tmp_path).folder).plan or {})["where"]
    labels = {"labels": {"3": 7}}
    assert filled(tmp_path, plan=labels).plan == {**labels, "where": where}
    assert filled(tmp_path).plan == {**labels, "where": where}
    assert filled(tmp_path, plan={}).plan == {"where": where}
    assert contents(tmp_path) == whole
    with pytest.raises(ConfigError, match=r"'where'.*rename it"):
        filled(tmp_path, plan={"where": 1})
    with pytest.raises(ConfigError, match="A plan must be made of"):
        filled(tmp_path, plan={"a": float("nan")})


# -- what people see ---------------------------------------------------------------------------------


def test_info_says_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path / "cache", 5)
    line = "k 0.5: 12 of 23 images purified, energy-above "
    for state in ("an unfinished cache", "a finished cache"):
        assert main(["info", str(tmp_path / "cache")]) == 0
        text = capsys.readouterr().out
        assert state in text
        assert line in text
        assert "not of it" not in text
        assert "energy-above: compute_batch 32, k 0.5" in text
        assert describe(tmp_path / "cache")["where"][0]["planned"]["purified"] == 12
        json.dumps(describe(tmp_path / "cache"))
        filled(tmp_path / "cache")
    assert main(["verify", str(tmp_path / "cache")]) == 0


def test_a_plan_goes_into_tars_and_back(tmp_path: Path, whole: dict[str, bytes]) -> None:
    filled(tmp_path / "cache")
    assert main(["export", str(tmp_path / "cache"), str(tmp_path / "tars")]) == 0
    assert main(["import", str(tmp_path / "tars"), str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == whole


def test_the_file_is_what_the_readme_says(tmp_path: Path) -> None:
    interrupted(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    values = json.loads(text)
    assert sorted(values) == ["config", "device", "format", "found", "length", "sha256", "version"]
    assert (values["format"], values["version"], values["device"]) == ("purifyloader-cache", 3, HERE)
    assert values == fmt.guarded(values)
    assert text == json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n"
    assert values["found"] == (filled(tmp_path).plan or {})["where"]
