"""Judging a denoiser: against closed forms, independent computations, and as a command on real images."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from purifyloader import pretrained
from purifyloader.commands.main import execute
from purifyloader.core import noise
from purifyloader.datasets.select import load_images
from purifyloader.datasets.splits import load_sample
from purifyloader.diffusion import psnr as psnr_module
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError
from purifyloader.evaluation import (
    auc,
    calibration,
    default_sigmas,
    evaluate,
    examples,
    jpeg_psnr,
    noised_psnr,
    picture,
    psnr,
    removed_energy,
)
from purifyloader.poisons import autoregressive
from purifyloader.pretrained.learned import learned_images
from purifyloader.results.folder import check_out
from purifyloader.results.values import to_json
from tests.conftest import random_images, tiny_denoiser

ROOT = Path(__file__).parents[2]

TAU = 0.1


def main(arguments: list[str]) -> int:
    """The command; errors of the user's are raised."""
    return execute(["denoiser", "evaluate", *arguments])


class Wiener(Denoiser):
    """The best denoiser of independent pixels from N(0.5, tau^2): everything about it is known."""

    image_channels = 3
    sigma_range = (0.005, 0.3)

    def __init__(self, tau: float = TAU) -> None:
        super().__init__()
        self.tau = tau

    def predict(self, x, sigma):
        sigma = sigma.double()[:, None, None, None]
        gain = self.tau**2 / (self.tau**2 + sigma**2)
        return (0.5 + gain * (x.double() - 0.5)).to(x.dtype), None


class Identity(Denoiser):
    image_channels = 3
    sigma_range = (0.001, 1.0)

    def predict(self, x, sigma):
        return x, None


