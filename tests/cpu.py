"""A pytest plugin that counts the CPU seconds of each test, lists the slowest and fails those over the limit.

Counted is what setting up and calling a test takes in this process, in the children it waited for, and in those of
`tests.processes`. Not counted, but listed: fixtures that several tests share (scope class or wider). Not counted
either: the first import of a module, which falls to whichever test needs it first; and tearing down.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

import pytest

from tests import processes

LIMIT = 5.0  # CPU seconds of a test that is not marked slow or gpu
ENFORCED = True  # whether a test over the limit fails
LISTED, LEAST = 20, 0.1  # tests in the list, and the seconds of the least of them

_CPU = "cpu_seconds"


def cpu() -> float:
    """Return the CPU seconds of this process and of the children that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + processes.cpu_seconds()


class ImportClock:
    """A finder of modules that finds nothing itself, and counts the CPU seconds in which others run new modules."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._finding = 0.0, 0, False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._finding:
            return None
        self._finding = True
        try:
            finders = [finder for finder in sys.meta_path if finder is not self]
            specs = (finder.find_spec(name, path, target) for finder in finders if hasattr(finder, "find_spec"))
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._finding = False
        if spec is not None and type(spec.loader) in (SourceFileLoader, ExtensionFileLoader):
            self._count(spec.loader)
        return spec

    def _count(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            self._depth += 1
            begun = time.process_time()
            try:
                execute(module)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.process_time() - begun

        loader.exec_module = exec_module


class Guard:
    """The plugin's state in one process: shared fixtures so far, and what is not counted for the current test."""

    def __init__(self) -> None:
        self.imports = ImportClock()
        self.shared: Counter[str] = Counter()
        self._begun = 0.0
        self._setting_up = False
        sys.meta_path.insert(0, self.imports)

    def counted(self) -> float:
        return cpu() - self.imports.seconds - self.shared.total()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._begun = self.counted()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function" or self._setting_up:
            return (yield)
        self._setting_up, begun = True, self.counted()
        try:
            return (yield)
        finally:
            self._setting_up = False
            self.shared[f"{fixturedef.baseid} fixture {fixturedef.argname}"] += self.counted() - begun

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        result = yield
        seconds = self.counted() - self._begun
        item.user_properties.append((_CPU, seconds))
        exempt = any(item.get_closest_marker(name) for name in ("slow", "gpu"))
        if ENFORCED and seconds > LIMIT and not exempt:
            pytest.fail(
                f"This test took {seconds:.1f} s of CPU, more than {LIMIT:.0f}. Make it cheaper (a smaller network, "
                "fewer steps, a fixture of the module, tests.processes), or mark it slow if a cheap one catches the "
                "same faults.",
                pytrace=False,
            )
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # one of several processes of pytest-xdist
            output[_CPU] = (cpu(), self.imports.seconds, dict(self.shared))


class Summary:
    """Gathers what every process of the tests counted, and prints it at the end."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._others: list[tuple[float, float, dict[str, float]]] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if _CPU in (output := getattr(node, "workeroutput", {})):
            self._others.append(output[_CPU])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        entries: Counter[str] = Counter()
        for reports in terminalreporter.stats.values():
            for report in reports:
                if getattr(report, "when", None) == "call":
                    entries[report.nodeid] = dict(report.user_properties).get(_CPU, 0.0)
        tests = entries.total()
        guard = self._guard
        total, imports, shared = cpu(), guard.imports.seconds, Counter(guard.shared)
        if self._others:  # which ended, so that `cpu` counts them among the children; their own servers are running
            total = resource.getrusage(resource.RUSAGE_SELF).ru_utime + sum(other[0] for other in self._others)
        for _, other_imports, other_shared in self._others:
            imports += other_imports
            shared.update(other_shared)
        terminalreporter.section(f"{LISTED} slowest by CPU seconds")
        for name, seconds in (entries + shared).most_common(LISTED):
            if seconds >= LEAST:
                terminalreporter.line(f"{seconds:7.2f}  {name}")
        terminalreporter.line(
            f"CPU: {total:.0f} s, of which tests {tests:.0f}, shared fixtures {shared.total():.0f}, "
            f"imports {imports:.0f}, {len(self._others) or 1} process(es)"
        )


def pytest_configure(config: pytest.Config) -> None:
    guard = Guard()
    config.pluginmanager.register(guard, "cpu-guard")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(guard), "cpu-summary")
