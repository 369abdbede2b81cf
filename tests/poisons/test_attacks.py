"""The attacks by name: bounds after rounding, regenerability, what each one does, and what is refused."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import ndimage

from purifyloader.errors import ConfigError, InputError
from purifyloader.poisons import (
    ATTACKS,
    ar_coefficients,
    autoregressive,
    class_patterns,
    cuda,
    cuda_filters,
    lsp,
    make,
    ops,
    ops_pixels,
    urp,
)
from purifyloader.poisons.attacks import registry as attacks
from purifyloader.poisons.attacks.tap import PRESETS, TapSettings
from purifyloader.poisons.poisoned import Bound, Poisoned

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 12, 10, 3), np.uint8)
LABELS = (np.arange(60) * 7 % 5).astype(np.int64)
TRIGGER = (RNG.choice([-1, 1], (12, 10, 3)) * 16 / 255).astype(np.float32)
OPTIONS = {"narcissus": {"trigger": TRIGGER, "target_class": 2, "count": 5}}
GOLDEN_URP = [-3, -3, -5, 1, -3, -4, -1, 6, 6, 5, 3, 6]
GOLDEN_CUDA = [
    0.2876006899983622,
    1.0,
    0.18049429102102293,
    0.0177613437990658,
    0.19097548850113524,
    0.05297917997231707,
    0.00539446648908779,
    0.15102583860279992,
    0.143210465752054,
]
RANDOM = ["urp", "lsp", "ar", "cuda", "narcissus"]
ADDED = ["urp", "lsp", "ar", "ops", "cuda", "narcissus"]  # those that need no surrogate network


def made(name: str, seed: int = 0, images=IMAGES, labels=LABELS, **options) -> Poisoned:
    return make(name, (images, labels), seed, **{**OPTIONS.get(name, {}), **options})


@pytest.fixture(scope="module", params=ADDED)
def attack(request):
    return request.param, made(request.param)


# -- what holds for all of them ----------------------------------------------------------------------


def test_the_bound_is_kept_after_rounding(attack):
    name, poisoned = attack
    moved = poisoned.moved(IMAGES)
    assert moved.images == len(poisoned.poisoned)
    values = IMAGES[0].size
    if poisoned.bound is None:
        assert name == "cuda"
    elif poisoned.bound.norm == "linf":
        assert moved.linf <= 255 * poisoned.bound.epsilon + 1e-4  # whole levels: no rounding
    elif poisoned.bound.norm == "l0":
        assert moved.pixels <= poisoned.bound.epsilon
    else:
        assert moved.l2_max <= 255 * poisoned.bound.epsilon + 0.5 * values**0.5


def test_the_rest_of_the_set_is_untouched(attack):
    name, poisoned = attack
    assert poisoned.attack == name
    np.testing.assert_array_equal(poisoned.labels, LABELS)
    rest = np.setdiff1d(np.arange(60), poisoned.poisoned)
    np.testing.assert_array_equal(poisoned.images[rest], IMAGES[rest])


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_gives_the_same_again_and_another_seed_another(name):
    first, again, other = made(name), made(name), made(name, seed=1)
    np.testing.assert_array_equal(first.images, again.images)
    assert first.settings == again.settings
    assert not np.array_equal(first.images, other.images)


def test_settings_are_json_and_without_arrays(attack):
    name, poisoned = attack
    assert json.loads(json.dumps(dict(poisoned.settings), allow_nan=False)) == dict(poisoned.settings)
    # every option of the attack is said, so that the set can be made again
    assert set(ATTACKS[name].options) | {"seed"} <= set(poisoned.settings)


@pytest.mark.parametrize("name", ["urp", "lsp", "ar", "cuda"])
def test_an_image_does_not_depend_on_the_others(name):
    """Other images in the other places, and more of them, leave an image's poison as it is."""
    whole = made(name)
    others = RNG.integers(0, 256, IMAGES.shape, np.uint8)
    others[17], others[0] = IMAGES[17], IMAGES[0]
    np.testing.assert_array_equal(made(name, images=others).images[[0, 17]], whole.images[[0, 17]])
    np.testing.assert_array_equal(made(name, images=IMAGES[:18], labels=LABELS[:18]).images, whole.images[:18])


