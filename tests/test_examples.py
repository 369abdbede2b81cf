"""The examples as a newcomer runs them: real processes, most of them on a few images in place of the sample."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import recipes
from purifyloader.datasets import splits
from purifyloader.victims import training
from tests import processes

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: object, warnings: str | None = "error") -> str:
    done = processes.run(ROOT / "examples" / script, *arguments, warnings=warnings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_few_images(script: str, *arguments: str) -> None:
    """In a child: a script in which nothing takes seconds.

    Its sample is 128 images of noise, purified as JPEG, and victims train in float32, for a CPU may emulate bfloat16.
    """
    path = ROOT / "examples" / script
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (128, 32, 32, 3), np.uint8), np.arange(128) % 10
    few = {"train": (images, labels), "test": (images[:20], labels[:20])}
    splits.load_sample = lambda folder, split: few[split]  # type: ignore[assignment]
    recipes.eclipse = lambda *_, **__: recipes.jpeg(50)  # type: ignore[assignment]
    training.train_victim = functools.partial(training.train_victim, bfloat16=False)  # type: ignore[assignment]
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def run_on_few(script: str, *arguments: object, warnings: str | None = "error") -> str:
    done = processes.run(on_few_images, script, *map(str, arguments), warnings=warnings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracies(text: str, row: str) -> list[float]:
    (line,) = [line for line in text.splitlines() if line.startswith(row + " ")]
    return [float(value) for value in re.findall(r"(\d+\.\d) \(", line)]


def test_quickstart_runs_on_a_few_images(tmp_path):
    picture = tmp_path / "quickstart.png"
    out = run_on_few("quickstart.py", "--images", 16, "--width", 4, "--epochs", 1, "--processes", 1, "--out", picture)
    for row in ("clean", "AR", "LSP"):
        assert len(accuracies(out, row)) == 5
    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or range(5000)) > 1000


def test_ablation_keeps_finished_cells(tmp_path):
    results = tmp_path / "ablation.json"
    results.write_text(json.dumps({"AR:none": {"accuracy": {"0": 12.5}}}))
    assert run_on_few("ablation.py", "--seeds", 1, "--cells", "AR:none", "--out", results) == ""
    assert json.loads(results.read_text())["AR:none"]["accuracy"] == {"0": 12.5}


def test_cuda_keeps_finished_cells(tmp_path):
    results = tmp_path / "cuda.json"
    known = {f"{data}:{way}": {"0": 50.0} for data in ("CUDA", "clean") for way in ("none", "coin", "blur")}
    results.write_text(json.dumps(known))
    assert run_on_few("against_cuda.py", "--seeds", 1, "--out", results) == ""
    assert json.loads(results.read_text()) == known


def test_fast_defence_keeps_finished_cells(tmp_path):
    results = tmp_path / "fast.json"
    known = {"cells": {"clean: cifar10-fast at 0.05, in every epoch": {"0": 50.0}}, "models": {}}
    results.write_text(json.dumps(known))
    words = ["--attacks", "clean", "--models", "cifar10-fast", "--sigma", 0.05, "--afresh", "--seeds", 0]
    assert run_on_few("fast_defence.py", *words, "--work", tmp_path / "work", "--out", results) == ""
    assert json.loads(results.read_text()) == known


@pytest.mark.parametrize("way", ["coin", "blur"])
def test_the_augmentations_against_cuda_are_drawn_anew(way):
    spec = importlib.util.spec_from_file_location("against_cuda", ROOT / "examples" / "against_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.transform("none", 0) is None
    change, x = module.transform(way, 0), torch.rand(8, 3, 16, 16)
    first, second = (change(x, torch.arange(8), epoch) for epoch in (0, 1))
    assert first.shape == x.shape
    assert not torch.equal(first, second)
    assert not torch.equal(first, x)


def test_cache_speed_compares_what_the_readme_shows(tmp_path):
    out = tmp_path / "speed.json"
    run_on_few("cache_speed.py", "--images", 100, "--turns", 1, "--out", out)
    results = json.loads(out.read_text())
    shown = json.loads((ROOT / "examples" / "results" / "cache_speed.json").read_text())
    for part in ("images_per_second", "ratios"):
        assert results[part].keys() == shown[part].keys()
        assert all(value > 0 for value in results[part].values())


INTEGRATIONS = [
    ("torchvision",),
    ("kornia",),
    ("webdataset",),
    ("accelerate",),
    ("lightning",),
    ("timm",),
    ("timm", "--prefetcher"),
    ("hf_datasets",),
    ("hf_datasets", "--loader"),
]


@pytest.mark.parametrize("words", INTEGRATIONS, ids=lambda words: " ".join(map(str, words)))
def test_integrations(words):
    """Other people's containers, each in a script of its own. What other libraries warn of fails nothing."""
    # timm's loader drops a batch that is not full, and one of 128 images takes seconds
    images, epochs = (128, 1) if words[0] == "timm" else (16, 2)
    run_script = run if words[0] in ("torchvision", "webdataset") else run_on_few
    script = f"integrations/{words[0]}_training.py"
    out = run_script(script, "--images", images, "--epochs", epochs, *words[1:], warnings=None)
    assert re.findall(r"epoch (\d): loss \d+\.\d+ -> \d+\.\d+ over 1 steps", out) == ["0", "1"][:epochs]


def test_integrations_are_all_tried():
    scripts = {path.name for path in (ROOT / "examples" / "integrations").glob("*_training.py")}
    assert scripts == {f"{words[0]}_training.py" for words in INTEGRATIONS}


@pytest.mark.slow
def test_quickstart_shows_what_the_readme_says(tmp_path):
    out = run("quickstart.py", "--out", tmp_path / "quickstart.png")
    clean, ar, lsp = (accuracies(out, row) for row in ("clean", "AR", "LSP"))
    none, _, compensated, purified, eclipse = range(5)
    assert ar[none] < clean[none] - 20
    assert lsp[none] < clean[none] - 20
    assert ar[purified] > ar[none] + 18, "purification undoes AR"
    assert lsp[compensated] > lsp[none] + 15, "compensation undoes LSP"
    assert min(ar[eclipse], lsp[eclipse]) > clean[none] - 12, "together they cover both"
