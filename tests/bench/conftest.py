"""The bench's tests draw no pictures, except fixtures of a module and tests that use the fixture `drawn`."""

from __future__ import annotations

from pathlib import Path

import pytest

from purifyloader.datasets.splits import Data, load


@pytest.fixture(scope="session")
def sample() -> Data:
    """The sample of CIFAR-10 that ships, which takes a second to read; tests leave it as it is."""
    return load("sample", Path(__file__).parents[2] / "examples" / "data")


@pytest.fixture
def drawn() -> None:
    """Draw pictures in this test."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch) -> None:
    if "drawn" not in request.fixturenames:
        for name in ("accuracies", "costs", "noise", "images"):
            monkeypatch.setattr(f"purifyloader.bench.pictures.{name}", lambda *_: None)