@pytest.mark.parametrize("name", ["urp", "lsp", "ar", "ops", "cuda"])
def test_a_share_is_poisoned_as_the_whole_would_be(name):
    whole, part = made(name), made(name, share=0.25)
    assert len(part.poisoned) == 15
    np.testing.assert_array_equal(part.images[part.poisoned], whole.images[part.poisoned])
    np.testing.assert_array_equal(made(name, count=15).images, part.images)
    # the images of a smaller share are among those of a larger one
    assert set(made(name, count=4).poisoned) < set(part.poisoned)
    assert made(name, count=4, seed=1).poisoned.tolist() != made(name, count=4).poisoned.tolist()
    assert len(made(name, share=0.001).poisoned) == 1


def test_chunks_leave_no_seam():
    images = np.tile(IMAGES[:, :4, :4], (20, 1, 1, 1))  # 1200, more than are changed together
    labels = np.tile(LABELS, 20)
    for name in ("urp", "cuda", "ops"):
        poisoned = made(name, images=images, labels=labels).images
        np.testing.assert_array_equal(poisoned, np.tile(poisoned[:60], (20, 1, 1, 1)))


def test_datasets_and_read_only_arrays_are_taken():
    poisoned = made("urp")
    images = IMAGES.copy()
    images.flags.writeable = False
    for name in ADDED:
        made(name, images=images)
    np.testing.assert_array_equal(make("lsp", poisoned).images, lsp(poisoned.images, LABELS, classes=5))
    image, label = poisoned[3]
    np.testing.assert_array_equal(np.asarray(image), poisoned.images[3])
    assert label == LABELS[3]


def test_the_table_is_closed_and_uniform():
    assert list(ATTACKS)[:6] == ADDED
    with pytest.raises(TypeError):
        ATTACKS["mine"] = ATTACKS["lsp"]  # type: ignore[index]
    for name, entry in ATTACKS.items():
        assert entry.name == name
        assert entry.kind in ("availability", "backdoor", "targeted")
        parameters = list(inspect.signature(entry.function).parameters.values())
        assert [p.name for p in parameters[:2]] == ["dataset", "seed"]
        assert parameters[1].default == 0
        keywords = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        assert all(p.kind in keywords for p in parameters[2:])


def test_the_options_of_an_attack_with_presets_are_those_of_its_settings():
    attack = attacks.find("tap")
    settings = {field.name: getattr(PRESETS["cpu"], field.name) for field in fields(TapSettings)}
    assert attack.options == {"preset": "cpu", "device": "cpu", "progress": False, **settings}
    attacks.check_options(attack, {"steps": 3})
    with pytest.raises(ConfigError, match="did you mean steps"):
        attacks.check_options(attack, {"stps": 3})


def test_the_functions_on_arrays_give_the_same():
    given = {"classes": 5, "seed": 1}
    pairs = {
        "urp": urp(IMAGES, LABELS, **given, distribution="gaussian"),
        "lsp": lsp(IMAGES, LABELS, **given, norm=0.7),
        "ar": autoregressive(IMAGES, LABELS, **given, norm=0.5),
        "cuda": cuda(IMAGES, LABELS, **given, blur=0.1, unit="centre"),
        "ops": ops(IMAGES, LABELS, classes=5, objective="code"),
    }
    options = {
        "urp": {"distribution": "gaussian"},
        "lsp": {"norm": 0.7},
        "ar": {"norm": 0.5},
        "cuda": {"blur": 0.1, "unit": "centre"},
        "ops": {"objective": "code"},
    }
    for name, want in pairs.items():
        np.testing.assert_array_equal(made(name, seed=1, **options.get(name, {})).images, want, err_msg=name)


@pytest.mark.parametrize("function", [urp, ops, cuda])
def test_tensors_come_back_as_tensors(function):
    x = torch.from_numpy(IMAGES.copy())
    got = function(x, LABELS, classes=5)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), function(IMAGES, LABELS, classes=5))
    np.testing.assert_array_equal(x.numpy(), IMAGES)


