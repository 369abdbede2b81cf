"""Tests of commands write blank figures, except fixtures of a module and tests that use the fixture `drawn`."""

from __future__ import annotations

import pytest


@pytest.fixture
def drawn() -> None:
    """Draw figures in this test."""


@pytest.fixture(autouse=True)
def _blank(request: pytest.FixtureRequest) -> None:
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("blank_figures")
