"""Heavy packages are imported where they are needed, and not by whoever imports the library."""

from __future__ import annotations

from tests import processes

MODULES = (
    *("purifyloader.evaluation", "purifyloader.audit", "purifyloader.dynamics"),
    *("purifyloader.certify.report", "purifyloader.certify.output"),
    *("purifyloader.bench.report", "purifyloader.bench.pictures"),
    *("purifyloader.commands.audit", "purifyloader.commands.tune", "purifyloader.commands.evaluate"),
)


def test_what_measures_imports_neither_matplotlib_nor_scipy():
    code = f"import sys, {', '.join(MODULES)}; print([m for m in ('matplotlib', 'scipy') if m in sys.modules])"
    done = processes.run(processes.Code(code))
    assert done.stdout.split() == ["[]"], done.stderr