# -- URP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_a_class_has_one_pattern_of_whole_levels(distribution):
    patterns = class_patterns((12, 10), classes=5, distribution=distribution)
    assert patterns.shape == (5, 12, 10, 3)
    levels = 255 * patterns.numpy()
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    assert np.abs(levels.round()).max() == 8
    grey = np.full_like(IMAGES, 128)
    delta = urp(grey, LABELS, classes=5, distribution=distribution).astype(int) - 128
    np.testing.assert_array_equal(delta, levels.round().astype(int)[LABELS])
    # in every image the same, saturation aside
    np.testing.assert_array_equal(
        urp(IMAGES, LABELS, classes=5, distribution=distribution), np.clip(IMAGES + delta, 0, 255).astype(np.uint8)
    )
    assert len(np.unique(delta[[LABELS.tolist().index(c) for c in range(5)]], axis=0)) == 5


def test_patterns_are_spread_as_they_should():
    uniform = 255 * class_patterns((32, 32)).double()
    assert float(uniform.std()) == pytest.approx(8 / 3**0.5, rel=0.02)
    assert float(uniform.mean()) == pytest.approx(0, abs=0.1)
    gaussian = 255 * class_patterns((32, 32), distribution="gaussian").double()
    assert float((gaussian.abs() > 7.99).double().mean()) == pytest.approx(2 * 0.1742, rel=0.03)  # P(z > 7.5 / 8)
    torch.testing.assert_close(class_patterns((4, 4), classes=3), class_patterns((4, 4), classes=30)[:3])


def test_urp_golden_values():
    assert (255 * class_patterns((2, 2), seed=5)[7]).round().flatten().tolist() == GOLDEN_URP


def test_a_bound_between_levels_is_kept():
    poisoned = made("urp", epsilon=2.9 / 255)
    assert poisoned.moved(IMAGES).linf == 2
    assert poisoned.bound == Bound("linf", 2.9 / 255)


# -- OPS ---------------------------------------------------------------------------------------------


def brute_force(images, labels, objective):
    """The objective by trying every position and colour, in floating point of [0, 1] images."""
    found = {}
    for label in np.unique(labels):
        x = images[labels == label] / 255
        best = (-np.inf, None)
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                for colour in np.ndindex(2, 2, 2):
                    distance = np.abs(x[:, row, column] - colour)
                    if objective == "paper":
                        score = distance.sum(axis=1).mean() / distance.sum(axis=1).var()
                    else:
                        score = distance.mean() / distance.std()
                    taken = (row, column, colour) in found.values()
                    if score > best[0] * (1 + 1e-12) and not taken:
                        best = (score, (row, column, colour))
        found[int(label)] = best[1]
    return found


