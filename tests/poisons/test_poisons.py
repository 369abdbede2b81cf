"""Attacks: the bound, regenerability, and the property that makes each one an attack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from purifyloader.errors import InputError
from purifyloader.poisons import (
    ar_coefficients,
    ar_perturbation,
    autoregressive,
    lsp,
    lsp_perturbation,
    read_ar_coefficients,
)
from purifyloader.poisons.attacks.autoregression import _is_stable

LABELS = torch.arange(60) % 10
SIZE = (32, 32)


@pytest.fixture(scope="module")
def coefficients():
    return ar_coefficients()


@pytest.fixture(scope="module")
def perturbations(coefficients):
    return {
        "lsp": lsp_perturbation(LABELS, SIZE),
        "ar": ar_perturbation(LABELS, SIZE, coefficients=coefficients),
    }


@pytest.fixture(params=["lsp", "ar"])
def attack(request, coefficients):
    """name, perturbation(labels, size, ...), poison(images, labels, ...)"""
    if request.param == "lsp":
        return "lsp", lsp_perturbation, lsp
    return (
        "ar",
        lambda *args, **kwargs: ar_perturbation(*args, coefficients=coefficients, **kwargs),
        lambda *args, **kwargs: autoregressive(*args, coefficients=coefficients, **kwargs),
    )


def images(count=12, size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "norm"), [("lsp", 6 / 255 * 3072**0.5), ("ar", 1.0)])
def test_every_perturbation_has_the_norm(perturbations, name, norm):
    delta = perturbations[name]
    assert delta.shape == (60, 32, 32, 3)
    assert delta.dtype == torch.float32
    length = delta.double().flatten(1).norm(dim=1)
    assert torch.allclose(length, torch.full_like(length, norm), rtol=0, atol=1e-5)


def test_norm_follows_the_image_size_and_can_be_set():
    assert lsp_perturbation([3], (16, 24)).norm() == pytest.approx(6 / 255 * (3 * 16 * 24) ** 0.5, abs=1e-5)
    assert lsp_perturbation([3], SIZE, norm=0.5).norm() == pytest.approx(0.5, abs=1e-5)


def test_golden_values(perturbations, coefficients):
    golden = {
        "lsp": [-0.018100504, -0.027495176, 0.027959583],
        "ar": [0.0059169959, 0.019222856, -0.013213499],
    }
    for name, values in golden.items():
        got = perturbations[name][[0, 17, 59], [0, 9, 31], [0, 20, 31], [0, 1, 2]].tolist()
        assert got == pytest.approx(values, rel=1e-6), name
    assert coefficients[7, 1].flatten().tolist() == pytest.approx(
        [0.29751545, 0.21756791, -0.089619018, -0.10668374, 0.31476325, 0.36542296, -0.038735412, 0.03976861, 0],
        rel=1e-6,
    )


def test_a_perturbation_depends_on_seed_position_and_class_only(attack, perturbations):
    name, perturbation, _ = attack
    delta = perturbations[name]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(perturbation(LABELS[order], SIZE, positions=order), delta[order])
    assert torch.equal(perturbation(LABELS[41:42], SIZE, positions=[41])[0], delta[41])
    assert torch.equal(perturbation(LABELS[:7], SIZE), delta[:7])
    assert not torch.equal(perturbation(LABELS[:1], SIZE, positions=[10])[0], delta[0])
    assert not torch.equal(perturbation(LABELS[:1], SIZE, seed=1)[0], delta[0])


def test_many_classes_do_not_change_the_first(perturbations):
    assert torch.equal(lsp_perturbation(LABELS, SIZE, classes=25), perturbations["lsp"])


def test_chunks_leave_no_seam():
    labels = torch.arange(1100) % 10
    delta = lsp_perturbation(labels, (8, 8))
    assert torch.equal(delta[1020:1030], lsp_perturbation(labels[1020:1030], (8, 8), positions=range(1020, 1030)))


def test_lsp_patches_are_constant(perturbations):
    blocks = perturbations["lsp"].unflatten(2, (4, 8)).unflatten(1, (4, 8))  # N, 4, 8, 4, 8, 3
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))
    assert len(blocks[0, :, 0, :, 0].unique()) == 48


def test_lsp_is_linearly_separable():
    labels = torch.arange(1000) % 10
    delta = lsp_perturbation(labels, (8, 8)).flatten(1).double()
    x = torch.cat([delta, torch.ones(1000, 1, dtype=torch.float64)], dim=1)
    y = torch.nn.functional.one_hot(labels, 10).double()
    weights = torch.linalg.lstsq(x[:600], y[:600], driver="gelsd").solution
    assert torch.equal((x @ weights).argmax(dim=1), labels)


def test_ar_satisfies_its_recurrence(perturbations, coefficients):
    delta = perturbations["ar"].double().permute(0, 3, 1, 2)
    windows = delta.unfold(2, 3, 1).unfold(3, 3, 1)  # N, C, 30, 30, 3, 3
    predicted = torch.einsum("nchwij,ncij->nchw", windows, coefficients[LABELS].double())
    # exact but for the rounding of the scaled field to float32
    assert torch.allclose(predicted, delta[:, :, 2:, 2:], rtol=0, atol=2e-7)


def test_ar_start_values_alone_differ_within_a_class(perturbations):
    first, second = perturbations["ar"][0].flatten(), perturbations["ar"][10].flatten()
    assert abs(float(first @ second)) < 0.5  # unit vectors


def test_coefficients_are_like_the_published_ones(coefficients):
    assert coefficients.shape == (10, 3, 3, 3)
    assert coefficients.dtype == torch.float32
    assert torch.allclose(coefficients.sum(dim=(2, 3)), torch.ones(10, 3), atol=1e-5)
    assert not coefficients[:, :, 2, 2].any()
    assert len(coefficients.flatten(2).flatten(0, 1).unique(dim=0)) == 30


def test_coefficients_are_stable_and_regenerable(coefficients):
    assert torch.equal(ar_coefficients(2), coefficients[:2])
    assert not torch.equal(ar_coefficients(1, seed=1), coefficients[:1])
    long = ar_perturbation(LABELS[:10], (100, 100), coefficients=coefficients, norm=1.0)
    late = long[:, -25:, -25:].square().sum(dim=(1, 2, 3))
    assert bool((late > 1e-4).all())  # has not died out by then
    assert bool((late < 0.99).all())  # nor grown out of all proportion


def test_stability_rejects_growth_and_smoothing():
    grows, smooths, dies = torch.zeros(3, 3), torch.full((3, 3), 1 / 8), torch.zeros(3, 3)
    grows[0, 0] = 2.0
    smooths[2, 2] = 0.0
    dies[2, 1] = 0.5
    assert _is_stable(torch.stack([grows, smooths, dies])).tolist() == [False, False, False]


def test_poisoned_pixels_are_the_rounded_sum(attack):
    _, perturbation, poison = attack
    x, y = images(), np.arange(12) % 10
    before = x.copy()
    out = poison(x, y)
    assert np.array_equal(x, before)
    assert out.dtype == np.uint8
    expected = (x / 255 + perturbation(y, SIZE).numpy()).clip(0, 1) * 255
    assert np.abs(out - expected).max() <= 0.5 + 1e-4
    as_tensor = poison(torch.from_numpy(x), torch.from_numpy(y))
    assert isinstance(as_tensor, torch.Tensor)
    assert np.array_equal(as_tensor.numpy(), out)


def test_read_only_arrays_are_taken(attack):
    x, y = images(2), np.arange(2)
    x.flags.writeable = y.flags.writeable = False
    assert attack[2](x, y).flags.writeable


def test_indices_poison_a_part_as_the_whole_would_be(attack):
    x, y = images(), np.arange(12) % 10
    whole, part = attack[2](x, y), attack[2](x, y, indices=[7, 2])
    assert np.array_equal(part[[2, 7]], whole[[2, 7]])
    rest = [i for i in range(12) if i not in (2, 7)]
    assert np.array_equal(part[rest], x[rest])
    assert np.array_equal(attack[2](x, y, indices=[]), x)


def test_bad_images_labels_and_indices(attack):
    poison = attack[2]
    x, y = images(4), [0, 1, 2, 3]
    bad = [
        (lambda: poison(x.astype(np.float32), y), "images must be uint8"),
        (lambda: poison(x.transpose(0, 3, 1, 2), y), "images must be uint8"),
        (lambda: poison(x[0], y), "images must be uint8"),
        (lambda: poison([1, 2], y), "images must be a numpy array or a tensor"),
        (lambda: poison(x[:0], []), "at least one image"),
        (lambda: poison(x, []), "at least one label"),
        (lambda: poison(x, [0, 1, 2]), "one label an image"),
        (lambda: poison(x, [0, 1, 2, 10]), r"labels must lie in \[0, 10\)"),
        (lambda: poison(x, [0, 1, 2, -1]), r"labels must lie in \[0, 10\)"),
        (lambda: poison(x, [0.0, 1.0, 2.0, 3.0]), "labels must be integers"),
        (lambda: poison(x, [[0, 1, 2, 3]]), "labels must be integers"),
        (lambda: poison(x, y, indices=[4]), r"indices must lie in \[0, 4\)"),
        (lambda: poison(x, y, indices=[1, 1]), "each image once"),
        (lambda: poison(x, y, indices=np.array([True, False, True, False])), "indices must be integers"),
        (lambda: poison(x, y, norm=0.0), "norm must be"),
        (lambda: poison(x, y, norm=float("nan")), "norm must be"),
    ]
    for call, message in bad:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lsp_perturbation([0], (32,)), "size must be"),
        (lambda: lsp_perturbation([0], SIZE, positions=[0, 1]), "one for each label"),
        (lambda: lsp_perturbation([0], SIZE, positions=[-1]), "positions must lie"),
        (lambda: lsp_perturbation([0], SIZE, patches=0), "patches must be"),
        (lambda: lsp_perturbation([0], (3, 32)), "patches must be"),
        (lambda: lsp_perturbation([0], SIZE, patches=1), "patches must be larger"),
        (lambda: lsp_perturbation([0], SIZE, class_separation=-1.0), "class_separation must be"),
        (lambda: lsp_perturbation([0], SIZE, classes=0), "classes must be"),
        (lambda: ar_coefficients(0), "classes must be"),
        (lambda: ar_perturbation([0], SIZE, crop=-1, coefficients=torch.zeros(1, 3, 3, 3)), "crop must be"),
        (lambda: ar_perturbation([1], SIZE, coefficients=torch.zeros(1, 3, 3, 3)), "classes of the coefficients"),
        (lambda: ar_perturbation([0], SIZE, coefficients=torch.zeros(1, 3, 3, 3)), "not zero everywhere"),
        (lambda: ar_perturbation([0], SIZE, coefficients=torch.ones(1, 3, 3, 3)), "0 at"),
        (lambda: ar_perturbation([0], SIZE, coefficients=torch.zeros(3, 3)), "list of float tensors"),
        (lambda: ar_perturbation([0], SIZE, coefficients=[]), "list of float tensors"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_reads_published_coefficient_files(tmp_path, coefficients):
    path = tmp_path / "ar.pt"
    torch.save(list(coefficients), path)
    assert torch.equal(read_ar_coefficients(path), coefficients)


@pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], {"a": torch.zeros(3)}, [torch.zeros(3, 3)], print])
def test_bad_coefficient_files_are_named(tmp_path, content):
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"bad\.pt must be"):
        read_ar_coefficients(path)


def test_a_missing_coefficient_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt must be"):
        read_ar_coefficients(tmp_path / "none.pt")
