"""Write certificates to a folder: the figures as JSON, a page and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purifyloader.certify.pictures import curves
from purifyloader.certify.report import check_results, markdown
from purifyloader.files.atomic import canonical_json
from purifyloader.results.figures import has_matplotlib
from purifyloader.results.folder import Written, write_files

__all__ = ["PAGE_FILE", "PICTURE_FILE", "RESULTS_FILE", "write"]

RESULTS_FILE, PAGE_FILE, PICTURE_FILE = "certificates.json", "README.md", "certified.png"


def write(results: Mapping[str, Any], folder: str | Path, picture: bool = True) -> Written:
    """Write `purifyloader.certify.report.results`, a page and, with matplotlib, a picture; see `write_files`."""
    check_results(results)
    shown = PICTURE_FILE if picture and has_matplotlib() else None
    texts = {RESULTS_FILE: canonical_json(results) + "\n", PAGE_FILE: markdown(results, picture=shown)}
    draw = (lambda path: curves(results, path)) if picture else None
    return write_files(Path(folder), texts, PICTURE_FILE, draw)
