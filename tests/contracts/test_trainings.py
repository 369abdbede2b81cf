"""Contracts that every kind of training keeps: a new kind adds a row to KINDS."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from purifyloader.diffusion.plain import PlainUNetConfig
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError, TrainingError
from purifyloader.train import plan, state, train_denoiser
from purifyloader.train import run as training
from purifyloader.train import watch as watching
from purifyloader.train.denoiser import task as denoiser_task
from purifyloader.train.denoiser.task import build_denoiser
from purifyloader.train.energy import task as energy_task
from purifyloader.train.energy import train_energy
from purifyloader.train.energy.task import build_energy
from purifyloader.train.fields import TrainingFields, started_from
from purifyloader.train.ranks import Ranks
from purifyloader.train.state import STATE_FILE
from tests import processes
from tests.conftest import random_images
from tests.train.tiny import (
    ALL,
    FROM_NOISE,
    HYBRID,
    IMAGES,
    LEARNED,
    PAIRED,
    PLAIN,
    SIGMA,
    TINY,
    WIDE,
    Stop,
    distance,
    files_in,
    free_port,
    rows,
    same,
    state_of,
    stopping_after,
    weights,
)

HELD_OUT = random_images(3, 8, seed=1)
GOLDEN = Path(__file__).parents[1] / "golden" / "train"


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Attributes:
        build, train: its functions.
        config: a tiny training.
        runs: name -> (configuration, options of `train`), for what a stopped run must get right.
        single: more of them, for one thing each that some of `runs` have too: only slow tests take them.
        held_out: the option that takes held-out images.
        other: a field, with a value that makes another training of it.
        pictures: (module, name) of the functions that draw, which take most of the time of a run this short.
        in_ranks: a training whose weights depend on the order of a sum as little as can be.
        exploding: changes that break a run at once.
        made_suspicious: makes the watch find the run no longer worth saving, and still going on.
    """

    build: Callable[..., Any]
    train: Callable[..., tuple[Any, dict[str, Any]]]
    config: TrainingFields
    runs: dict[str, tuple[TrainingFields, dict[str, Any]]]
    single: dict[str, tuple[TrainingFields, dict[str, Any]]]
    held_out: str
    other: tuple[str, Any]
    pictures: tuple[tuple[Any, str], ...]
    in_ranks: tuple[TrainingFields, dict[str, Any]]
    exploding: dict[str, Any]
    made_suspicious: Callable[[pytest.MonkeyPatch], None]


def higher_loss(patch: pytest.MonkeyPatch) -> None:
    watch = denoiser_task._LossWatch
    patch.setattr(watch, "broken", lambda self, step: self.values.update(lowest_loss=self.values["loss"] / 3))


def steeper_energy(patch: pytest.MonkeyPatch) -> None:
    walked = energy_task._walked
    steep = 0.6 * energy_task._STEEP * PLAIN.step_size
    patch.setattr(watching, "SMOOTH", 1.0)
    patch.setattr(energy_task, "_walked", lambda *arguments: (walked(*arguments)[0], steep))


KINDS = {
    "denoiser": Kind(
        build_denoiser,
        train_denoiser,
        SIGMA,
        {
            "sigma": (SIGMA, {}),
            "all": (ALL, {"validation": random_images(3, 12, seed=1), "validate_every": 3, "micro_batch": 3}),
            "bfloat16, validated": (
                dataclasses.replace(SIGMA, dtype="bfloat16"),
                {"validation": HELD_OUT, "validate_every": 2},
            ),
            "augmented, no average": (
                dataclasses.replace(SIGMA, ema_decay=0.0, augment=("flip", "crop", "rotate", "mixup")),
                {},
            ),
            "hybrid, dropout": (dataclasses.replace(HYBRID, network=dataclasses.replace(TINY, dropout=0.5)), {}),
        },
        {
            "hybrid": (HYBRID, {}),
            "learned variance": (LEARNED, {}),
            "plain": (dataclasses.replace(SIGMA, network=PlainUNetConfig((8,), (1,))), {}),
            "validated": (SIGMA, {"validation": HELD_OUT, "validate_every": 2}),
            "in parts": (HYBRID, {"micro_batch": 3}),
            "augmented": (dataclasses.replace(SIGMA, augment=("flip", "crop", "rotate", "mixup")), {}),
            "bfloat16": (dataclasses.replace(SIGMA, dtype="bfloat16"), {}),
            "no average": (dataclasses.replace(SIGMA, ema_decay=0.0), {}),
            "dropout": (dataclasses.replace(SIGMA, network=dataclasses.replace(TINY, dropout=0.5)), {}),
        },
        "validation",
        ("augment", ("flip",)),
        ((denoiser_task, "write_picture"), (denoiser_task, "write_samples")),
        (
            dataclasses.replace(ALL, steps=4, decay_steps=2),
            {"micro_batch": 1, "validation": WIDE[:1], "validate_every": 4},
        ),
        {"learning_rate": 1e30, "clip_norm": 1e30},
        higher_loss,
    ),
    "energy": Kind(
        build_energy,
        train_energy,
        PLAIN,
        {
            "from noise": (FROM_NOISE, {}),
            "held out": (PLAIN, {"held_out": HELD_OUT}),
            "bfloat16": (dataclasses.replace(PAIRED, dtype="bfloat16"), {}),
        },
        {"plain": (PLAIN, {}), "paired": (PAIRED, {})},
        "held_out",
        ("langevin_steps", 4),
        ((energy_task, "write_pictures"),),
        # plain gradient descent: Adam's first steps turn the rounding of a gradient near 0 into a whole step
        (dataclasses.replace(PAIRED, steps=4, decay_at=(2,), optimizer="sgd", learning_rate=1e-8, clip_norm=None), {}),
        {"learning_rate": 1e30, "optimizer": "sgd"},
        steeper_energy,
    ),
}

EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
EVERY_RUN = pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        pytest.param(kind, *run, marks=marks, id=f"{name}: {run_name}")
        for name, kind in KINDS.items()
        for runs, marks in ((kind.runs, ()), (kind.single, pytest.mark.slow))
        for run_name, run in runs.items()
    ],
)


def images_for(config: TrainingFields) -> Tensor:
    return WIDE if getattr(config, "patch_size", None) else IMAGES


def replaced(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, **changes)


def train(kind: Kind, folder: Path, config: TrainingFields | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    config = kind.config if config is None else config
    images = options.pop("images", images_for(config))
    return kind.train(images, folder, config, **{"progress": False, **options})


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for kind in KINDS.values():
        for module, name in kind.pictures:
            patch.setattr(module, name, lambda *_: None)


@pytest.fixture
def saving_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """With save_every=0 a state at each step, however long writing takes."""
    monkeypatch.setattr(training, "_SAVING_SHARE", math.inf)


# -- a stop ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("saving_always")
@EVERY_RUN
def test_a_stopped_run_ends_with_the_same_weights_state_and_curves(kind, config, options, tmp_path):
    config = replaced(config, steps=6)
    done: list[int] = []
    whole, record = train(kind, tmp_path / "whole", config, **options)
    for step in (2, 5):
        with pytest.raises(Stop):
            train(kind, tmp_path / "part", config, save_every=0, on_step=stopping_after(step), **options)
        assert state_of(tmp_path / "part")[0]["step"] == step - 1
    again, record2 = train(kind, tmp_path / "part", config, on_step=lambda step, value: done.append(step), **options)
    assert done == [5, 6]
    assert same(weights(whole), weights(again))
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    (_, groups), (_, groups2) = state_of(tmp_path / "whole"), state_of(tmp_path / "part")
    assert groups.keys() == groups2.keys()
    assert all(same(groups[name], groups2[name]) for name in groups)
    for record_ in (record, record2):
        record_.pop("seconds"), record_.pop("peak_memory")
    assert record == record2
    assert record["steps"] == 6


@EVERY
def test_a_run_that_is_done_is_not_done_again(kind, tmp_path):
    first, _ = train(kind, tmp_path)
    before = files_in(tmp_path)
    again, record = train(kind, tmp_path, on_step=lambda *_: pytest.fail("It takes a step."))
    assert same(weights(first), weights(again))
    assert record["steps"] == 8
    assert files_in(tmp_path) == before


@EVERY
def test_a_longer_run_goes_on_from_a_shorter_one_and_says_so(kind, tmp_path):
    train(kind, tmp_path / "part", replaced(kind.config, steps=4))
    longer, record = train(kind, tmp_path / "part")
    whole, _ = train(kind, tmp_path / "whole")
    assert same(weights(longer), weights(whole))
    (warning,) = record["warnings"]
    assert re.match(r"the length was changed at step 4: planned .*steps=4.*, now .*steps=8", warning)
    with pytest.raises(TrainingError, match=r"has done 8 steps already\. Got 4"):
        train(kind, tmp_path / "part", replaced(kind.config, steps=4))


@EVERY
def test_held_out_images_change_no_weights(kind, tmp_path):
    config = replaced(kind.config, steps=4)
    without, _ = train(kind, tmp_path / "a", config)
    followed, _ = train(kind, tmp_path / "b", config, **{kind.held_out: HELD_OUT})
    assert same(weights(without), weights(followed))


@EVERY
def test_an_interrupt_between_steps_saves_the_step_it_reached(kind, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(kind, tmp_path / "part", on_step=stopping_after(5, KeyboardInterrupt))
    assert state_of(tmp_path / "part")[0]["step"] == 5
    whole, resumed = (train(kind, tmp_path / name)[0] for name in ("whole", "part"))
    assert same(weights(whole), weights(resumed))


@EVERY
def test_the_seed_decides_everything_and_torchs_generators_are_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("It seeds all GPUs."))
    config, options = list(kind.runs.values())[-1]
    before = torch.random.get_rng_state()
    first, again, other = (
        train(kind, tmp_path / name, replaced(config, steps=2, seed=seed), **options)[0]
        for name, seed in (("a", 0), ("b", 0), ("c", -1))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))
    built, built2 = kind.build(config), kind.build(replaced(config, seed=-1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not same(weights(built), weights(built2))


@EVERY
def test_a_state_of_the_first_version_goes_on(kind, tmp_path):
    """States that were written before all trainings had one loop, on another machine."""
    name = next(name for name, known in KINDS.items() if known is kind)
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    config = type(kind.config).from_dict(golden["config"])
    images = random_images(golden["images"], 8)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / STATE_FILE).write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())
    assert state_of(tmp_path / "old")[0]["step"] == 3
    resumed, record = train(kind, tmp_path / "old", config, images=images)
    whole, _ = train(kind, tmp_path / "new", config, images=images)
    moved = distance(weights(whole), weights(kind.build(config)))
    assert distance(weights(resumed), weights(whole)) < 1e-2 * moved  # CPUs differ in the last bits
    assert (record["steps"], record["warnings"]) == (6, [])
    assert [row["step"] for row in rows(tmp_path / "old")] == [str(step) for step in range(1, 7)]