def gaussian(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return 0.5 + TAU * noise.normal(noise.image_keys(seed, 7, range(count)), (3, size, size))


def gaussian_bytes(count: int, size: int = 16) -> torch.Tensor:
    return (255 * gaussian(count, size)).round().clamp(0, 255).to(torch.uint8)


def draws(count: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    keys = noise.image_keys(1, 0, range(count))
    return noise.normal(keys, (3, size, size)), noise.normal(keys, (3, size, size), 1).sign()


# -- calibration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("believed", [TAU, TAU / 2, 2 * TAU], ids=["calibrated", "too smooth", "too timid"])
def test_errors_made_and_claimed_are_those_in_closed_form(believed):
    sigma = 0.08
    z, signs = draws(400)
    found = calibration(Wiener(believed), gaussian(400), z, sigma, signs)
    gain = believed**2 / (believed**2 + sigma**2)
    error = (1 - gain) ** 2 * TAU**2 + gain**2 * sigma**2
    assert float(found.error.mean()) == pytest.approx(error, rel=0.01)
    assert float(found.claimed.mean()) == pytest.approx(sigma**2 * gain, rel=1e-4)
    if believed == TAU:
        assert float(found.claimed.mean()) == pytest.approx(error, rel=1e-3)


def test_the_divergence_is_that_of_automatic_differentiation():
    denoiser, sigma = tiny_denoiser(), 0.1
    clean = random_images(3).float() / 255
    z, signs = draws(3)
    found = calibration(denoiser, clean, z, sigma, signs)
    level = torch.full((3,), sigma, dtype=torch.float64)
    _, moved = torch.autograd.functional.jvp(lambda x: denoiser(x, level), clean + sigma * z, signs)
    want = sigma**2 * (moved * signs).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.claimed.float(), want, rtol=0.03, atol=0.01 * sigma**2)


# -- poisoned images ---------------------------------------------------------------------------------


def test_what_is_removed_and_left_is_what_numpy_finds():
    generator = np.random.default_rng(0)
    clean, poisoned, a, b = generator.random((4, 5, 3, 8, 8)).astype(np.float32)
    poisoned[2] = clean[2]
    found = removed_energy(*(torch.from_numpy(x) for x in (clean, poisoned, a, b)))
    for i in range(5):
        delta, left = (poisoned[i] - clean[i]).astype(float).ravel(), (b[i] - a[i]).astype(float).ravel()
        assert float(found.clean[i]) == pytest.approx(np.linalg.norm((clean[i] - a[i]).ravel()) / math.sqrt(192))
        assert float(found.poisoned[i]) == pytest.approx(np.linalg.norm((poisoned[i] - b[i]).ravel()) / math.sqrt(192))
        if i == 2:
            assert math.isnan(found.remaining[i])
            assert math.isnan(found.distance[i])
            continue
        assert float(found.remaining[i]) == pytest.approx(left @ delta / (delta @ delta), rel=1e-4)
        assert float(found.distance[i]) == pytest.approx(np.linalg.norm(left) / np.linalg.norm(delta), rel=1e-4)


def test_a_linear_denoiser_leaves_its_gain_of_any_poison():
    images = gaussian_bytes(12)
    poisoned = images.clone()
    poisoned[3:] = (poisoned[3:].int() + torch.randint(-6, 7, (9, 3, 16, 16))).clamp(0, 255).to(torch.uint8)
    found = evaluate(Wiener(), images, [TAU], poisoned={"mine": poisoned})["levels"][0]["poisoned"]["mine"]
    assert found["images"] == 9
    assert found["remaining"]["mean"] == pytest.approx(0.5, abs=1e-3)
    assert found["distance"]["mean"] == pytest.approx(0.5, abs=1e-3)
    delta = (poisoned[3:].double() - images[3:].double()).square().mean(dim=(1, 2, 3)).sqrt()
    assert found["perturbation_px"]["mean"] == pytest.approx(float(delta.mean()), rel=1e-5)
    nothing = evaluate(Identity(), images, [0.02], poisoned={"mine": poisoned})["levels"][0]["poisoned"]["mine"]
    assert nothing["remaining"]["mean"] == pytest.approx(1, abs=1e-3)
    assert nothing["auc"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few ties"])
def test_auc_is_mann_and_whitneys(levels):
    generator = np.random.default_rng(0)
    low, high = generator.integers(0, levels, 70) / 7, generator.integers(levels // 5, levels, 41) / 7
    want = stats.mannwhitneyu(high, low).statistic / (70 * 41)
    assert auc(torch.from_numpy(low), torch.from_numpy(high)) == want
    assert auc(high.tolist(), low.tolist()) == pytest.approx(1 - want)
    assert auc([0.0, 1.0], [2.0]) == 1
    assert auc([1.0], [1.0]) == 0.5


@pytest.mark.parametrize("bad", [[], [math.nan], [[1.0]]])
def test_auc_refuses_what_has_no_order(bad):
    with pytest.raises(InputError, match="list of one or more numbers"):
        auc([1.0], bad)


# -- everything together -----------------------------------------------------------------------------


def test_the_best_denoiser_is_judged_so():
    """Error and calibration are those of theory, at each level."""
    result = evaluate(Wiener(), gaussian_bytes(60, 32), [0.04, 0.1])
    for level, sigma in zip(result["levels"], (0.04, 0.1), strict=True):
        error = TAU**2 * sigma**2 / (TAU**2 + sigma**2)
        assert level["sigma_px"] == pytest.approx(255 * sigma)
        assert level["psnr_db"]["denoiser"]["mean"] == pytest.approx(-10 * math.log10(error), abs=0.05)
        assert level["psnr_db"]["noised"]["mean"] == pytest.approx(-20 * math.log10(sigma), abs=0.05)
        found = level["calibration"]
        assert found["error_px"] == pytest.approx(255 * math.sqrt(error), rel=0.01)
        assert abs(found["error_over_claimed"]["mean"] - 1) < 4 * found["error_over_claimed"]["standard_error"]


def test_its_psnr_is_that_of_psnr():
    images = random_images(7)
    denoiser = tiny_denoiser()
    level = evaluate(denoiser, images, [0.1], seed=4, calibrate=False)["levels"][0]
    assert level["psnr_db"]["denoiser"]["mean"] == pytest.approx(psnr(denoiser, images, 0.1, seed=4), abs=1e-4)
    assert level["psnr_db"]["jpeg10"]["mean"] == pytest.approx(jpeg_psnr(images, 0.1, seed=4), abs=1e-4)
    assert level["calibration"] is None
    with torch.no_grad():
        z = noise.normal(noise.image_keys(4, 0, range(7)), (3, 16, 16))
        clean = images.float() / 255
        out = denoiser(clean + 0.1 * z, torch.full((7,), 0.1)).clamp(0, 1)
    single = -10 * (out - clean).double().square().mean(dim=(1, 2, 3)).log10()
    assert level["psnr_db"]["denoiser"]["standard_error"] == pytest.approx(stats.sem(single.numpy()), rel=1e-4)
    removed = 255 * (clean - out).double().square().mean(dim=(1, 2, 3)).sqrt()
    assert level["removed_px"]["mean"] == pytest.approx(float(removed.mean()), rel=1e-5)


def test_batches_change_nothing_and_bound_the_memory(monkeypatch):
    images = random_images(23, size=24)
    denoiser, seen = tiny_denoiser(), []
    clean, x = psnr_module.noised(images, 0.1, seed=4)
    z = noise.normal(noise.image_keys(4, 0, range(23)), (3, 24, 24))
    assert torch.equal(clean, images.float() / 255)
    assert torch.equal(x, clean + 0.1 * z)
    assert torch.equal(psnr_module.noised(images, 0.1, 4, 20, 30)[1], x[20:])
    whole = [
        psnr(denoiser, images, 0.1, seed=4, batch_size=23),
        float(psnr_module.psnr_of(psnr_module.corruptions.jpeg(x.clamp(0, 1), 10), clean).mean()),
        float(psnr_module.psnr_of(x.clamp(0, 1), clean).mean()),
    ]
    normal = noise.normal

    def counted(keys, shape, *step):
        seen.append(len(keys) * math.prod(shape))
        return normal(keys, shape, *step)

    monkeypatch.setattr(psnr_module, "_BATCH_VALUES", 5 * 3 * 24 * 24 + 1)
    monkeypatch.setattr(psnr_module.noise, "normal", counted)
    batched = [psnr(denoiser, images, 0.1, seed=4), jpeg_psnr(images, 0.1, seed=4)]
    batched.append(noised_psnr(images, 0.1, seed=4))
    assert batched[1:] == whole[1:]
    assert batched[0] == pytest.approx(whole[0], abs=1e-5)
    assert seen == 3 * [*4 * [5 * 3 * 24 * 24], 3 * 3 * 24 * 24]
    evaluate(Wiener(), images, [0.1], calibrate=False)
    assert max(seen) <= psnr_module._BATCH_VALUES
    assert evaluate(Wiener(), images[:1], [0.1], calibrate=False)["settings"]["batch_size"] == 5
    monkeypatch.setattr(psnr_module, "_BATCH_VALUES", 1)
    assert psnr_module.batch_size_of(images) == 1
    monkeypatch.undo()
    assert [psnr_module.batch_size_of(random_images(1, size=side)) for side in (32, 64, 224)] == [100, 100, 8]


def close(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, rel=1e-3, abs=2e-3) if isinstance(a, float) else a == b


def test_results_are_a_function_of_the_arguments_whatever_the_batch():
    images = random_images(20, size=8)
    poisoned = {"x": images.flip(3)}
    denoiser = tiny_denoiser()
    first = evaluate(denoiser, images, [0.05, 0.2], poisoned=poisoned, seed=1)
    assert to_json(first) == to_json(evaluate(denoiser, images, [0.2, 0.05, 0.2], poisoned=poisoned, seed=1))
    other = evaluate(denoiser, images, [0.05, 0.2], poisoned=poisoned, seed=1, batch_size=7)
    assert close(first["levels"], other["levels"])
    assert not close(first["levels"], evaluate(denoiser, images, [0.05, 0.2], poisoned=poisoned, seed=2)["levels"])


def test_several_calls_are_those_of_the_recipe():
    from purifyloader.purifiers import Diffuse

    images = random_images(3)
    denoiser = tiny_denoiser()
    level = evaluate(denoiser, images, [0.1], poisoned={"x": images.flip(3)}, steps=3, sampler="ddim")["levels"][0]
    diffuse = Diffuse(denoiser, sigma=0.1, steps=3, sampler="ddim")
    assert level["network_levels_px"] == pytest.approx([255 * s for s in diffuse.sigmas[:-1]], rel=1e-5)
    out = diffuse(images.float() / 255, noise.image_keys(0, 0, range(3))).clamp(0, 1)
    want = psnr_module.psnr_of(out, images.float() / 255).mean()
    assert level["psnr_db"]["denoiser"]["mean"] == pytest.approx(float(want), abs=1e-3)
    assert level["psnr_db"]["one_call"]["mean"] == pytest.approx(psnr(denoiser, images, 0.1), abs=1e-3)
    assert level["psnr_db"]["one_call"]["mean"] != level["psnr_db"]["denoiser"]["mean"]


def test_progress_counts_every_call():
    calls = 0
    denoiser = tiny_denoiser()

    def count(module, inputs, output):
        nonlocal calls
        calls += len(inputs[0])

    denoiser.network.register_forward_hook(count)
    reports: list[tuple[int, int]] = []
    images = random_images(9)
    evaluate(
        denoiser, images, [0.1, 0.3], poisoned={"x": images.flip(3)}, steps=2, batch_size=4,
        progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    assert {total for _, total in reports} == {calls}
    assert sum(done for done, _ in reports) == calls


def test_the_denoiser_is_left_as_it_was():
    denoiser = tiny_denoiser().train()
    evaluate(denoiser, random_images(1), [0.1], calibrate=False)
    assert denoiser.training


def test_one_image_has_no_standard_error():
    result = evaluate(Wiener(), gaussian_bytes(1), [0.1], poisoned={"x": gaussian_bytes(1).flip(3)})
    level = result["levels"][0]
    assert level["psnr_db"]["denoiser"]["standard_error"] is None
    assert level["calibration"]["error_over_claimed"]["standard_error"] is None
    json.loads(to_json(result))


def shape(value):
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    return "list" if isinstance(value, list) else "value"


def test_documented_names():
    """A name that leaves this tree leaves somebody's script broken: raise VERSION."""
    images = gaussian_bytes(3)
    result = evaluate(Wiener(), images, [0.1], poisoned={"x": images.flip(3)}, steps=2)
    mean = {"mean": "value", "standard_error": "value"}
    levels, function = result.pop("levels"), result["model"].pop("function")
    assert function["class"] == "Wiener"
    assert (result["format"], result["version"]) == ("purifyloader-denoiser-evaluation", 2)
    assert shape(result) == {
        **dict.fromkeys(("format", "version", "purifyloader", "torch", "device"), "value"),
        "model": {
            **dict.fromkeys(("name", "weights_sha256", "parameters", "learned_variance"), "value"),
            "sigma_range_px": "list",
        },
        "images": {"count": "value", "shape": "list", "sha256": "value", "poisoned_sha256": {"x": "value"}},
        "settings": {
            "sigma_px": "list",
            **dict.fromkeys(("seed", "steps", "sampler", "calibrate", "batch_size"), "value"),
        },
    }
    assert shape(levels[0]) == {
        "sigma_px": "value",
        "network_levels_px": "list",
        "psnr_db": dict.fromkeys(("denoiser", "one_call", "noised", "jpeg10"), mean),
        "calibration": {"error_px": "value", "claimed_px": "value", "error_over_claimed": mean},
        "removed_px": mean,
        "poisoned": {
            "x": {
                "images": "value",
                "auc": "value",
                **dict.fromkeys(("perturbation_px", "removed_px", "remaining", "distance"), mean),
            }
        },
    }
    documented = evaluate.__doc__ or ""
    assert [name for name in (*result, *levels[0], *levels[0]["calibration"]) if name not in documented] == []


def test_the_levels_looked_at_lie_in_the_range():
    for low, high in ((0.001, 0.3), (0.00391, 150.0), (0.1, 0.11), (0.5, 0.6), (1e-4, 0.002), (0.03, 0.2)):
        denoiser = Identity()
        denoiser.sigma_range = (low, high)
        sigmas = default_sigmas(denoiser)
        assert sigmas == sorted(sigmas)
        assert 1 <= len(sigmas) <= 9
        denoiser.check_sigma(torch.tensor(sigmas, dtype=torch.float64))
        assert [px for px in (6.37, 10, 25, 50) if low <= px / 255 <= high] == pytest.approx(
            [255 * s for s in sigmas if round(255 * s, 6) in (6.37, 10, 25, 50)]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoiser": torch.nn.Identity()}, "evaluate takes a denoiser"),
        ({"images": random_images(2).float()}, "uint8"),
        ({"images": random_images(2)[0]}, "uint8"),
        ({"images": random_images(2)[:0]}, "at least one"),
        ({"images": [1]}, "as a tensor. Got list"),
        ({"images": random_images(2, channels=1)}, r"3 channel.*Got \(2, 1, 16, 16\)"),
        ({"sigmas": []}, "one or more"),
        ({"sigmas": [-0.1]}, "above 0"),
        ({"sigmas": [math.nan]}, "finite"),
        ({"sigmas": [0.1, 0.5]}, r"1.28 to 76.5 px\). Got from 0.1"),
        ({"poisoned": {"x": random_images(3)}}, "same images in the same order"),
        ({"poisoned": {"x": random_images(2).float()}}, r"\(x\) are uint8"),
        ({"poisoned": {"x": random_images(2)}}, "must differ"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"steps": 10**6}, "steps must be an integer from 1 to t="),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"seed": 0.5}, "seed must be an integer. Got 0.5"),
    ],
)
def test_bad_arguments_are_named(change, message):
    values = {"denoiser": Wiener(), "images": random_images(2), "sigmas": [0.1], **change}
    with pytest.raises(InputError, match=message):
        evaluate(values.pop("denoiser"), values.pop("images"), **values)


