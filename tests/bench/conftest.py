"""The bench's tests draw no pictures, except fixtures of a module and tests that use the fixture `drawn`."""

from __future__ import annotations

import pytest


@pytest.fixture
def drawn() -> None:
    """Draw pictures in this test."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch) -> None:
    if "drawn" not in request.fixturenames:
        for name in ("accuracies", "costs", "noise", "images"):
            monkeypatch.setattr(f"purifyloader.bench.pictures.{name}", lambda *_: None)
