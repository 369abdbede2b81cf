"""`examples/denoiser_study.py`: each run changes one thing, no image is on both sides, and a stopped study goes on."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from purifyloader.datasets.select import choose
from purifyloader.diffusion.psnr import psnr
from purifyloader.diffusion.unet import UNetConfig
from tests.conftest import tiny_denoiser

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("denoiser_study", ROOT / "examples" / "denoiser_study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


study = load()


def images(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """Random, and smooth enough to differ from noise."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, size // 4, size // 4, generator=generator)
    return (255 * torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear")).to(torch.uint8)


def dataset(x: torch.Tensor) -> list[tuple[Image.Image, int]]:
    return [(Image.fromarray(a), i % 10) for i, a in enumerate(x.permute(0, 2, 3, 1).numpy())]


# -- one factor at a time ----------------------------------------------------------------------------


def test_each_run_differs_from_the_base_in_one_thing():
    runs = study.plan(["far"])
    base = study.configure(runs["base"], 1000).to_dict()
    noise = {"sigma_range", "sigma_center", "sigma_spread"}
    steps = {"steps", "warmup", "decay_steps"}
    for name, run in runs.items():
        config = study.configure(run, 1000).to_dict()
        changed = {key for key in base if config[key] != base[key]}
        data = (run.images != 2000) + (run.source != "cifar") + run.poisoned
        factors = bool(changed & noise) + bool(changed & steps) + len(changed - noise - steps) + data
        assert factors == (name != "base"), (name, changed)
        assert run.against in runs


def test_equal_epochs_take_a_fifth_of_the_steps():
    runs = study.plan()
    few, many = (study.configure(runs[name], 1000) for name in ("replicate-0-short", "replicate-4"))
    assert few.steps / (1 + few.replicate) == many.steps / (1 + many.replicate)


def test_noise_ranges_are_those_of_the_schedules():
    ranges = {name: run.changes for name, run in study.plan().items() if name.startswith("noise-")}
    assert [round(255 * s, 2) for s in ranges["noise-250"]["sigma_range"]] == [1.28, 121.5]
    full = ranges["noise-full"]
    # the logarithm of tan(u) for even u has the spread pi / 2, and its ends are cut off
    assert full["sigma_center"] == pytest.approx(0.5, rel=0.02)
    assert full["sigma_spread"] == pytest.approx(np.pi / 2, rel=0.05)


# -- the images --------------------------------------------------------------------------------------


def test_sparse_sets_are_nested_and_apart_from_the_sample():
    x, none = images(60), images(0)
    small, few = study.sparse_set(dataset(x), 10, none, none)
    large, many = study.sparse_set(dataset(x), 20, none, none)
    assert many[:10] == few
    assert sorted(few) == choose(60, 10, study.DRAW_SEED)
    assert torch.equal(large[:10], small)
    assert torch.equal(small, x[few])
    taken = x[many[3:6]]
    _, others = study.sparse_set(dataset(x), 17, taken, none)
    assert others == [i for i in many if i not in many[3:6]]


def test_a_test_image_in_the_sparse_set_is_refused():
    x, none = images(30), images(0)
    _, chosen = study.sparse_set(dataset(x), 10, none, none)
    with pytest.raises(SystemExit, match="Got 1 of them"):
        study.sparse_set(dataset(x), 10, none, x[chosen[4:5]])
    with pytest.raises(SystemExit, match=r"Got 25: give a larger set\."):
        study.sparse_set(dataset(x), 26, x[:5], none)


def test_every_image_of_the_poisoned_set_is_poisoned():
    clean, sample = images(20), images(6, seed=1).permute(0, 2, 3, 1).numpy()
    labels = np.arange(20) % 10
    poisoned = study.poison_half(clean, labels, sample, np.arange(6))
    assert poisoned.shape == clean.shape
    change = (poisoned.float() - clean.float()).abs()
    assert (change.amax(dim=(1, 2, 3)) > 0).all()
    # AR lies in high frequencies, LSP is constant over 8 x 8 pixels
    steps = (change.diff(dim=-1)[..., :7] != 0).float().mean(dim=(1, 2, 3))
    assert steps[:10].min() > steps[10:].max()


# -- measures ----------------------------------------------------------------------------------------


def test_distance_is_the_frechet_distance():
    a, b = images(40), images(40, seed=1) // 2
    (mean_a, cov_a), (mean_b, cov_b) = map(study.patch_moments, (a, b))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert study.frechet(a, b) == pytest.approx(expected / len(mean_a), rel=1e-4)
    assert study.frechet(b, a) == pytest.approx(study.frechet(a, b), rel=1e-6)
    assert study.frechet(a, a) == pytest.approx(0, abs=1e-3)
    assert study.frechet(b, b + 7) == pytest.approx(49, abs=1e-2)  # all pixels moved by 7 levels


def test_psnr_of_each_image_has_the_librarys_mean():
    x = images(130)
    values = study.psnr_each(tiny_denoiser(), x, 25 / 255)
    assert len(values) == 130
    assert np.mean(values) == pytest.approx(psnr(tiny_denoiser(), x, 25 / 255), abs=1e-3)


def test_poison_remaining_is_one_undone_and_zero_removed():
    clean = np.full((4, 8, 8, 3), 100, np.uint8)
    poisoned = clean + np.arange(4, dtype=np.uint8)[:, None, None, None] + 1
    sample = {"clean": clean, "AR": poisoned}
    assert study.remaining(sample, sample, "AR") == pytest.approx([1, 0], abs=1e-5)
    assert study.remaining(sample, {"clean": clean, "AR": clean}, "AR") == pytest.approx([0, 0], abs=1e-5)


# -- the study ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Runs the study on a handful of images; what it writes lies in tmp_path."""
    everything = images(60, seed=3)
    data = {"train": everything[:12], "test": everything[12:20]}
    arrays = {k: (x.permute(0, 2, 3, 1).numpy(), np.arange(len(x)) % 10) for k, x in data.items()}
    monkeypatch.setattr(study, "load_sample", lambda folder, split: arrays[split])
    monkeypatch.setattr(
        study, "open_dataset", lambda spec, root: dataset(everything[20:] if spec == "near" else images(30))
    )
    runs = {
        "base": study.Run("base", images=12),
        "poisoned": study.Run("poisoned", images=12, poisoned=True),
        "ood-far": study.Run("far", images=12, source="far"),
    }
    monkeypatch.setattr(study, "plan", lambda ood=(): runs)
    configure, network = study.configure, UNetConfig.small(channels=4, multipliers=(1,), norm_groups=2)
    monkeypatch.setattr(study, "configure", lambda *a: replace(configure(*a), network=network, batch_size=4))
    command = f"study --cifar near --ood far=far --steps 2 --epochs 1 --width 2 --seeds 1 --out {tmp_path}"

    def run(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", [*command.split(), *more])
        study.main()
        return json.loads((tmp_path / "denoiser_study.json").read_text())

    return run


@pytest.mark.usefixtures("blank_figures")
def test_a_study_measures_every_run_and_goes_on_after_a_stop(small, monkeypatch, tmp_path, capsys):
    some = small("--only", "base", "--cells", "LSP purified")
    assert set(some["runs"]) == {"base", "none"}
    all_of_it = small("--cells", "LSP purified", "AR ECLIPSE")
    assert set(all_of_it["runs"]) == {"base", "poisoned", "ood-far", "none"}
    assert all_of_it["runs"]["base"]["accuracy"]["LSP purified"] == some["runs"]["base"]["accuracy"]["LSP purified"]
    assert all_of_it["runs"]["ood-far"]["difference"].keys() == {"10", "25", "50"}
    assert str(tmp_path) not in json.dumps(all_of_it)

    monkeypatch.setattr(study, "train_denoiser", None)
    monkeypatch.setattr(study, "train_victim", None)
    capsys.readouterr()
    small("--cells", "LSP purified", "AR ECLIPSE")
    assert capsys.readouterr().out == ""
    assert table_of(tmp_path / "denoiser_study.json", monkeypatch).count("\n| poisoned | ") == 2
    with pytest.raises(SystemExit, match="other settings"):
        small("--steps", "3")


def table_of(results: Path, monkeypatch) -> str:
    """The page that the study writes beside its results."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["study", "--table", str(results)])
        study.main()
    return results.with_suffix(".md").read_text()


def test_tables_and_picture_are_made_of_the_results(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    results, page = (tmp_path / f"denoiser_study.{suffix}" for suffix in ("json", "md"))
    shutil.copy(ROOT / "examples" / "results" / results.name, results)
    text = table_of(results, monkeypatch)
    assert text.count("\n| poisoned | ") == 2
    page.write_text("# Mine\n" + text.replace("| base |", "| old |") + "\nAnd mine.\n")
    assert table_of(results, monkeypatch) == "# Mine\n" + text + "\nAnd mine.\n"
    with Image.open(tmp_path / "denoiser_study.png") as picture:
        assert picture.width > 1000


def test_the_write_up_shows_the_results():
    results = ROOT / "examples" / "results" / "denoiser_study.json"
    text = results.with_suffix(".md").read_text()
    assert study.with_tables(text, json.loads(results.read_text())) == text