# -- the picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False], ids=["everything", "little"])
def test_a_picture_is_a_whole_png(full, tmp_path):
    images = gaussian_bytes(4)
    denoiser = Wiener()
    poisoned = {"x": images.flip(3)} if full else {}
    results = evaluate(denoiser, images, [0.05, 0.1] if full else [0.1], poisoned=poisoned, calibrate=full)
    shown = examples(denoiser, images, [0.05, 0.1], count=1) if full else None
    path = picture(json.loads(to_json(results)), tmp_path / "new" / "a.png", shown)
    with Image.open(path) as drawn:
        drawn.load()
        assert (drawn.format, drawn.width) == ("PNG", 1700)
    if not full:  # drawn from the results and from their JSON
        picture(results, tmp_path / "b.png", shown)
        assert path.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_examples_have_the_noise_of_the_evaluation():
    images = random_images(5)
    denoiser = tiny_denoiser()
    shown = examples(denoiser, images, [0.2, 0.05], seed=3, count=2)
    assert shown.sigma_px == pytest.approx((12.75, 51))
    z = noise.normal(noise.image_keys(3, 0, [4]), (3, 16, 16))
    noised = (images[4:].float() / 255 + 0.2 * z).clamp(0, 1)
    np.testing.assert_array_equal(shown.noised[1, 1], noised[0].permute(1, 2, 0).numpy())
    with pytest.raises(InputError, match="Got 0"):
        examples(denoiser, images, [0.1], count=0)


