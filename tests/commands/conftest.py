"""Tests of commands write blank figures, except fixtures of a module and tests that use the fixture `drawn`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

# What draws -> the files that it writes to the folder that it is given last; none where it is given the file.
DRAWING: dict[str, list[str]] = {
    "purifyloader.certify.output.curves": [],
    "purifyloader.train.denoiser.task.write_picture": ["curves.png"],
    "purifyloader.train.denoiser.task.write_samples": ["samples.png"],
    "purifyloader.train.energy.task.write_pictures": ["bank.png", "curves.png"],
}


@pytest.fixture
def drawn() -> None:
    """Draw figures in this test."""


@pytest.fixture(autouse=True)
def _blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("blank_figures")
        draw_nothing(monkeypatch)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Write blank pictures without a figure: to lay one out takes longer than a tiny training."""
    for function, names in DRAWING.items():

        def blank(*arguments: Any, names: list[str] = names) -> None:
            for path in [Path(arguments[-1]) / name for name in names] or [arguments[-1]]:
                Image.new("RGB", (4, 4)).save(path, format="png")

        patch.setattr(function, blank)


def undrawn(main: Any, *command: object) -> int:
    """In a child: a command that draws nothing, for which it would import matplotlib first."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return int(main(list(map(str, command))))