@pytest.mark.parametrize("objective", ["paper", "code"])
@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_what_trying_all_finds(seed, objective):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (24, 3, 4, 3), np.uint8)
    labels = np.arange(24) % 3
    want = brute_force(images, labels, objective)
    got = ops_pixels(images, labels, classes=3, objective=objective)
    for label, pixel in enumerate(got):
        assert (pixel.row, pixel.column, tuple(c // 255 for c in pixel.colour)) == want[label]
    poisoned = ops(images, labels, classes=3, objective=objective)
    for image, clean, label in zip(poisoned, images, labels, strict=True):
        clean = clean.copy()
        clean[got[label].row, got[label].column] = got[label].colour
        np.testing.assert_array_equal(image, clean)


def test_classes_never_share_a_pixel_and_colour():
    images = np.zeros((8, 2, 2, 3), np.uint8)  # no variance anywhere: white is furthest, the first corner the first
    pixels = ops_pixels(images, np.arange(8) % 4, classes=4)
    assert [(p.row, p.column, p.colour) for p in pixels] == [
        (0, 0, (255, 255, 255)),
        (0, 1, (255, 255, 255)),
        (1, 0, (255, 255, 255)),
        (1, 1, (255, 255, 255)),
    ]
    with pytest.raises(InputError, match="Each class needs a pixel and colour of its own"):
        ops_pixels(images[:, :1, :1], np.arange(8), classes=8)  # black changes nothing, seven colours do


def test_a_class_without_images_gets_no_pixel():
    pixels = ops_pixels(IMAGES[:6], [0, 0, 2, 2, 0, 2], classes=4)
    assert [pixel is None for pixel in pixels] == [False, True, False, True]
    assert np.array_equal(ops(IMAGES[:6], [0, 0, 2, 2, 0, 2], classes=4), ops(IMAGES[:6], [0, 0, 2, 2, 0, 2]))


def test_settings_tell_the_pixels():
    said = made("ops", seed=9).settings["pixels"]
    for label, pixel in enumerate(ops_pixels(IMAGES, LABELS, classes=5)):
        assert said[label] == {"row": pixel.row, "column": pixel.column, "colour": list(pixel.colour)}


# -- CUDA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["random", "centre"])
def test_cuda_is_a_convolution_rescaled(unit):
    filters = cuda_filters(classes=5, seed=2, unit=unit).numpy()
    got = cuda(IMAGES, LABELS, classes=5, seed=2, unit=unit)
    for image, clean, label in zip(got, IMAGES, LABELS, strict=True):
        planes = [ndimage.correlate(clean[:, :, c] / 255, filters[label], mode="constant") for c in range(3)]
        want = np.stack(planes, axis=2)
        assert np.abs(image - 255 * want / want.max()).max() <= 0.5 + 1e-4
        assert image.max() == 255


def test_filters_have_one_weight_of_one():
    filters = cuda_filters(classes=200, blur=0.3)
    assert filters.shape == (200, 3, 3)
    ones = (filters == 1).flatten(1)
    assert bool((ones.sum(dim=1) == 1).all())
    assert set(ones.int().argmax(dim=1).tolist()) == set(range(9))
    others = filters.flatten(1)[~ones]
    assert 0 < float(others.min()) < 0.01
    assert 0.29 < float(others.max()) < 0.3
    assert bool((cuda_filters(unit="centre")[:, 1, 1] == 1).all())
    assert torch.equal(cuda_filters(classes=3), filters[:3])
    assert not torch.equal(cuda_filters(classes=3, seed=1), filters[:3])


def test_cuda_golden_values():
    assert cuda_filters(classes=3, seed=5)[2].flatten().tolist() == pytest.approx(GOLDEN_CUDA, rel=1e-12)


def test_a_black_image_stays_black():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(cuda(black, [0, 1]), black)


# -- AR and Narcissus by name ------------------------------------------------------------------------


def test_published_coefficients_are_named_by_their_hash(tmp_path):
    coefficients = ar_coefficients(5, seed=1)
    torch.save(list(coefficients), tmp_path / "ar.pt")
    by_file, by_tensor = made("ar", coefficients=str(tmp_path / "ar.pt")), made("ar", coefficients=coefficients)
    np.testing.assert_array_equal(by_file.images, by_tensor.images)
    assert by_file.settings == by_tensor.settings
    assert set(by_file.settings["coefficients"]) == {"sha256"}
    assert str(tmp_path) not in json.dumps(dict(by_file.settings))
    assert not np.array_equal(by_file.images, made("ar").images)


def test_narcissus_poisons_the_target_class_alone(tmp_path):
    poisoned = made("narcissus")
    assert poisoned.target_class == 2
    assert len(poisoned.poisoned) == 5
    assert set(LABELS[poisoned.poisoned]) == {2}
    np.testing.assert_array_equal(poisoned.trigger.delta, TRIGGER)
    assert 255 * poisoned.bound.epsilon == pytest.approx(16)
    # a file is in units of [-1, 1] images
    np.save(tmp_path / "trigger.npy", 2 * TRIGGER.transpose(2, 0, 1)[None])
    by_file = made("narcissus", trigger=tmp_path / "trigger.npy")
    np.testing.assert_array_equal(by_file.images, poisoned.images)
    assert by_file.settings == poisoned.settings


def test_narcissus_takes_a_share_of_the_set_or_of_the_class():
    given = {"trigger": torch.from_numpy(TRIGGER), "target_class": 2}
    assert len(make("narcissus", (IMAGES, LABELS), **given).poisoned) == 1  # 1 % of 60, and at least one
    assert len(make("narcissus", (IMAGES, LABELS), **given, share=0.1).poisoned) == 6
    assert len(make("narcissus", (IMAGES, LABELS), **given, share=0.5, share_of="class").poisoned) == 6
    with pytest.raises(InputError, match=r"no more than the 12 images of class 2. Got 0.5 of the 60 images"):
        make("narcissus", (IMAGES, LABELS), **given, share=0.5)


# -- what is refused ---------------------------------------------------------------------------------

X = (IMAGES, LABELS)
N = OPTIONS["narcissus"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make("lps", X), ConfigError, "An attack is one of urp, lsp, ar"),
        (lambda: make("lsp", X, patch=3), ConfigError, "Got 'patch': did you mean patches"),
        (lambda: make("ops", X, epsilon=1), ConfigError, "Got 'epsilon': leave it out"),
        (lambda: make("narcissus", X), ConfigError, "needs trigger and target_class"),
        (lambda: make("lsp", X, share=0.5, count=3), ConfigError, "share or count, not both"),
        (lambda: make("lsp", X, share=0), InputError, "share must be above 0"),
        (lambda: make("lsp", X, share=1.5), InputError, "share must be above 0"),
        (lambda: make("lsp", X, share="all"), InputError, "share must be above 0"),
        (lambda: make("lsp", X, count=0), InputError, "count must be from 1 to the 60 images"),
        (lambda: make("lsp", X, count=61), InputError, "count must be from 1 to the 60 images"),
        (lambda: make("lsp", X, count=2.5), InputError, "count must be from 1 to the 60 images"),
        (lambda: make("urp", X, seed=1.5), InputError, "seed must be an integer"),
        (lambda: make("urp", X, epsilon=0.001), InputError, "epsilon must be from 1/255 to 1"),
        (lambda: make("urp", X, epsilon=8), InputError, "epsilon must be from 1/255 to 1"),
        (lambda: make("urp", X, epsilon="8"), InputError, "epsilon must be a finite number"),
        (lambda: make("urp", X, distribution="normal"), InputError, "distribution must be uniform or gaussian"),
        (lambda: make("lsp", X, norm="1"), InputError, "norm must be a finite number"),
        (lambda: make("ops", X, objective="mean"), InputError, "objective must be one of 'paper', 'code'"),
        (lambda: make("cuda", X, blur=-1), InputError, "blur must be a finite number"),
        (lambda: make("cuda", X, unit="corner"), InputError, "unit must be one of 'random', 'centre'"),
        (lambda: make("ar", X, coefficients=3), InputError, "coefficients must be a list of float tensors"),
        (lambda: make("ar", X, coefficients="none.pt"), InputError, "none.pt must be a .pt file"),
        (lambda: make("narcissus", X, **{**N, "trigger": [1]}), InputError, "trigger must be a .npy file"),
        (lambda: make("narcissus", X, **{**N, "trigger": TRIGGER[:3]}), InputError, "shape of the images"),
        (lambda: make("narcissus", X, **{**N, "trigger": 255 * TRIGGER}), InputError, "divide numbers on the 0-255"),
        (lambda: make("narcissus", X, **{**N, "trigger": IMAGES[0]}), InputError, "trigger must be in floating point"),
        (lambda: make("narcissus", X, **{**N, "trigger": "none.npy"}), InputError, "none.npy"),
        (lambda: make("narcissus", X, **{**N, "target_class": 5}), InputError, "one of the classes 0 to 4"),
        (lambda: make("narcissus", X, **{**N, "target_class": "2"}), InputError, "one of the classes 0 to 4"),
        (lambda: make("narcissus", X, **{**N, "count": 13}), InputError, "the 12 images of class 2"),
        (lambda: make("narcissus", X, **{**N, "share_of": "test"}), InputError, "share_of must be set or class"),
        (lambda: make("lsp", (IMAGES[..., :1], LABELS)), InputError, "An attack poisons colour images"),
        (lambda: make("lsp", 3), InputError, "no map-style dataset"),
        (lambda: urp(IMAGES, LABELS, classes=4), InputError, r"labels must lie in \[0, 4\)"),
        (lambda: ops(IMAGES, LABELS[:3]), InputError, "one label an image"),
        (lambda: ops(IMAGES.astype(float), LABELS), InputError, "images must be uint8"),
        (lambda: cuda(IMAGES, LABELS, indices=[1, 1]), InputError, "each image once"),
        (lambda: cuda_filters(classes=0), InputError, "classes must be a positive integer"),
        (lambda: class_patterns((3,)), InputError, "size must be"),
        (lambda: Bound("l1", 1.0), InputError, "A bound is linf, l2 or l0"),
    ],
)
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()