@pytest.mark.parametrize("bad", [{}, {"format": "purifyloader-denoiser-evaluation", "version": 99}, [1]])
def test_a_picture_of_something_else_is_refused(bad, tmp_path):
    with pytest.raises(InputError, match="Expected results of evaluate"):
        picture(bad, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# -- the command -------------------------------------------------------------------------------------


class Listed(torch.utils.data.Dataset):
    def __init__(self, images, labels=None) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] if self.labels is None else (self.images[index], int(self.labels[index]))


@functools.cache
def every_sample():
    return load_sample(ROOT / "examples" / "data", "test")


def sample(count: int = 40):
    images, labels = every_sample()
    return images[:count].copy(), labels[:count].copy()


def clean_sample():
    return Listed(*sample())


def unlabelled_sample():
    return Listed(sample()[0])


@functools.cache
def poisoned_sample():
    images, labels = sample()
    return Listed(autoregressive(images, labels), labels)


def other_sample():
    return Listed(sample()[0][:, :16])


def short_sample():
    return Listed(sample()[0][:7])


CLEAN = "tests.evaluation.test_evaluation:clean_sample"


@pytest.fixture
def model(tmp_path) -> Path:
    pretrained.save(tiny_denoiser(), tmp_path / "model", name="tiny")
    return tmp_path / "model"


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("blank_figures")
def test_the_command_on_real_images(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["cifar10-fast", "--data", CLEAN, "--count", "8", "--sigma-px", "25", "10", "--out", str(out)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    result = read(out)
    low, high = result["levels"]
    assert low["psnr_db"]["denoiser"]["mean"] == pytest.approx(34.5, abs=1.5)
    assert high["psnr_db"]["denoiser"]["mean"] == pytest.approx(29.2, abs=1.5)
    for level in (low, high):
        found = level["psnr_db"]
        assert found["denoiser"]["mean"] > found["jpeg10"]["mean"]
        assert level["calibration"]["error_over_claimed"]["mean"] == pytest.approx(1, abs=0.06)
        # AR is fine and goes first, LSP is coarse and stays: what compensation is for
        assert level["poisoned"]["ar"]["remaining"]["mean"] < 0.6 < level["poisoned"]["lsp"]["remaining"]["mean"]
    assert low["poisoned"]["ar"]["auc"] > 0.6
    assert result["model"]["name"] == "cifar10-fast"
    assert result["data"]["description"] == CLEAN
    assert len(result["data"]["indices"]) == result["images"]["count"] == 8
    assert f"{high['psnr_db']['denoiser']['mean']:.2f}" in printed
    assert str(out / "evaluation.png") in printed
    assert max(map(len, printed.splitlines()[1:-2])) <= 120
    with Image.open(out / "evaluation.png") as drawn:
        drawn.load()
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.json", "evaluation.png"]
    assert str(tmp_path) not in (out / "evaluation.json").read_text()


def run(model: Path, *more: str, data: str = CLEAN) -> int:
    poisoned = () if "--poisoned" in more else ("--poisoned", "none")
    options = ("--data", data, "--sigma-px", "20", "--device", "cpu", "--no-calibration", *poisoned)
    return main([str(model), *options, *more])


@pytest.mark.usefixtures("blank_figures")
def test_the_file_is_the_same_text_again_and_not_overwritten_unasked(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, "--count", "1", "--out", str(out)) == 0
    text = (out / "evaluation.json").read_text()
    with pytest.raises(InputError, match=r"with evaluation.json, evaluation.png: give another one, or overwrite them"):
        run(model, "--count", "1", "--out", str(out))
    capsys.readouterr()
    assert run(model, "--count", "1", "--out", str(out), "--overwrite", "--json") == 0
    printed = capsys.readouterr()
    assert (out / "evaluation.json").read_text() == text == printed.out
    assert "picture: " in printed.err
    assert json.loads(text)["levels"][0]["calibration"] is None


def test_without_matplotlib_the_numbers_are_written_all_the_same(model, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "evaluation.png").write_bytes(b"of other results")
    assert run(model, "--count", "3", "--out", str(out), "--overwrite") == 0
    assert "pip install 'purifyloader[plots]'" in capsys.readouterr().out
    assert [p.name for p in out.iterdir()] == ["evaluation.json"]
    with pytest.raises(PurifyError, match="needs matplotlib"):
        picture(read(out), tmp_path / "a.png")


def test_what_cannot_be_written_is_one_clear_error(model, tmp_path, monkeypatch):
    (tmp_path / "a" / "evaluation.png" / "x").mkdir(parents=True)
    with pytest.raises(PurifyError, match=r"Could not write .*evaluation.png. Got: .*Give a folder"):
        run(model, "--count", "3", "--out", str(tmp_path / "a"), "--overwrite")
    (tmp_path / "b" / "evaluation.json" / "x").mkdir(parents=True)
    with pytest.raises(PurifyError, match=r"Could not write .*evaluation.json. Got: .*Give a folder"):
        run(model, "--count", "3", "--out", str(tmp_path / "b"), "--overwrite")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["evaluation.json"]
    monkeypatch.setattr(Path, "exists", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(PurifyError, match=r"Could not write .*c. Got: .*Permission denied"):
        run(model, "--count", "3", "--out", str(tmp_path / "c"))


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(PurifyError, match=r"Could not write .*file/out. Got: .*Give a folder"):
        run(model, "--out", str(tmp_path / "file" / "out"), data="tests.evaluation.test_evaluation:Nothing")

    def check(folder: Path) -> None:
        check_out(folder, ("a.json",), False, "an evaluation")

    before = sorted(tmp_path.rglob("*"))
    check(tmp_path)
    check(tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    check(Path("d"))
    assert sorted(tmp_path.rglob("*")) == before

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(PurifyError, match=r"Could not write .*Permission denied"):
            check(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_modules_of_the_working_directory_are_not_run(model, tmp_path, monkeypatch):
    for name in ("matplotlib", "PIL"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert run(model, "--count", "1", "--out", "out") == 0
    assert not (tmp_path / "executed").exists()
    assert sys.path[: len(before)] == before


@pytest.mark.usefixtures("undrawn")
def test_poisoned_sets_are_aligned_with_the_data(model, tmp_path):
    images, labels = sample()
    poisoned = autoregressive(images, labels)
    np.save(tmp_path / "images.npy", poisoned)
    np.save(tmp_path / "delta.npy", ((poisoned.astype(np.float32) - images) / 255).transpose(0, 3, 1, 2))
    named = [
        "ar",
        "tests.evaluation.test_evaluation:poisoned_sample",
        str(tmp_path / "images.npy"),
        str(tmp_path / "delta.npy"),
    ]
    out = tmp_path / "out"
    assert run(model, "--count", "6", "--out", str(out), "--poisoned", *named) == 0
    found = read(out)["levels"][0]["poisoned"]
    assert list(found) == ["ar", "delta.npy", "images.npy", "tests.evaluation.test_evaluation:poisoned_sample"]
    assert len({json.dumps(value, sort_keys=True) for value in found.values()}) == 1
    assert run(model, "--count", "6", "--out", str(tmp_path / "none"), "--poisoned", "none") == 0
    assert read(tmp_path / "none")["levels"][0]["poisoned"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--poisoned", "none", "lsp"], "stands alone"),
        (["--poisoned", "lsp", "lsp"], "lsp twice"),
        (["--poisoned", "nowhere"], "package.module:function"),
        (["--poisoned", CLEAN], "must move images"),
        (
            ["--poisoned", "tests.evaluation.test_evaluation:short_sample"],
            "the 40 images of --data in the same order. Got 7",
        ),
        (
            ["--poisoned", "tests.evaluation.test_evaluation:other_sample"],
            r"\(32, 32, 3\) \(H, W, C\). Got \(16, 32, 3\)",
        ),
        (["--poisoned", "bad/missing.npy"], "poison file. Got 'bad/missing.npy'"),
        (["--poisoned", "bad/shape.npy"], r"Got \(1, 40, 3, 3\)"),
        (["--poisoned", "bad/large.npy"], "divide those of 0-255 by 255"),
        (["--poisoned", "bad/ints.npy"], "Got int64: give units="),
        (["--poisoned", "bad/text.npy"], "must be a whole .npy file"),
        (["--count", "41"], "from 1 to 40"),
        (["--count", "0"], "integer of 1 or more"),
        (["--indices", "bad/twice.json"], r"each index once. Got 1 more than once \(2 entries"),
        (["--indices", "bad/none.json"], "Got an empty list"),
        (["--indices", "bad/names.json"], "Got 'a.png' in it"),
        (["--indices", "bad/negative.json"], "Got -3 in it"),
        (["--indices", "bad/object.json"], "Got {'a': 1}"),
        (["--indices", "bad/card.json"], "Got {'details': {}}"),
        (["--indices", "bad/far.json"], r"\[0, 40\)"),
        (["--indices", "bad/missing.json"], "JSON list"),
        (["--sigma-px", "200"], r"to 76.5 px\). Got"),
        (["--sigma-px", "20", "nan"], "must be a number above 0. Got 'nan'"),
        (["--device", "tpu"], "Expected a device"),
        (["--out", "bad/far.json"], "^out must be a folder. Got the file"),
        (["--overwrite"], "^overwrite is about files in the output folder. Got none"),
        (["--size", "0"], "size"),
        (["--batch-size", "0"], "batch_size"),
        (["--data", "cifar10", "--root", "bad"], "download=True"),
        (["--data", "tests.evaluation.test_evaluation:Nothing"], "no attribute"),
    ],
)
def test_bad_options_are_named_and_write_nothing(options, message, model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    np.save(bad / "shape.npy", np.zeros((40, 3, 3), np.float32))
    np.save(bad / "large.npy", np.full((40, 32, 32, 3), 6.0))
    np.save(bad / "ints.npy", np.zeros((40, 32, 32, 3), np.int64))
    (bad / "text.npy").write_text("no array")
    (bad / "twice.json").write_text("[1, 1]")
    (bad / "far.json").write_text("[1, 40]")
    for name, text in (
        ("none", "[]"),
        ("names", '["a.png"]'),
        ("negative", "[1, -3]"),
        ("object", '{"a": 1}'),
        ("card", '{"details": {}}'),
    ):
        (bad / f"{name}.json").write_text(text)
    with pytest.raises((InputError, ConfigError), match=message):
        run(model, *(["--out", "out"] if "--out" not in options and "--overwrite" not in options else []), *options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-of-the-kind"):
        main(["nothing-of-the-kind", "--data", CLEAN])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("size", [None, 24])
def test_images_of_many_sizes_need_one(size, model, tmp_path):
    many = tmp_path / "images"
    many.mkdir()
    for i, image in enumerate(sample(4)[0]):
        Image.fromarray(image[: 32 - i]).save(many / f"{i}.png")
    if size is None:
        with pytest.raises(InputError, match="size must be given"):
            run(model, data=str(many))
        return
    assert run(model, "--size", "24", "--out", str(tmp_path / "out"), data=str(many)) == 0
    result = read(tmp_path / "out")
    assert result["images"]["shape"] == [3, 24, 24]
    assert result["data"]["description"] == "an image folder"


# -- never on what it was trained on -----------------------------------------------------------------


def sha256_of(dataset, indices: list[int], size: int | None = None) -> str:
    images = load_images(dataset, indices, size=size)
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def trained_on(folder: Path, indices: list[int], dataset=None, **details) -> Path:
    """A model whose card says so: by content if `dataset` is given."""
    details = {"indices": indices, "data": CLEAN, "data_length": 40, "resized": None, **details}
    if dataset is not None:
        details["images_sha256"] = sha256_of(dataset, indices, details["resized"])
    pretrained.save(tiny_denoiser(), folder, details=details)
    return folder


def folder_of(folder: Path, images) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(np.asarray(image)).save(folder / f"{i:03}.png")
    return str(folder)


def test_images_trained_on_are_left_out(tmp_path, capsys):
    model = trained_on(tmp_path / "m", list(range(10, 40)), clean_sample())
    assert run(model, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["data"]
    assert (found["indices"], found["trained_on_left_out"]) == (list(range(10)), 30)
    assert "left out 30 of the 40 images in --data: the model was trained on them" in printed.err
    with pytest.raises(InputError, match=r"from 1 to 10, the images not trained on. Got 11"):
        run(model, "--count", "11")
    (tmp_path / "i.json").write_text("[3, 30, 12]")
    with pytest.raises(InputError, match=r"indices must name .* Got 2 that it was, the first at index 12"):
        run(model, "--indices", str(tmp_path / "i.json"))
    (tmp_path / "i.json").write_text("[9, 3]")
    assert run(model, "--indices", str(tmp_path / "i.json"), "--json") == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert (found["indices"], found["trained_on_left_out"]) == ([3, 9], 0)
    with pytest.raises(InputError, match="trained on all of these"):
        run(trained_on(tmp_path / "all", list(range(40)), clean_sample()))


@pytest.mark.parametrize(("at_once", "resized"), [(256, None), (7, 16)])
def test_which_images_were_trained_on_is_told_by_content(at_once, resized, tmp_path, monkeypatch, capsys):
    """Every folder is "an image folder", so neither its name nor its length says which."""
    from purifyloader.datasets.named import open_dataset
    from purifyloader.pretrained import learned

    monkeypatch.setattr(learned, "_AT_ONCE", at_once)
    images, _ = sample(36)
    a = folder_of(tmp_path / "a", images[:15])
    b = folder_of(tmp_path / "b", images[15:30])
    longer = folder_of(tmp_path / "longer", [*images[:15], *images[30:33]])
    shorter = folder_of(tmp_path / "shorter", images[:14])
    grey = folder_of(tmp_path / "grey", images[:15, :, :, 0])
    indices = list(range(1, 15))
    model = trained_on(
        tmp_path / "m", indices, open_dataset(a), data="an image folder", data_length=15, resized=resized
    )
    kept = {}
    for data in (a, b, longer, shorter, grey):
        assert run(model, "--json", "--poisoned", "none", data=data) == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)["data"]
        kept[Path(data).name] = found["indices"]
        assert found["trained_on_left_out"] == (14 if data in (a, longer) else 0)
        assert ("left out 14 of the" in printed.err) == (data in (a, longer))
        assert ("cannot be told to be the same" in printed.err) == (data in (b, grey))
    everything = {"b": list(range(15)), "shorter": list(range(14)), "grey": list(range(15))}
    assert kept == {"a": [0], "longer": [0, 15, 16, 17], **everything}
    # under a name of the user's, too
    described = trained_on(tmp_path / "d", indices, open_dataset(a), data="my own", data_length=15, resized=resized)
    assert run(described, "--json", "--poisoned", "none", data=a) == 0
    assert json.loads(capsys.readouterr().out)["data"]["indices"] == [0]


def test_copies_of_images_trained_on_are_left_out(tmp_path, capsys):
    from purifyloader.datasets.named import open_dataset

    images, _ = sample(8)
    data = folder_of(tmp_path / "a", [*images, images[1], images[7]])
    model = trained_on(tmp_path / "m", [0, 1, 2], open_dataset(data), data="an image folder", data_length=8)
    assert run(model, "--json", "--poisoned", "ar", data=data) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["data"]["indices"] == [3, 4, 5, 6, 7, 9]
    assert found["images"]["count"] == 6
    assert found["data"]["trained_on_left_out"] == 4
    assert found["levels"][0]["poisoned"]["ar"]["images"] == 6
    assert "left out 4 of the 10" in printed.err
    (tmp_path / "i.json").write_text("[3, 8]")
    with pytest.raises(InputError, match="Got 1 that it was, the first at index 8"):
        run(model, "--indices", str(tmp_path / "i.json"), data=data)


@pytest.mark.parametrize("details", [{"data": "my photographs"}, {}, {"images_sha256": "0" * 64}])
def test_images_that_may_have_been_trained_on_are_warned_of(details, tmp_path, capsys):
    model = trained_on(tmp_path / "m", list(range(5, 40)), **details)
    assert run(model, "--count", "40") == 0
    assert "35 of the 40 images chosen were trained on" in capsys.readouterr().err
    assert run(trained_on(tmp_path / "n", [1, 2], data_length=41, **details), "--count", "4") == 0
    assert "does not say which images it was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("details", "certain"),
    [
        ({}, True),
        ({"data": "cifar100"}, False),
        ({"images_sha256": "0" * 64}, False),
        ({"data_length": 41}, None),
        ({"indices": "all"}, None),
        ({"indices": [True]}, None),
        ({"resized": "a lot", "images_sha256": "0" * 64}, False),
        ({"indices": [1, 50], "images_sha256": "0" * 64}, False),
    ],
)
def test_an_older_card_is_believed_of_a_named_dataset_only(details, certain, tmp_path):
    card = {"indices": [1, 2], "data": "cifar10", "data_length": 40, **details}
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=card)
    images = clean_sample()
    found = learned_images([tmp_path / "m"], images, "cifar10", 3)
    assert [i for i in range(40) if found.has(images[i])] == ([1, 2] if certain else [])
    assert bool(found.doubtful) == (certain is not None)
    pretrained.save(tiny_denoiser(), tmp_path / "m", details={**card, "data": CLEAN}, overwrite=True)
    assert not learned_images([tmp_path / "m"], images, CLEAN, 3).hashes
