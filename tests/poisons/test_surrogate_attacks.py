"""Attacks with a surrogate network: the descent, the bound in 8 bits, and the property that defines each attack."""

from __future__ import annotations

import inspect
import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from purifyloader.errors import InputError, TrainingError
from purifyloader.poisons.attacks.clean import opened
from purifyloader.poisons.attacks.efp import efp, nearest_class
from purifyloader.poisons.attacks.em import em
from purifyloader.poisons.attacks.pgd import direction, lengths, pgd, project, random_start, round_within
from purifyloader.poisons.attacks.presets import choose
from purifyloader.poisons.attacks.rem import rem
from purifyloader.poisons.attacks.sep import sep
from purifyloader.poisons.attacks.surrogate import Surrogate, Training, train, worst_case
from purifyloader.poisons.attacks.tap import tap
from purifyloader.poisons.poisoned import Bound
from purifyloader.victims.augment import crop_and_flip
from purifyloader.victims.networks import resnet9

rem_module, sep_module, tap_module = (inspect.getmodule(attack) for attack in (rem, sep, tap))

LINF, L2 = Bound("linf", 8 / 255), Bound("l2", 0.5)

# A network of seconds: no crops, as they would tear the patterns of the images apart.
SMALL = {"width": 4, "batch_size": 16, "pad": 0, "flip": False, "lr": 0.1, "bfloat16": False}
ATTACKS = {
    "em": (em, {"rounds": 10, "train_steps": 10, "steps": 3, "step": 0.3}),
    "em, class-wise": (em, {"rounds": 10, "train_steps": 10, "class_wise": True}),
    "tap": (tap, {"epochs": 12, "steps": 10, "step": 0.2}),
    "tap, untargeted": (tap, {"epochs": 12, "steps": 10, "step": 0.2, "targeted": False}),
    "sep": (sep, {"epochs": 16, "steps": 7, "step": 0.25, "checkpoints": 3, "shift": 3}),
    "sep, labels": (sep, {"epochs": 14, "steps": 7, "step": 0.25, "checkpoints": 3, "shift": 3, "align": "labels"}),
    "rem": (rem, {"train_steps": 35, "steps": 1, "step": 0.5, "attack_steps": 1, "attack_step": 1.0, "lr": 0.2}),
    "efp": (efp, {"epochs": 10, "steps": 10, "step": 0.2, "attack_steps": 1, "attack_step": 1.0, "variant": "push"}),
    "efp, pull": (
        efp,
        {"epochs": 12, "steps": 10, "step": 0.2, "attack_steps": 1, "attack_step": 1.0, "variant": "pull"},
    ),
}
QUICK = {
    "em": (em, {"rounds": 2, "train_steps": 2, "steps": 2, "stop_accuracy": 1.0}),
    "em, class-wise": (em, {"rounds": 2, "train_steps": 2, "class_wise": True, "stop_accuracy": 1.0}),
    "tap": (tap, {"epochs": 1, "steps": 2, "augment": True, "pad": 2, "flip": True}),
    "sep": (sep, {"epochs": 1, "steps": 2, "checkpoints": 2}),
    "rem": (rem, {"train_steps": 2, "steps": 2, "views": 2, "pad": 2, "flip": True}),
    "efp": (efp, {"epochs": 1, "steps": 2}),
}


