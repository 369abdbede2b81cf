"""The guard of the tests' CPU seconds counts a test's own work and that of its children, and nothing else."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests import processes

SUITE = """
    import subprocess, sys, time
    import pytest
    from tests import cpu

    cpu.ENFORCED, cpu.LIMIT = True, 0.1

    def work(seconds=0.2):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    @pytest.fixture(scope="module")
    def shared():
        work()

    @pytest.fixture
    def own():
        work()

    def test_call():
        work()

    def test_setup(own):
        pass

    def test_child():
        subprocess.run([sys.executable, "-S", "-c", "for _ in range(10**7): pass"], check=True)

    def test_shared(shared):
        pass

    def test_import():
        import heavy

    def test_sleep():
        time.sleep(0.2)

    @pytest.mark.slow
    def test_slow():
        work()
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(textwrap.dedent(SUITE))
    (folder / "heavy.py").write_text(
        "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: exempt\n")
    return processes.run("pytest", "-p", "tests.cpu", "-p", "no:cacheprovider", folder, cwd=folder).stdout


def test_a_test_over_the_limit_fails(output):
    failed = re.findall(r"^FAILED test_suite.py::(\w+) - .*This test took", output, re.MULTILINE)
    assert failed == ["test_call", "test_setup", "test_child"]
    assert "s of CPU, more than 0. Make it cheaper" in output
    assert "3 failed, 4 passed" in output


def test_the_slowest_are_listed_with_shared_fixtures(output):
    for name in ("test_suite.py::test_call", "test_suite.py fixture shared"):
        assert re.search(rf" 0\.[2-9]\d  {name}\n", output)
    assert re.search(r"CPU: \d+ s, of which tests [1-9], shared fixtures 0, imports \d", output)
    assert output.splitlines()[-1].startswith("====")
