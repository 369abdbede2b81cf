"""Every public function and class has an example in its docstring, which runs as it stands there."""

from __future__ import annotations

import doctest
import importlib
import inspect
from typing import Any

import pytest

from tests.public import PUBLIC

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def entry_points() -> dict[str, Any]:
    """Map "module:name" to each public function and class once, by the first module that lists it.

    Exceptions, protocols and aliases of types are no entry points: nobody calls them.
    """
    found: dict[str, Any] = {}
    for module, names in PUBLIC.items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if isinstance(value, type):
                public = not issubclass(value, Exception) and not getattr(value, "_is_protocol", False)
            else:
                public = inspect.isfunction(value)
            if public and all(value is not other for other in found.values()):
                found[f"{module}:{name}"] = value
    return found


ENTRY_POINTS = entry_points()


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_an_entry_point_has_an_example_that_runs(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(ENTRY_POINTS[entry]) or ""
    examples = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, entry, None, 0)
    assert examples.examples, f"the docstring of {entry} needs an example: lines that begin with >>>"
    output: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(examples, out=output.append)
    assert results.failed == 0, "".join(output)