# -- kills, and disks that are full ------------------------------------------------------------------


def in_a_process(folder: Path, config: TrainingFields, options: dict[str, Any]) -> None:
    """In a child: a run that saves a state at each step; then its weights beside it."""
    training._SAVING_SHARE = math.inf
    denoiser_task.write_picture = denoiser_task.write_samples = lambda *_: None  # type: ignore[assignment]
    denoiser, _ = train_denoiser(WIDE, folder, config, save_every=0.0, progress=False, **options)  # type: ignore[arg-type]
    torch.save(weights(denoiser), folder / "weights.pt")


def weights_in(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


KILLED = {"validation": random_images(1, 12, seed=1), "validate_every": 8, "micro_batch": 3}


def test_a_run_killed_while_it_saves_goes_on(tmp_path):
    """Before a state is written, and between its writing and its renaming."""
    folder, config, options = tmp_path / "killed", replaced(SIGMA, steps=6), {"validation": HELD_OUT[:1]}
    for place, call in (("purifyloader.train.state:save_file", 2), ("os:replace", 3), ("os:replace", 8)):
        done = processes.run(in_a_process, folder, config, options, kill_at=place, kill_call=call)
        assert done.returncode == -9, done.stderr
        if (folder / STATE_FILE).exists():
            assert state_of(folder)[0]["step"] < config.steps
    assert (folder / STATE_FILE).exists()
    assert list(folder.glob(f".{STATE_FILE}.*.tmp"))
    state.tidy(folder, [STATE_FILE])
    assert not list(folder.glob(f".{STATE_FILE}.*.tmp"))
    done = processes.run(in_a_process, folder, config, options)
    assert done.returncode == 0, done.stderr
    whole, _ = train(KINDS["denoiser"], tmp_path / "whole", config, images=WIDE, **options)
    assert same(weights_in(folder / "weights.pt"), weights(whole))
    assert rows(folder) == rows(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_is_killed_thirty_times(tmp_path):
    config = replaced(ALL, steps=600)
    rng = random.Random(time.time())
    path = tmp_path / "killed" / STATE_FILE
    kills = 0
    while kills < 30:
        before = path.stat().st_ino if path.exists() else None
        child = processes.start(in_a_process, tmp_path / "killed", config, KILLED)
        while child.poll() is None and (not path.exists() or path.stat().st_ino == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
        if child.kill().returncode != -9:
            break
        kills += 1
        assert state_of(tmp_path / "killed")[0]["step"] <= config.steps
    assert kills, "It has ended before it could be killed."
    for name in ("killed", "whole"):
        assert processes.run(in_a_process, tmp_path / name, config, KILLED).returncode == 0
    assert same(*(weights_in(tmp_path / name / "weights.pt") for name in ("killed", "whole")))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@EVERY
@pytest.mark.parametrize("place", ["save_file", "replacing"])
def test_a_full_disk_is_an_error_that_keeps_the_state_before(kind, place, tmp_path):
    config = replaced(kind.config, steps=4)
    train(kind, tmp_path, replaced(config, steps=2))
    before = (tmp_path / STATE_FILE).read_bytes()

    def full(target: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, place, full)
        with pytest.raises(TrainingError, match=r"(?s)Could not write .*No space left.*make room"):
            train(kind, tmp_path, config)
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    assert same(weights(train(kind, tmp_path, config)[0]), weights(train(kind, tmp_path / "whole", config)[0]))


# -- several processes -------------------------------------------------------------------------------


def as_rank(rank: int, port: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a child: `work` as one of two processes that are joined; its result, or the error's type and text."""
    torch.set_num_threads(1)
    draw_nothing(pytest.MonkeyPatch())
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=_LIMIT
    )
    try:
        return work(*arguments)
    except PurifyError as error:
        return type(error).__name__, str(error)
    finally:
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


_LIMIT = torch.distributed.constants.default_pg_timeout


def start_ranks(work: Callable[..., Any], *arguments: Any) -> list[processes.Child]:
    port = free_port()
    return [processes.start(as_rank, rank, port, work, *arguments) for rank in range(2)]


def joined(name: str, folder: Path, config: TrainingFields, options: dict[str, Any]) -> dict[str, Any]:
    """In a child: a run whose weights each process writes."""
    model, record = train(KINDS[name], folder, config, **options)
    torch.save(weights(model), folder.with_name(f"weights-{torch.distributed.get_rank()}.pt"))
    return record


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_give_the_weights_of_one(name, tmp_path):
    kind = KINDS[name]
    config, options = kind.in_ranks
    children = start_ranks(joined, name, tmp_path / "two", config, options)
    whole, record = train(kind, tmp_path / "one", config, **options)
    records = [child.wait(100).value for child in children]
    first, second = (weights_in(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert distance(first, weights(whole)) < 1e-2 * distance(weights(whole), weights(kind.build(config)))
    assert [r["processes"] for r in records] == [2, 2]
    assert record["processes"] == 1
    assert len(rows(tmp_path / "two")) == len(rows(tmp_path / "one"))
    one, two = (state_of(tmp_path / name)[1] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.get("bank", {}).items():
        torch.testing.assert_close(two["bank"][key], value, rtol=0, atol=1e-4)


def broken_rank(folder: Path) -> None:
    """In a child: the samples of one process alone run away."""
    if torch.distributed.get_rank() == 1:

        def fails(*_: Any) -> Any:
            raise PurifyError("of this process alone")

        energy_task._walked = fails  # type: ignore[assignment]
    train(KINDS["energy"], folder)


def test_what_breaks_in_one_process_stops_all_and_all_say_what(tmp_path):
    first, second = (child.wait(100).value for child in start_ranks(broken_rank, tmp_path / "run"))
    for error, message in (first, second):
        assert error == "TrainingError"
        assert "at step 1." in message
    assert first[1].startswith("The run broke in another process")
    assert second[1].startswith("The samples ran away (of this process alone)")


def test_the_death_of_one_process_stops_the_other_and_both_go_on(tmp_path):
    config = replaced(SIGMA, steps=3000)
    path = tmp_path / "run" / STATE_FILE
    children = start_ranks(joined, "denoiser", tmp_path / "run", config, {"save_every": 0.0})
    deadline = time.monotonic() + 60
    while not path.exists() and all(c.poll() is None for c in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children[1].kill().returncode == -9
    assert children[0].wait(60).returncode != 0
    done = state_of(tmp_path / "run")[0]["step"]
    assert 0 < done < 3000
    config = replaced(config, steps=done + 3)
    for child in start_ranks(joined, "denoiser", tmp_path / "run", config, {}):
        ended = child.wait(100)
        assert ended.returncode == 0, ended.stderr
    whole, _ = train(KINDS["denoiser"], tmp_path / "whole", config)
    assert distance(weights_in(tmp_path / "weights-0.pt"), weights(whole)) < 0.2 * config.learning_rate


def test_a_batch_that_the_processes_cannot_share_is_refused():
    assert Ranks(1, 2).own(6) == slice(3, 6)
    with pytest.raises(ConfigError, match=r"multiple of the number of processes, 2, which share each batch\. Got 5"):
        Ranks(0, 2).own(5)


# -- runs that break ---------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("held_out", [False, True])
def test_a_run_that_explodes_says_so_and_saves_nothing(kind, held_out, tmp_path):
    options = {kind.held_out: HELD_OUT} if held_out else {}
    with pytest.raises(TrainingError, match=r" at step \d+\. Lower the learning rate, ") as caught:
        train(kind, tmp_path, replaced(kind.config, steps=30, **kind.exploding), **options)
    assert "start again with another output folder" in str(caught.value)
    assert "is kept" not in str(caught.value)
    assert not (tmp_path / STATE_FILE).exists()


@pytest.mark.usefixtures("saving_always")
@EVERY
@pytest.mark.parametrize("save_every", [0, math.inf])
def test_an_interrupt_of_a_run_that_breaks_keeps_the_last_good_state(kind, save_every, tmp_path, monkeypatch, caplog):
    train(kind, tmp_path, replaced(kind.config, steps=3))
    before = (tmp_path / STATE_FILE).read_bytes()
    kind.made_suspicious(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(kind, tmp_path, save_every=save_every, on_step=stopping_after(7, KeyboardInterrupt))
    assert (tmp_path / STATE_FILE).read_bytes() == before
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(f"step {3 if save_every == 0 else 7} is not saved")  # said once


@pytest.mark.usefixtures("saving_always")
@EVERY
def test_a_run_that_is_stopped_keeps_a_state_that_becomes_a_model(kind, tmp_path, monkeypatch):
    """As its message promises."""

    def broken(self: Any, step: int) -> str | None:
        return "The means are bad" if step == 5 else None

    monkeypatch.setattr(type_of_watch(kind, tmp_path / "other"), "broken", broken)
    with pytest.raises(TrainingError, match=r"^The means are bad at step 6\. The last good state is kept") as caught:
        train(kind, tmp_path / "run", save_every=0)
    step = state_of(tmp_path / "run")[0]["step"]
    assert step == 4
    assert f"training with steps={step} makes a checkpoint of it" in str(caught.value)
    kept, record = train(kind, tmp_path / "run", replaced(kind.config, steps=step))
    assert record["steps"] == step
    assert same(weights(kept), state_of(tmp_path / "run")[1]["average"])


def type_of_watch(kind: Kind, folder: Path) -> type:
    """The class of its watch, from a task that takes no step."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "finish", lambda self: (seen.append(self.task), ({}, {}))[1])
        with contextlib.suppress(AttributeError):  # of what is no model
            train(kind, folder)
    return type(seen[0].watch)


# -- what is refused ---------------------------------------------------------------------------------


@EVERY
def test_another_run_in_the_folder_is_refused(kind, tmp_path):
    train(kind, tmp_path, replaced(kind.config, steps=1))
    before = files_in(tmp_path)
    network = replaced(kind.config.network, channels=2 * kind.config.network.channels)
    changes = [("learning_rate", 1e-4), ("seed", 1), kind.other, ("network", network)]
    for name, value in changes:
        with pytest.raises(TrainingError, match=f"another {name}.*Got"):
            train(kind, tmp_path, replaced(kind.config, **{name: value}))
    for images in (random_images(10, 8, seed=9), IMAGES[:5]):
        with pytest.raises(TrainingError, match="another set of images"):
            train(kind, tmp_path, images=images)
    assert files_in(tmp_path) == before


@EVERY
@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_a_damaged_state_is_named(kind, keep, tmp_path):
    train(kind, tmp_path, replaced(kind.config, steps=1))
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"training-state\.safetensors is not a whole"):
        train(kind, tmp_path)


@EVERY
@pytest.mark.parametrize(
    "images",
    [torch.zeros(4, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)],
)
def test_bad_images_are_refused(kind, images, tmp_path):
    for options in ({"images": images}, {kind.held_out: images}):
        with pytest.raises(InputError, match=r"uint8 images \(N, C, H, W\), at least one.* Got "):
            train(kind, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@EVERY
def test_channels_must_fit(kind, tmp_path):
    grey = IMAGES[:, :1]
    with pytest.raises(ConfigError, match="takes 3 channels but the images have 1"):
        train(kind, tmp_path / "a", images=grey)
    with pytest.raises(InputError, match=r"channels of those trained on, 3\. Got 1"):
        train(kind, tmp_path / "b", **{kind.held_out: grey})
    config = replaced(kind.config, steps=1, network=replaced(kind.config.network, image_channels=1))
    assert train(kind, tmp_path / "c", config, images=grey, **{kind.held_out: grey})[1]["steps"] == 1


@EVERY
@pytest.mark.parametrize("options", [{"device": "no such device"}, {"save_every": -1}, {"save_every": math.nan}])
def test_bad_options_are_refused_before_the_first_step(kind, options, tmp_path):
    with pytest.raises(PurifyError, match="Got"):
        train(kind, tmp_path, on_step=lambda *_: pytest.fail("It takes a step."), **options)


@EVERY
def test_the_model_to_start_from_must_be_the_one_that_is_named(kind, tmp_path):
    start, other = kind.build(kind.config), kind.build(replaced(kind.config, seed=1))
    config = started_from(replaced(kind.config, seed=2, steps=1), start)
    assert same(weights(kind.build(config, start=start)), weights(start))
    for wanted, given in ((config, None), (config, other), (kind.config, start)):
        with pytest.raises(ConfigError, match=r"starts from .*Got"):
            kind.build(wanted, start=given)
    wider = replaced(config, network=replaced(kind.config.network, channels=16))
    with pytest.raises(ConfigError, match=r"of the same shape"):
        kind.build(wider, start=start)
    before = weights(start)
    trained, _ = train(kind, tmp_path, config, start=start)
    assert same(weights(start), before)  # left alone
    assert not same(weights(trained), before)


# -- configurations, and their cost ------------------------------------------------------------------

STRANGE = [None, True, 3, -1, 0, 2.5, 1e400, math.nan, "x", [], [1], ["x"], [[1]], {}, {"x": 1}, 10**30]


@EVERY_RUN
def test_a_configuration_survives_json(kind, config, options):
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = type(config).from_dict(values)
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert values.keys() == {f.name for f in dataclasses.fields(config)} - set(config.later_fields)
    assert set(config.identity()) | set(config.length()) | {"compile"} == set(values)
    assert type(config).from_dict({"steps": 7}, config) == replaced(config, steps=7)


@EVERY
def test_any_value_of_a_field_is_taken_or_refused(kind):
    for field in dataclasses.fields(kind.config):
        for value in STRANGE:
            with contextlib.suppress(ConfigError):
                config = type(kind.config).from_dict({field.name: value}, kind.config)
                json.dumps(config.to_dict(), allow_nan=False)
    with pytest.raises(ConfigError, match=r"Known fields of \w+: .*Got nonsense"):
        type(kind.config).from_dict({"nonsense": 1})


BAD = {
    "steps": [0, -5, 2.5, "x", True, None],
    "batch_size": [0, 2.5, "x", True],
    "warmup": [-1, 2.5, "x", True],
    "learning_rate": [0.0, -1e-4, math.nan, math.inf, "x", True, None],
    "ema_decay": [1.0, -0.1, math.nan, "x", True],
    "dtype": ["float16", None, ["float32"]],
    "compile": [0, 1, 1.0, "yes", None],
    "seed": [0.5, "x", True, None, 2**63],
    "network": ["big", 3, None],
    "start_from": ["cifar10-sparse", {"name": "cifar10-sparse"}, ["cifar10-sparse", "ab"]],
}


@EVERY
def test_bad_values_of_the_fields_that_all_have_are_refused(kind):
    for name, values in BAD.items():
        for value in values:
            with pytest.raises(ConfigError, match=f"(?s)^{name} .*Got"):
                type(kind.config).from_dict({name: value}, kind.config)


@EVERY
def test_the_cost_of_a_run_is_measured_and_nothing_is_left(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = replaced(kind.config, steps=1)
    measured = plan.measure(kind.build, kind.train, IMAGES, config)
    assert measured["parameters"] == sum(p.numel() for p in kind.build(config).parameters())
    assert measured["timed_steps"] == 5
    assert measured["state_bytes"] >= 4 * measured["model_bytes"]
    assert 0 < measured["seconds_per_step"] < 5
    assert measured["seconds"] == pytest.approx(measured["seconds_per_step"], abs=0.1)
    assert not list(tmp_path.iterdir())