def patterns(count=48, classes=4, size=8, strength=8, channels=3):
    """Images of a faint pattern a class under noise, which 8/255 can turn into another class's."""
    draw = np.random.default_rng(0)
    labels = np.arange(count) % classes
    pattern = draw.choice([-1, 1], (classes, 4, 4, channels)).repeat(size // 4, 1).repeat(size // 4, 2)
    images = 128 + strength * pattern[labels] + draw.normal(0, 10, (count, size, size, channels))
    return images.clip(0, 255).round().astype(np.uint8), labels


DATA = patterns(strength=5)
FAINT = patterns(strength=2)  # which a network learns no faster than the noise of EM
LARGE = patterns(32, size=16)  # whose noise a network learns at its worst


@pytest.fixture(scope="module")
def made():
    """name -> (clean images, the poisoned set, the surrogates that it was made with), each made once."""
    cache = {}

    def get(name):
        if name not in cache:
            attack, options = ATTACKS[name]
            module, data = inspect.getmodule(attack), {"em": FAINT, "re": LARGE}.get(name[:2], DATA)
            with pytest.MonkeyPatch.context() as patch:
                networks = record(patch, module)
                poisoned = attack(data, **{**SMALL, **options})
            cache[name] = data[0], poisoned, [network.eval() for network in networks]
        return cache[name]

    return get


def record(patch, module):
    """A list that gets the networks which an attack of this module trains."""
    trained = []

    class Recorded(Training):
        def __init__(self, *args):
            super().__init__(*args)
            trained.append(self.network)

    def recorded(*args, **options):
        networks = train(*args, **options)
        trained.extend(networks)
        return networks

    patch.setattr(module, *(("train", recorded) if hasattr(module, "train") else ("Training", Recorded)))
    return trained


def small_victims(patch):
    """A list that gets the names of the victims that surrogates are made of; each is a small network in truth."""
    names = []

    def small(name, classes):
        names.append(name)
        return resnet9(classes, 4)

    patch.setattr("purifyloader.poisons.attacks.surrogate.victim", small)
    return names


def quick(name, data=None, seed=0, **options):
    attack, defaults = QUICK[name]
    return attack(patterns(32) if data is None else data, seed, **{**SMALL, **defaults, **options})


def as_batch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


# Projected gradient descent


def linear_model(x_BD, weights_DK, labels):
    """Cross-entropy of a linear model and its gradient, by hand: (softmax - one-hot) W'."""
    logits = x_BD @ weights_DK
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    gradient = (shares - np.eye(weights_DK.shape[1])[labels]) @ weights_DK.T
    return gradient


@pytest.mark.parametrize("minimise", [False, True])
@pytest.mark.parametrize("bound", [LINF, L2], ids=["linf", "l2"])
def test_pgd_is_the_formula_on_a_linear_model(bound, minimise):
    draw = np.random.default_rng(1)
    x, weights, labels = draw.uniform(size=(5, 12)), draw.normal(size=(12, 3)), np.array([0, 1, 2, 0, 1])
    x[0, :6] = 0.0  # where the range of pixels binds
    delta = np.zeros_like(x)
    for _ in range(7):
        step = linear_model(x + delta, weights, labels) * (-1 if minimise else 1)
        if bound.norm == "linf":
            delta = np.clip(delta + 0.012 * np.sign(step), -bound.epsilon, bound.epsilon)
        else:
            delta = delta + 0.012 * 20 * step / np.linalg.norm(step, axis=1, keepdims=True)
            delta *= np.minimum(1, bound.epsilon / np.linalg.norm(delta, axis=1, keepdims=True))
        delta = np.clip(x + delta, 0, 1) - x
    w, y = torch.from_numpy(weights), torch.from_numpy(labels)
    got = pgd(
        lambda x_BCHW: F.cross_entropy(x_BCHW.flatten(1) @ w, y, reduction="none"),
        torch.from_numpy(x).reshape(5, 3, 2, 2),
        bound,
        steps=7,
        step_size=0.012 * (1 if bound.norm == "linf" else 20),
        minimise=minimise,
    )
    assert got.dtype == torch.float64
    assert np.allclose(got.flatten(1).numpy(), delta, rtol=0, atol=1e-12)


def test_pgd_takes_an_image_alone_as_among_others():
    weights = torch.linspace(-1, 1, 27).reshape(1, 3, 3, 3)
    x = torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def loss(x_BCHW):
        return (x_BCHW * weights).sum(dim=(1, 2, 3)).sin()

    for bound in (LINF, L2):
        together = pgd(loss, x, bound, steps=4, step_size=0.01)
        alone = pgd(loss, x[2:3], bound, steps=4, step_size=0.01)
        assert torch.equal(together[2:3], alone)


def test_no_steps_give_the_start_within_the_range_of_pixels():
    x, start = torch.full((1, 3, 2, 2), 0.99), torch.full((1, 3, 2, 2), 0.03)
    got = pgd(lambda x: x.sum(), x, LINF, steps=0, step_size=1.0, start=start)
    assert torch.allclose(x + got, torch.ones(()), atol=1e-7)


def test_a_zero_gradient_does_not_move():
    x = torch.rand(2, 3, 4, 4)
    for bound in (LINF, L2):
        assert not pgd(lambda x: 0 * x.sum(dim=(1, 2, 3)), x, bound, steps=3, step_size=0.1).any()


@pytest.mark.parametrize("bound", [LINF, L2], ids=["linf", "l2"])
def test_projection(bound):
    delta = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 40).reshape(
        -1, 1, 1, 1
    )
    inside = project(delta, bound)
    size = inside.abs().amax(dim=(1, 2, 3)) if bound.norm == "linf" else lengths(inside).flatten()
    was = delta.abs().amax(dim=(1, 2, 3)) if bound.norm == "linf" else lengths(delta).flatten()
    assert bool((size <= bound.epsilon * (1 + 1e-6)).all())
    assert torch.allclose(project(inside, bound), inside, rtol=1e-6)
    assert torch.equal(inside[was < bound.epsilon], delta[was < bound.epsilon])  # what is within stays
    assert torch.allclose(size[was > bound.epsilon], torch.tensor(bound.epsilon))  # what is not lands on the edge
    assert bool((inside * delta >= 0).all())
    # no other point of the ball is nearer
    other = project(torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)), bound)
    assert bool((lengths(inside - delta) <= lengths(other - delta)).all())


