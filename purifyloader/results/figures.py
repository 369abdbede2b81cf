"""Make a figure and write it as a PNG. matplotlib is an extra, imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from purifyloader.core.checks import as_path
from purifyloader.errors import PurifyError
from purifyloader.files.atomic import replacing, writing

__all__ = ["has_matplotlib", "new_figure", "save_figure"]


def has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(size: tuple[float, float], *, dpi: int = 110, **more: Any) -> Any:
    """Make a matplotlib `Figure` of a size in inches, which needs no display and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PurifyError(
            "A picture needs matplotlib. Got a Python without it: pip install 'purifyloader[plots]'."
        ) from None
    return Figure(figsize=size, dpi=dpi, **more)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as a PNG, whole or not at all, and return its path."""
    path = as_path(path)
    with writing(path), replacing(path) as temporary:
        # no version of matplotlib in the file: the same results are the same bytes
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
