"""What every versioned format satisfies. A new format adds a row to `FORMATS`.

Bytes, truncation and kills are tested beside each format: tests/cache, tests/contracts/test_model_kinds.py,
tests/contracts/test_trainings.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from purifyloader import recipes
from purifyloader.audit import compare as audit
from purifyloader.audit import pictures as audit_pictures
from purifyloader.cache import CacheReader, CacheWriter, Layout, tars
from purifyloader.cache import format as cache_format
from purifyloader.certify import report
from purifyloader.dynamics import measuring, tuning
from purifyloader.dynamics import pictures as dynamics_pictures
from purifyloader.errors import PurifyError
from purifyloader.evaluation import evaluating
from purifyloader.evaluation import pictures as evaluation_pictures
from purifyloader.files.atomic import canonical_json
from purifyloader.purified.sanitation import Sanitation
from purifyloader.purifiers import Jpeg
from purifyloader.results import rows

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Format:
    """One format: the field of its version, a whole value made in an empty folder, and its reader."""

    version: str
    make: Callable[[Path], dict[str, Any]]
    read: Callable[[Path, Any], Any]
    draws: bool = False  # its reader makes a picture, so a whole value is read by the tests of the picture


def write_cache(folder: Path) -> None:
    writer = CacheWriter(folder, {"purifier": "mine"}, Layout(length=2))
    for shard in writer.pending():
        writer.write(shard, np.zeros((2, 4, 4, 3), np.uint8))
    writer.finish()


def cache_index(folder: Path) -> dict[str, Any]:
    write_cache(folder)
    return json.loads((folder / cache_format.INDEX_FILE).read_text())


def read_index(folder: Path, values: Any) -> Any:
    values = cache_format.guarded(values) if isinstance(values, Mapping) else values
    (folder / cache_format.INDEX_FILE).write_text(canonical_json(values) + "\n")
    return CacheReader(folder)


def plan(folder: Path) -> dict[str, Any]:
    cache_format.write_plan(folder, cache_format.Plan({}, 2, "cpu", {"conditions": []}))
    return json.loads((folder / cache_format.PLAN_FILE).read_text())


def read_plan(folder: Path, values: Any) -> Any:
    values = cache_format.guarded(values) if isinstance(values, Mapping) else values
    (folder / cache_format.PLAN_FILE).write_text(canonical_json(values) + "\n")
    return cache_format.read_plan(folder)


def manifest(folder: Path) -> dict[str, Any]:
    write_cache(folder / "cache")
    tars.export_tars(CacheReader(folder / "cache"), folder / "tars")
    return json.loads((folder / "tars" / tars.MANIFEST).read_text())


def read_manifest(folder: Path, values: Any) -> Any:
    values = cache_format.guarded(values) if isinstance(values, Mapping) else values
    (folder / "tars" / tars.MANIFEST).write_text(canonical_json(values) + "\n")
    return tars.import_tars(folder / "tars", folder / "again")


def row(folder: Path) -> dict[str, Any]:
    committed = ROOT / "examples" / "bench" / "results" / "sample" / "rows.jsonl"
    return json.loads(committed.read_text().splitlines()[0])


def read_rows(folder: Path, values: Any) -> Any:
    (folder / "rows.jsonl").write_text(canonical_json(values) + "\n")
    return rows.read(folder / "rows.jsonl")


def certificates(folder: Path) -> dict[str, Any]:
    return json.loads((ROOT / "examples" / "certify" / "results" / "certificates.json").read_text())


def drawn(module: Any, picture: Callable[[Any, Path], None]) -> Format:
    """A format of figures, which names itself and is read to be drawn."""
    return Format(
        "version",
        lambda folder: {"format": module.FORMAT, "version": module.VERSION},
        lambda folder, values: picture(values, folder / "picture.png"),
        draws=True,
    )


FORMATS = {
    "cache index": Format("version", cache_index, read_index),
    "cache plan": Format("version", plan, read_plan),
    "tars' manifest": Format("version", manifest, read_manifest),
    "purifier": Format(
        "schema",
        lambda folder: json.loads(Jpeg(50).to_json()),
        lambda folder, values: recipes.from_json(json.dumps(values)),
    ),
    "sanitation": Format(
        "schema",
        lambda folder: Sanitation(images=3, suspects=(1,)).to_dict(),
        lambda folder, values: Sanitation.from_dict(values),
    ),
    "row of the bench": Format("schema", row, read_rows),
    "certificates": Format("schema", certificates, lambda folder, values: report.markdown(values)),
    "evaluation": drawn(evaluating, evaluation_pictures.picture),
    "dynamics": drawn(measuring, dynamics_pictures.picture),
    "tune": drawn(tuning, dynamics_pictures.picture),
    "audit": drawn(audit, audit_pictures.picture),
}

per_format = pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS)


@pytest.mark.parametrize("name", [name for name, case in FORMATS.items() if not case.draws])
def test_a_whole_one_is_read(name: str, tmp_path: Path) -> None:
    case = FORMATS[name]
    assert case.read(tmp_path, case.make(tmp_path)) is not None


@per_format
def test_another_version_is_refused_with_its_number(case: Format, tmp_path: Path) -> None:
    """Its meaning is unknown, so it is neither guessed at nor taken for damage and made anew."""
    values = case.make(tmp_path)
    values[case.version] += 41
    with pytest.raises(PurifyError, match=str(values[case.version])):
        case.read(tmp_path, values)


@per_format
@pytest.mark.parametrize("change", ["none", "text"])
def test_a_version_of_another_type_is_refused(case: Format, change: str, tmp_path: Path) -> None:
    values = case.make(tmp_path)
    values[case.version] = {"none": None, "text": str(values[case.version])}[change]
    with pytest.raises(PurifyError):
        case.read(tmp_path, values)


@per_format
@pytest.mark.parametrize("values", [[], {}, {"format": "another", "version": 1, "schema": 1}, 3], ids=str)
def test_what_is_of_no_format_is_refused(case: Format, values: Any, tmp_path: Path) -> None:
    case.make(tmp_path)
    with pytest.raises(PurifyError):
        case.read(tmp_path, values)


def test_formats_have_names_of_their_own() -> None:
    modules = (cache_format, tars, evaluating, measuring, tuning, audit)
    assert len({module.FORMAT for module in modules}) == len(modules)