def test_directions_have_unit_length_and_ascend():
    gradient = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(direction(gradient, LINF), gradient.sign())
    assert torch.allclose(lengths(direction(gradient, L2)), torch.ones(8, 1, 1, 1))


def test_random_starts_are_within_the_bound_and_fill_it():
    u = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    linf, l2 = random_start(u, LINF), random_start(u, L2)
    assert float(linf.abs().max()) <= LINF.epsilon
    assert float(linf.abs().mean()) == pytest.approx(LINF.epsilon / 2, rel=0.05)
    assert torch.allclose(lengths(l2), torch.tensor(L2.epsilon))


@pytest.mark.parametrize("epsilon", [1 / 255, 4.6 / 255, 8 / 255, 0.2])
def test_levels_are_within_an_linf_bound(epsilon):
    delta = project(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)), Bound("linf", epsilon))
    levels = round_within(delta, Bound("linf", epsilon))
    assert levels.dtype == torch.int16
    assert int(levels.abs().max()) == int(epsilon * 255 + 1e-6)
    assert float((levels - delta * 255).abs().max()) < 1


@pytest.mark.parametrize("epsilon", [1 / 255, 0.1, 1.0, 5.0])
def test_levels_are_within_an_l2_bound(epsilon):
    delta = random_start(torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)), Bound("l2", epsilon))
    levels = round_within(delta, Bound("l2", epsilon))
    length = lengths(levels.double()) / 255
    assert float(length.max()) <= epsilon * (1 + 1e-6)
    if epsilon >= 1:  # where there is more than rounding
        assert float(length.min()) > 0.97 * epsilon


def test_a_bound_under_a_level_and_a_diverged_perturbation_are_refused():
    with pytest.raises(InputError, match="at least one level"):
        round_within(torch.zeros(1, 3, 2, 2), Bound("linf", 0.9 / 255))
    with pytest.raises(InputError, match="must be finite"):
        round_within(torch.full((1, 3, 2, 2), torch.nan), LINF)


# The surrogate


def test_crops_are_windows_of_the_padded_image_and_flips_mirror():
    draw = torch.Generator().manual_seed(0)
    x, u = torch.rand(30, 3, 8, 10, generator=draw), torch.rand(30, 3, generator=draw)
    got = crop_and_flip(x, u, 2)
    for image, (row, column, flip), view in zip(x, u.tolist(), got, strict=True):
        top, left = int(row * 5), int(column * 5)
        window = F.pad(image, (2,) * 4)[:, top : top + 8, left : left + 10]
        assert torch.equal(view, window.flip(2) if flip < 0.5 else window)
    assert torch.equal(crop_and_flip(x, u, 0, flip=False), x)


