"""Every public function and class has an example in its docstring, which runs as it stands there."""

from __future__ import annotations

import doctest
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest

from tests.public import PUBLIC

# Names that have no example yet.
WITHOUT: set[str] = {
    "purifyloader:PurifiedLoader",
    "purifyloader.cache:CacheReader",
    "purifyloader.cache:CacheWriter",
    "purifyloader.cache:Layout",
    "purifyloader.cache:Shard",
    "purifyloader.cache:fingerprint",
    "purifyloader.cache:source_hashes",
    "purifyloader.train:TrainConfig",
    "purifyloader.train:recipe",
    "purifyloader.train:started_from",
    "purifyloader.train:train_denoiser",
    "purifyloader.datasets.named:ImageFiles",
    "purifyloader.datasets.named:TarDataset",
    "purifyloader.datasets.named:open_dataset",
    "purifyloader.datasets.named:read_image",
    "purifyloader.transforms:Compensate",
    "purifyloader.transforms:Purify",
    "purifyloader.transforms:RandomCompensate",
    "purifyloader.transforms:RandomPurify",
    "purifyloader.transforms:RandomSqueeze",
    "purifyloader.transforms:Squeeze",
    "purifyloader.transforms.webdataset:compensated",
    "purifyloader.transforms.webdataset:purified",
    "purifyloader.transforms.functional:bit_depth",
    "purifyloader.transforms.functional:coin",
    "purifyloader.transforms.functional:compensate",
    "purifyloader.transforms.functional:grayscale",
    "purifyloader.transforms.functional:jpeg",
    "purifyloader.certify:Predictor",
    "purifyloader.certify:Train",
    "purifyloader.train.energy:EnergyTrainConfig",
    "purifyloader.train.energy:energy_recipe",
    "purifyloader.train.energy:train_energy",
}

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def entry_points() -> dict[str, Any]:
    """Map "module:name" to each public function and class once, by the first module that lists it; no exceptions."""
    found: dict[str, Any] = {}
    for module, names in PUBLIC.items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            is_exception = isinstance(value, type) and issubclass(value, Exception)
            known = any(value is other for other in found.values())
            if callable(value) and not (isinstance(value, ModuleType) or is_exception or known):
                found[f"{module}:{name}"] = value
    return found


ENTRY_POINTS = entry_points()


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_an_entry_point_has_an_example_that_runs(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(ENTRY_POINTS[entry]) or ""
    examples = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, entry, None, 0)
    if entry in WITHOUT and not examples.examples:
        return
    assert examples.examples, f"the docstring of {entry} needs an example: lines that begin with >>>"
    output: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(examples, out=output.append)
    assert results.failed == 0, "".join(output)


def test_the_list_of_those_without_has_no_stray_names():
    assert ENTRY_POINTS.keys() >= WITHOUT
