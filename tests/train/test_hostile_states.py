"""Training states of others that declare, or hold, what no run writes: one error that names the file."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from purifyloader.errors import PurifyError
from purifyloader.train import run as training
from purifyloader.train import train_denoiser
from purifyloader.train.energy import train_energy
from purifyloader.train.state import STATE_FILE, Groups, save_state
from tests.fuzz.guard import limits
from tests.train.tiny import IMAGES, PAIRED, SIGMA, Stop, files_in, state_of, stopping_after

TRAININGS: dict[str, Callable[..., Any]] = {
    "denoiser": lambda at, **options: train_denoiser(IMAGES, at, SIGMA, progress=False, **options),
    "energy": lambda at, **options: train_energy(IMAGES, at, PAIRED, progress=False, **options),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_pictures(monkeypatch)


def _no_pictures(patch: pytest.MonkeyPatch) -> None:
    for place in ("denoiser.task.write_picture", "denoiser.task.write_samples", "energy.task.write_pictures"):
        patch.setattr(f"purifyloader.train.{place}", lambda *_: None)


class State(NamedTuple):
    header: dict[str, Any]
    groups: Groups


@functools.cache
def _saved(kind: str) -> State:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        _no_pictures(patch)
        patch.setattr(training, "_SAVING_SHARE", float("inf"))  # a state at each step
        with pytest.raises(Stop):
            TRAININGS[kind](folder, save_every=0, on_step=stopping_after(4))
        return State(*state_of(Path(folder)))


def saved(kind: str) -> State:
    return copy.deepcopy(_saved(kind))


@functools.cache
def _task(kind: str) -> training.Task[Any]:
    """A training that has not begun; a state that is refused changes nothing in it."""
    tasks: list[training.Task[Any]] = []

    def taken(task: training.Task[Any], *_: Any, **options: Any) -> Any:
        tasks.append(task)
        raise Stop

    options = {"validation": IMAGES[:2]} if kind == "denoiser" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"purifyloader.train.{kind}.task.train", taken)
        with pytest.raises(Stop):
            TRAININGS[kind](".", **options)
    return tasks[0]


def refused(kind: str, state: State, folder: Path) -> str:
    """Go on from a state; return the one error, which changes nothing."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    save_state(folder / STATE_FILE, state.header, state.groups)
    before = files_in(folder)
    with limits(folder), pytest.raises(PurifyError, match=r"training-state\.safetensors") as caught:
        training.train(_task(kind), folder, progress=False)
    assert files_in(folder) == before
    return str(caught.value)


@pytest.mark.parametrize("kind", TRAININGS)
def test_the_state_itself_goes_on(kind: str, tmp_path: Path) -> None:
    state = saved(kind)
    assert state.header["curves"]
    save_state(tmp_path / STATE_FILE, state.header, state.groups)
    _, record = TRAININGS[kind](tmp_path)
    assert record["steps"] == 8


HEADERS: dict[str, list[Any]] = {
    "step": [-1, 9, 10**12, 2.0, "3", None, True, [3]],
    "plan": [{}, [], None, "8", {"steps": 2}, {"steps": "8"}, {"steps": 8, "warmup": -1}, {"steps": 8, "x": {}}],
    "seconds": [-1, 1e30, "1", None, True],
    "warnings": ["text", [3], None, {"a": 1}, [["a"]]],
    "curves": [
        *(None, {}, "x", [3], [[]], [{}], [{"step": "1"}], [{"step": 10**9}], [{"step": -2}], [{"step": 1.5}]),
        *([{"step": 2}, {"step": 1}], [{"step": 1}, {"step": 1}], [{"step": 1, "loss": "0.5"}]),
        *([{"step": 1, "no such column": 1}], [{"step": 1, "x_1e9999zpx": 1}], [{"step": 1, "learning_rate": [1]}]),
    ],
    "identity": [None, {}, [], {"config": {}}, {"config": [], "images_sha256": "0", "count": 10}],
}
WATCHED: dict[str, tuple[str, list[Any]]] = {
    "denoiser": ("lowest_loss", ["1", [1], True, {"a": 1}]),
    "energy": ("watch", [None, [], "x", 3, {"difference": "1"}, {"other": 1.0}, {"drift": None}, {"spread": [1]}]),
}


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("field", HEADERS)
def test_a_header_that_no_run_writes(kind: str, field: str, tmp_path: Path) -> None:
    for value in HEADERS[field]:
        state = saved(kind)
        state.header[field] = value
        refused(kind, state, tmp_path)
    del state.header[field]
    refused(kind, state, tmp_path)


@pytest.mark.parametrize("kind", TRAININGS)
def test_what_was_watched(kind: str, tmp_path: Path) -> None:
    field, values = WATCHED[kind]
    for value in values:
        state = saved(kind)
        state.header[field] = value
        refused(kind, state, tmp_path)


ROWS: dict[str, dict[str, Any]] = {
    "denoiser": {"step": 3, "held_out_10px": 30.0},  # without the other levels
    "energy": {"step": 3, "difference": 1.0, "spread": 1.0},
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_row_that_cannot_be_drawn(kind: str, tmp_path: Path) -> None:
    state = saved(kind)
    state.header["curves"] = [ROWS[kind]]
    refused(kind, state, tmp_path)


Change = Callable[[Groups, str, str], object]


def _set(groups: Groups, group: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    groups[group][name] = change(groups[group][name])


TENSORS: dict[str, Change] = {
    "a missing one": lambda groups, group, name: groups[group].pop(name),
    "a missing group": lambda groups, group, name: groups.pop(group),
    "one more": lambda groups, group, name: groups[group].update(more=torch.ones(2)),
    "a group more": lambda groups, group, name: groups.update(more={"a": torch.ones(2)}),
    "a flat one": lambda groups, group, name: _set(groups, group, name, lambda t: t.flatten()[:-1].clone()),
    "one that broadcasts": lambda groups, group, name: _set(groups, group, name, lambda t: t.flatten()[:1].clone()),
    "an empty one": lambda groups, group, name: _set(groups, group, name, lambda t: t[:0].clone()),
    "NaN": lambda groups, group, name: groups[group][name].flatten()[:1].fill_(float("nan")),
    "infinity": lambda groups, group, name: groups[group][name].flatten()[:1].fill_(float("-inf")),
    "float64": lambda groups, group, name: _set(groups, group, name, torch.Tensor.double),
    "bfloat16": lambda groups, group, name: _set(groups, group, name, torch.Tensor.bfloat16),
    "integers": lambda groups, group, name: _set(groups, group, name, torch.Tensor.long),
    "booleans": lambda groups, group, name: _set(groups, group, name, torch.Tensor.bool),
}
GROUPS = {"denoiser": ["model", "average", "exp_avg", "exp_avg_sq"]}
GROUPS["energy"] = [*GROUPS["denoiser"], "bank"]


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("change", TENSORS)
def test_tensors_of_another_network(kind: str, change: str, tmp_path: Path) -> None:
    for group in GROUPS[kind]:
        state = saved(kind)
        name = next(name for name, tensor in state.groups[group].items() if tensor.ndim > 1)
        TENSORS[change](state.groups, group, name)
        message = refused(kind, state, tmp_path)
        assert group in message or "more" in message


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_mean_of_squares_is_not_negative(kind: str, tmp_path: Path) -> None:
    state = saved(kind)
    next(iter(state.groups["exp_avg_sq"].values())).flatten()[:1].fill_(-1)
    refused(kind, state, tmp_path)