def test_a_gradient_goes_through_crop_and_flip():
    x = torch.rand(4, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    u = torch.tensor([[0.0, 0.99, 0.1], [0.99, 0.0, 0.9], [0.5, 0.5, 0.4], [0.2, 0.7, 0.6]])
    assert torch.autograd.gradcheck(lambda x: crop_and_flip(x, u, 2), x)


def test_features_are_what_the_last_layer_reads():
    with opened(patterns(8), "tap", 0, "cpu", False) as clean:
        network = Surrogate(clean, choose(tap_module.PRESETS, "cpu", SMALL), 0).eval()
        x = clean.images(torch.arange(8))
        scaled = 0.125 * network.network.linear(network.features(x))
        assert torch.allclose(scaled, network(x), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_surrogate_normalises_by_the_images(channels):
    images, labels = patterns(8, channels=channels)
    with opened((images, labels), "tap", 0, "cpu", False) as clean:
        network = Surrogate(clean, choose(tap_module.PRESETS, "cpu", SMALL), 0)
    x = images.reshape(-1, channels) / 255
    assert np.allclose(network.mean.flatten().numpy(), x.mean(axis=0), rtol=1e-6)
    assert np.allclose(network.std.flatten().numpy(), x.std(axis=0), rtol=1e-5)


def test_checkpoints_are_equidistant_and_the_last_is_the_end():
    with opened(patterns(32), "sep", 0, "cpu", False) as clean:
        settings = choose(sep_module.PRESETS, "cpu", {**SMALL, "epochs": 3})
        (end,) = train(clean, settings, 0)
        three = train(clean, settings, 0, checkpoints=3)
        six = train(clean, settings, 0, checkpoints=6)
    assert len(three) == 3
    for network, same in ((three[-1], end), (six[-1], end), (six[1], three[0]), (six[3], three[1])):
        for weight, same_weight in zip(network.state_dict().values(), same.state_dict().values(), strict=True):
            assert torch.equal(weight, same_weight)


# What every attack keeps to


@pytest.mark.parametrize("name", ATTACKS)
def test_images_of_8_bits_are_within_the_bound(made, name):
    images, poisoned, _ = made(name)
    assert poisoned.bound == Bound("linf", 8 / 255)
    moved = poisoned.moved(images)
    assert moved.linf == 8
    assert moved.images == len(images)
    assert 0.3 < moved.down < 0.7  # no sign is lost
    assert np.array_equal(poisoned.labels, np.arange(len(images)) % 4)
    assert np.array_equal(poisoned.poisoned, np.arange(len(images)))


def test_grey_images_and_images_of_other_sides():
    images, labels = patterns(32, size=12, channels=1)
    assert quick("tap", (images[:, :, :10], labels)).images.shape == (32, 12, 10, 1)


def test_the_full_preset_trains_a_resnet18():
    poisoned = tap(patterns(8, size=8), preset="full", epochs=1, steps=1, batch_size=8)
    assert poisoned.settings["network"] == "resnet18"
    assert poisoned.settings["shift"] == 3


def test_a_dataset_of_pil_images_and_a_poisoned_one_are_taken():
    first = quick("tap")
    again = quick("tap", first)
    assert np.array_equal(again.images, quick("tap", [first[i] for i in range(len(first))]).images)


def test_progress_is_shown_when_asked(capsys):
    quick("tap", progress=True)
    assert "tap" in capsys.readouterr().err
    quick("tap")
    assert capsys.readouterr().err == ""


# What defines each attack


def losses(network, images, labels=DATA[1]):
    with torch.no_grad():
        return float(F.cross_entropy(network(as_batch(images)), torch.from_numpy(labels)))


def shares(networks, images, labels):
    with torch.no_grad():
        return [float((network(as_batch(images)).argmax(dim=1).numpy() == labels).mean()) for network in networks]


@pytest.mark.parametrize("name", ["em", "em, class-wise"])
def test_em_is_easy_to_learn_and_leaves_little_to_learn_of_the_image(made, name):
    images, poisoned, (network,) = made(name)
    assert losses(network, poisoned.images) < 0.5
    assert losses(network, images) > 2 * losses(network, poisoned.images)
    assert poisoned.settings["accuracy"] >= poisoned.settings["stop_accuracy"]
    assert poisoned.settings["rounds_taken"] <= 10


def test_class_wise_noise_is_one_a_class(made):
    images, poisoned, _ = made("em, class-wise")
    delta = poisoned.images.astype(int) - images
    for label in range(4):
        of_class = delta[label::4]
        assert (of_class == of_class[0]).all()  # these images are nowhere near black or white
    assert not (delta[0] == delta[1]).all()


def test_em_says_when_it_stops_short(caplog):
    with caplog.at_level(logging.WARNING):
        poisoned = quick("em", rounds=1, train_steps=1, steps=1)
    assert "Raise rounds or train_steps" in caplog.text
    assert poisoned.settings["rounds_taken"] == 1
    assert poisoned.settings["accuracy"] < 1


def test_tap_is_called_the_target_class(made):
    images, poisoned, networks = made("tap")
    target = (DATA[1] + 3) % 4
    assert shares(networks, images, DATA[1])[0] > 0.9
    assert shares(networks, poisoned.images, target)[0] > 0.8
    assert poisoned.settings["called_target"] == shares(networks, poisoned.images, target)[0]


def test_untargeted_tap_is_called_anything_else(made):
    _, poisoned, networks = made("tap, untargeted")
    assert shares(networks, poisoned.images, DATA[1])[0] < 0.1
    assert "called_target" not in poisoned.settings


@pytest.mark.parametrize("name", ["sep", "sep, labels"])
def test_sep_is_called_the_target_class_by_most_checkpoints(made, name):
    _, poisoned, networks = made(name)
    called_target = shares(networks, poisoned.images, (DATA[1] + 3) % 4)
    assert len(called_target) == 3
    assert sum(share > 0.7 for share in called_target) >= 2
    assert called_target == poisoned.settings["called_target"]
    assert sum(share < 0.1 for share in shares(networks, poisoned.images, DATA[1])) >= 2


def test_rem_stays_easy_to_learn_at_worst(made):
    images, poisoned, (network,) = made("rem")
    settings = choose(rem_module.PRESETS, "cpu", {**SMALL, **ATTACKS["rem"][1]})
    draw, worst = torch.Generator().manual_seed(9), {}
    for name, x in (("poisoned", as_batch(poisoned.images)), ("clean", as_batch(images))):
        a = worst_case(network, x, torch.from_numpy(LARGE[1]), settings, draw)
        assert float(a.abs().max()) <= 4 / 255 + 1e-6
        with torch.no_grad():
            plain, worst[name] = (
                float(F.cross_entropy(network(image), torch.from_numpy(LARGE[1]))) for image in (x, x + a)
            )
        assert worst[name] > plain
    assert worst["poisoned"] < 0.5
    assert worst["clean"] > worst["poisoned"] + 0.5
    assert poisoned.settings["worst_loss"] == pytest.approx(worst["poisoned"], abs=0.1)


@pytest.mark.parametrize(("name", "nearer"), [("efp", False), ("efp, pull", True)])
def test_efp_moves_robust_features(made, name, nearer):
    images, poisoned, (network,) = made(name)
    with torch.no_grad():
        before, after = (network.features(as_batch(x)) for x in (images, poisoned.images))
    mean = torch.stack([before[DATA[1] == label].mean(dim=0) for label in range(4)])
    towards = mean[nearest_class(mean)[DATA[1]]] if nearer else mean[DATA[1]]
    change = (after - towards).norm(dim=1) - (before - towards).norm(dim=1)
    assert float(((change < 0) == nearer).float().mean()) > 0.9


def test_the_nearest_class_is_another():
    mean = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [5.0, 0.1]])
    assert nearest_class(mean).tolist() == [1, 0, 3, 2]


