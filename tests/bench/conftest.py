"""The bench's tests draw no pictures, except fixtures of a module and tests that use the fixture `drawn`.

Most of their victims are "tiny": a very narrow ResNet-9, and a training of three steps, which learns next to nothing.
The victim "narrow" learns plain classes from an extractor.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from purifyloader.commands.main import main
from purifyloader.datasets.splits import Data, load
from purifyloader.victims.presets import TRAININGS, VICTIMS, Training

DRAWN = ("accuracies", "costs", "noise", "images")


@pytest.fixture(scope="session")
def sample() -> Data:
    """The sample of CIFAR-10 that ships, which takes a second to read; tests leave it as it is."""
    return load("sample", Path(__file__).parents[2] / "examples" / "data")


@pytest.fixture
def drawn() -> None:
    """Draw pictures in this test."""


def leave_undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DRAWN:
        monkeypatch.setattr(f"purifyloader.bench.pictures.{name}", lambda *_: None)


def add_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the victims "tiny" and "narrow" and the training "tiny" to those of the bench."""
    monkeypatch.setitem(VICTIMS, "tiny", ("resnet9", (4,)))
    monkeypatch.setitem(VICTIMS, "narrow", ("resnet9", (8,)))
    monkeypatch.setitem(TRAININGS, "tiny", Training(3, 64, 0.2, 0.2))


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch) -> None:
    if "drawn" not in request.fixturenames:
        leave_undrawn(monkeypatch)


@pytest.fixture(autouse=True, scope="package")
def _tiny() -> Generator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_tiny(monkeypatch)
        yield


def bench_in_a_child(*words: str) -> None:
    """The command `purifyloader bench` in a child, with tiny victims and without pictures."""
    monkeypatch = pytest.MonkeyPatch()
    add_tiny(monkeypatch)
    leave_undrawn(monkeypatch)
    sys.exit(main(["bench", *words]))
