"""What a stranger installs and imports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import purifyloader
from purifyloader import pretrained
from purifyloader.commands import main as cli
from purifyloader.energy import EnergyConfig, EnergyNetwork
from tests import processes
from tests.conftest import tiny_denoiser
from tests.public import PUBLIC

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    """A name that leaves this list leaves somebody's script broken: deprecate it first."""
    import importlib

    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == PUBLIC[module]
    for name in PUBLIC[module]:
        assert getattr(loaded, name) is not None


def test_importing_the_package_is_cheap():
    code = "import sys, purifyloader; print('torch' in sys.modules, purifyloader.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.split() == ["False", purifyloader.__version__]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Purify'"):
        purifyloader.Purify  # noqa: B018


def test_the_wheel_holds_every_file(tmp_path):
    """setuptools' package-dir mapping drops folders silently when a package is not listed."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    listed = [Path(f) for f in files.stdout.splitlines() if (ROOT / f).exists()]
    copy = tmp_path / "copy"  # for setuptools writes beside the sources
    for file in listed:
        target = copy / file
        if file.parts[0] not in ("examples", "tests"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target, follow_symlinks=False)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = processes.run(processes.Code(code), tmp_path, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    # the pictures of a card stay in the repository
    listed = [f for f in listed if not (f.parts[0] == "pretrained" and f.suffix in (".png", ".csv"))]
    expected = {
        str(f) if f.parts[0] == "purifyloader" else f"purifyloader/{f}"
        for f in listed
        if f.parts[0] in ("purifyloader", "transforms", "pretrained") and not (ROOT / f).is_symlink()
    }
    assert names == expected
    assert "purifyloader/py.typed" in names
    for model in pretrained.available():
        assert f"purifyloader/pretrained/{model}/model.safetensors" in names


def test_the_command(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == pretrained.available()
    for line in lines:
        assert re.fullmatch(r"\S+ +\d+\.\d\d M parameters, (an energy model|for noise from [\d.]+ to \d+ px)", line)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert purifyloader.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "denoiser", "--help"])
    assert caught.value.code == 0
    assert "--preset" in capsys.readouterr().out


def test_models_are_listed_beside_a_broken_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("purifyloader.pretrained.registry._SHIPPED", tmp_path)
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out == ""
    for name in ("a-cut", "b-edited", "d-good-with-a-name-too-long-for-its-column"):
        pretrained.save(tiny_denoiser(), tmp_path / name)
    pretrained.save(EnergyNetwork(EnergyConfig(4)), tmp_path / "c-energy")
    weights = tmp_path / "a-cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (tmp_path / "b-edited/config.json").write_text("{\n\n")
    assert cli.main(["models"]) == 0
    cut, edited, energy, good = capsys.readouterr().out.splitlines()
    assert cut.startswith("a-cut ")
    assert f"cannot be read: {weights}" in cut
    assert edited.startswith("b-edited ")
    assert "must be JSON" in edited
    assert re.fullmatch(r"c-energy +0\.00 M parameters, an energy model", energy)
    assert re.fullmatch(r"d-good-\S+ +0\.04 M parameters, for noise from \S+ to \S+ px", good)


def test_an_interrupted_command_says_so_in_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("purifyloader.pretrained.registry.available", interrupted)
    assert cli.main(["models"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "purifyloader: interrupted\n")


def test_the_installed_command_reports_errors_in_one_line():
    done = processes.run("purifyloader", "train", "denoiser", "--data", "nowhere", "--out", "unused")
    assert done.returncode == 2
    assert done.stderr.startswith("purifyloader: error: There is no dataset 'nowhere'. Give cifar10")
    assert done.stderr.count("\n") == 1