# Bad input


@pytest.mark.parametrize("name", QUICK)
def test_bad_datasets(name):
    images, labels = patterns(8)
    bad = [
        ((images.astype(np.float32) / 255, labels), "Images are uint8"),
        ((images, labels[:4]), "one label"),
        ((images, np.zeros(8, int)), "two classes or more"),
        ((images[:, :4], labels), "8 x 8 or more"),
        (3, "map-style dataset"),
    ]
    for data, message in bad:
        with pytest.raises(InputError, match=message):
            quick(name, data)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("em", {"preset": "huge"}, "preset must be one of cpu, full"),
        ("em", {"colour": 1}, "The options of this attack are norm, .* Got 'colour'"),
        ("em", {"device": "abacus"}, "device of this machine"),
        ("em", {"seed": 1.5}, "seed must be an integer"),
        ("tap", {"seed": "one"}, "seed must be an integer"),
        ("em", {"norm": "l1"}, "norm must be one of 'linf', 'l2'"),
        ("em", {"epsilon": 0.5 / 255}, "epsilon must be 0.003922 to 1 in units of"),
        ("em", {"epsilon": 8}, "Got 8: divide levels by 255"),
        ("em", {"norm": "l2", "epsilon": float("inf")}, "epsilon must be"),
        ("em", {"epsilon": float("nan")}, "epsilon must be"),
        ("em", {"epsilon": "8/255"}, "epsilon must be"),
        ("em", {"steps": 0}, "steps must be a positive integer"),
        ("em", {"steps": 2.0}, "steps must be a positive integer"),
        ("em", {"steps": True}, "steps must be a positive integer"),
        ("em", {"step": 0.0}, "step must be"),
        ("em", {"network": "resnet1000"}, "network must be one of 'resnet9'"),
        ("em", {"width": 0}, "width must be"),
        ("em", {"batch_size": 1}, "batch_size must be an integer of 2"),
        ("em", {"lr": -1.0}, "lr must be"),
        ("em", {"momentum": 1.5}, "momentum must be a finite number from 0 to 1"),
        ("em", {"weight_decay": -1}, "weight_decay must be"),
        ("em", {"pad": -1}, "pad must be"),
        ("em", {"flip": 1}, "flip must be True or False"),
        ("em", {"class_wise": "yes"}, "class_wise must be True or False"),
        ("em", {"stop_accuracy": 99}, "stop_accuracy must be a finite number from 0 to 1"),
        ("em", {"rounds": 0}, "rounds must be"),
        ("em", {"train_steps": 0}, "train_steps must be"),
        ("tap", {"epochs": 0}, "epochs must be"),
        ("tap", {"targeted": None}, "targeted must be"),
        ("tap", {"shift": 4}, "shift must turn each of the 4 classes into another"),
        ("tap", {"shift": 0}, "shift must be a positive integer"),
        ("sep", {"shift": 8}, "shift must turn"),
        ("sep", {"align": "pixels"}, "align must be one of 'labels', 'features'"),
        ("sep", {"checkpoints": 0}, "checkpoints must be"),
        ("sep", {"checkpoints": 3}, "as many checkpoints as steps of training, 2. Got 3"),
        ("rem", {"views": 0}, "views must be"),
        ("rem", {"attack_epsilon": -1.0}, "attack_epsilon must be"),
        ("rem", {"attack_steps": 0}, "attack_steps must be"),
        ("rem", {"attack_step": 0}, "attack_step must be"),
        ("efp", {"variant": "shove"}, "variant must be one of 'push', 'pull'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message):
        quick(name, **options)


@pytest.mark.parametrize("name", ["sep", "efp"])
def test_a_class_without_an_image_has_no_mean_features(name):
    images, labels = patterns(32)
    with pytest.raises(InputError, match="Got none of class 1"):
        quick(name, (images, np.where(labels == 1, 2, labels)))


def test_a_diverging_surrogate_is_named():
    with pytest.raises(TrainingError, match="loss must be finite: lower lr"):
        quick("tap", lr=1e30, epochs=4)
