"""What a purifier means for a certificate: every kind and composition, and that what is said of them is so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from purifyloader import pretrained, recipes
from purifyloader.certify.noising import Noised, models_of, noised, says_what_it_does_first, shared_images
from purifyloader.core import noise
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.hashes import hashes_as_text, hashes_of_text, image_hashes
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.registry import find
from purifyloader.purifiers import (
    BitDepth,
    Chain,
    Coin,
    Compensation,
    DenoiseOnce,
    Diffuse,
    EnergyAbove,
    Grayscale,
    Jpeg,
    Langevin,
    Purifier,
    Repeat,
    Resize,
    Tiles,
    Where,
)
from purifyloader.purifiers.base import KINDS
from tests.conftest import random_images, tiny_denoiser, tiny_energy
from tests.purifiers.test_denoise_once_exact import Watching


class Plugin(Purifier):
    """Of another package: nobody here knows what it does first."""

    kind = "plugin"

    def config(self) -> dict:
        return {"kind": self.kind}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return x_BCHW


class Sharpened(DenoiseOnce):
    """A subclass that does something before the noise."""

    def run_chunk(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return super().run_chunk(2 * x_BCHW - 0.5, seeds_B)


class Loose(Watching):
    """A denoiser that takes any noise, none too."""

    sigma_range = (0.0, 10.0)


def once(sigma: float = 0.1) -> DenoiseOnce:
    return DenoiseOnce(Watching(), sigma, compute_batch=16)


def where(purifier: Purifier, **level: float) -> Where:
    return Where(EnergyAbove(tiny_energy(), **(level or {"threshold": 0.0}), compute_batch=16), purifier)


def walk() -> Langevin:
    return Langevin(tiny_energy(), 1, compute_batch=16)


@dataclass
class Case:
    make: Callable[[], Purifier]
    sigma: float | None = None
    selected: bool = False
    because: tuple[str, ...] = ()


T75 = math.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[74] - 1) / 2  # PureGen's t = 75

CASES = {
    # noise comes first
    "denoise-once": Case(once, 0.1),
    "diffuse-sigma": Case(lambda: Diffuse(Watching(), sigma=0.2), 0.2),
    "diffuse-steps": Case(lambda: Diffuse(Watching(), sigma=0.2, steps=5), 0.2),
    "diffuse-ddim": Case(lambda: Diffuse(Watching(), sigma=0.2, steps=5, sampler="ddim"), 0.2),
    "diffuse-t": Case(lambda: recipes.puregen_ddpm(75, model=Watching()), T75),
    "compensation-colour": Case(lambda: Compensation(0.0, 0.05), 0.05),
    "compensation-whole": Case(lambda: Compensation(0, 1), 1.0),
    "chain": Case(lambda: Chain(once(0.25), Jpeg(10), BitDepth(2)), 0.25),
    "chain-of-one": Case(lambda: Chain(once(0.25)), 0.25),
    "chain-of-chains": Case(lambda: Chain(Chain(Chain(once(0.25)), Coin()), Grayscale()), 0.25),
    "chain-noised-twice": Case(lambda: Chain(once(0.25), once(0.5)), 0.25),
    "chain-compensated": Case(lambda: Chain(once(0.25), Compensation(0.4, 0.05)), 0.25),
    "chain-then-walk": Case(lambda: Chain(once(0.25), walk()), 0.25),
    "chain-then-tiles": Case(lambda: Chain(once(0.25), Tiles(once(0.5), 8)), 0.25),
    "chain-then-resize": Case(lambda: Chain(once(0.25), Resize(8)), 0.25),
    "chain-then-plugin": Case(lambda: Chain(once(0.25), Plugin()), 0.25),
    "chain-then-where": Case(lambda: Chain(once(0.25), where(once(0.5))), 0.25),
    "chain-then-where-share": Case(lambda: Chain(once(0.25), where(walk(), k=0.5)), None, True, ("Where",)),
    "repeat": Case(lambda: Repeat(once(0.25), 3), 0.25),
    "repeat-of-chain": Case(lambda: Repeat(Chain(once(0.25), walk()), 3), 0.25),
    "chain-of-repeat": Case(lambda: Chain(Repeat(Diffuse(Watching(), sigma=0.2), 2), Jpeg()), 0.2),
    # it does not
    "bit-depth": Case(BitDepth, because=("BitDepth",)),
    "coin": Case(Coin, because=("Coin",)),
    "grayscale": Case(Grayscale, because=("Grayscale",)),
    "jpeg": Case(Jpeg, because=("Jpeg",)),
    "langevin": Case(walk, because=("Langevin",)),
    "compensation": Case(Compensation, because=("Compensation, which makes images grey (p=0.4)",)),
    "compensation-rarely": Case(lambda: Compensation(1e-9, 0.05), because=("Compensation",)),
    "compensation-silent": Case(lambda: Compensation(0, 0), because=("Compensation with noise of sigma 0",)),
    "denoise-once-silent": Case(lambda: DenoiseOnce(Loose(), 0), because=("DenoiseOnce with noise of sigma 0",)),
    "resize": Case(lambda: Resize(8), because=("Resize",)),
    "resize-once": Case(lambda: Chain(Resize(8), once()), because=("Resize",)),
    "tiles": Case(lambda: Tiles(once(), 8), because=("Tiles",)),
    "tiles-apart": Case(lambda: Tiles(once(), 8, 0), because=("Tiles",)),
    "tiles-of-jpeg": Case(lambda: Tiles(Jpeg(), 8), because=("Tiles", "Jpeg")),
    "tiles-then-where": Case(lambda: Chain(Tiles(once(), 8), where(once())), because=("Tiles",)),
    "resize-tiles": Case(lambda: recipes.denoise_once(Watching(), 0.1, resize=16, tile=8), because=("Resize", "Tiles")),
    "walk-once": Case(lambda: Chain(walk(), once()), because=("Langevin",)),
    "jpeg-once": Case(lambda: Chain(Jpeg(), once()), because=("Jpeg",)),
    "much-before": Case(lambda: Chain(Jpeg(50), Chain(Jpeg(10), Coin()), once()), because=("Jpeg", "Coin")),
    "grey-then-plain": Case(lambda: Chain(Compensation(0.4, 0), Compensation(0, 0.1)), because=("Compensation",)),
    "repeat-of-walk": Case(lambda: Repeat(Chain(walk(), once()), 2), because=("Langevin",)),
    "repeat-of-jpeg": Case(lambda: Repeat(Jpeg(), 2), because=("Jpeg",)),
    "plugin": Case(Plugin, because=("Plugin, of which it is not known here",)),
    "plugin-once": Case(lambda: Chain(Plugin(), once()), because=("Plugin",)),
    "subclass": Case(lambda: Sharpened(Watching(), 0.1), because=("Sharpened, of which it is not known here",)),
    # images are chosen by how they look
    "where": Case(lambda: where(once()), None, True, ("Where",)),
    "where-share": Case(lambda: where(once(), k=0.5), None, True, ("Where",)),
    "where-in-chain": Case(lambda: Chain(where(walk()), once()), None, True, ("Where", "Langevin")),
    "where-behind": Case(lambda: Chain(Jpeg(), where(once()), once()), None, True, ("Jpeg", "Where")),
    "where-resized": Case(lambda: Chain(Resize(8), where(once())), None, True, ("Resize", "Where")),
    "where-in-tiles": Case(lambda: Tiles(where(once()), 8), None, True, ("Tiles", "Where")),
    "where-in-repeat": Case(lambda: Repeat(where(once()), 2), None, True, ("Where",)),
    "where-in-where": Case(lambda: where(where(once())), None, True, ("Where",)),
    "where-after-walk": Case(lambda: Chain(walk(), where(once())), None, True, ("Langevin", "Where")),
}


# -- the rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_a_purifier_means(name):
    case = CASES[name]
    found = noised(case.make())
    assert isinstance(found, Noised)
    assert found.sigma == (case.sigma if case.sigma is None else pytest.approx(case.sigma, rel=1e-12))
    assert found.selected is case.selected
    assert len(found.reasons) == len(case.because)
    for reason, part in zip(found.reasons, case.because, strict=True):
        assert re.fullmatch(
            r"A certificate needs Gaussian noise on every value of an image before .*\. Got .*: .*\.", reason
        )
        assert f"Got {part}" in reason
    assert (found.sigma is None) is bool(found.reasons)


OURS = [name for name in CASES if not name.startswith(("plugin", "subclass", "chain-then-plugin"))]


@pytest.mark.parametrize("name", OURS)
def test_built_back_from_json_it_means_the_same(name):
    """A certificate names its purifier as JSON."""
    purifier = CASES[name].make()
    watching = Loose() if "silent" in name else Watching()
    assert noised(recipes.from_json(purifier.to_json(), [watching, tiny_energy()])) == noised(purifier)


def test_every_kind_has_been_decided_on():
    """A new kind is no noise until somebody has looked at what it does first: decide it there, and try it here."""
    assert all(says_what_it_does_first(kind) for kind in KINDS.values())
    assert {type(case.make()) for case in CASES.values()} >= set(KINDS.values())


def test_what_is_no_purifier():
    for value, what in ((None, "NoneType"), (tiny_denoiser(), "NetworkDenoiser")):
        with pytest.raises(InputError, match=f"about a purifier.*Got {what}: .*no noise"):
            noised(value)


# -- that it is so -----------------------------------------------------------------------------------


def first_noised(purifier: Purifier, x: Tensor, keys: Tensor) -> Tensor:
    """What is left of the images when the first noise is on them: what the first denoiser sees, or what comes out."""
    watching = [part for part in purifier.modules() if isinstance(part, Watching)]
    out = purifier(x, keys)
    return watching[0].seen[0][0][: len(x)] if watching else out


# not one that saturates everything, nor one that needs a plan and begins as the others do
NOISED = [
    name for name, case in CASES.items() if case.sigma is not None and case.sigma < 1 and not name.endswith("share")
]


@pytest.mark.parametrize("name", NOISED)
def test_where_there_is_a_sigma_the_first_noise_is_that_and_the_image_else_untouched(name):
    """Its standard deviation on black, grey and white images alike; the same noise whatever the image is."""
    sigma = CASES[name].sigma
    keys = noise.image_keys(3, 0, range(16))
    levels = (0.0, 0.5, 1.0) if not name.startswith("compensation") else (0.5,)  # it clamps after the noise
    drawn = []
    for level in levels:
        x = torch.full((16, 3, 16, 16), level)
        drawn.append((first_noised(CASES[name].make(), x, keys) - x) / sigma)
    assert abs(float(drawn[0].double().square().mean()) - 1) < 4 * math.sqrt(2 / drawn[0].numel())
    assert abs(float(drawn[0].double().mean())) < 4 / math.sqrt(drawn[0].numel())
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=0, atol=1e-5)


def test_compensation_without_grey_is_its_noise_clamped():
    x = random_images(16).float() / 255
    keys = noise.image_keys(3, 0, range(16))
    z = noise.normal(keys, x.shape[1:], 1)
    assert torch.equal(Compensation(0, 0.25)(x, keys), torch.add(x, z * 0.25).clamp(0, 1))
    assert not torch.equal(Compensation(1, 0.25)(x, keys), torch.add(x, z * 0.25).clamp(0, 1))


def test_what_comes_before_the_noise_can_take_images_apart():
    """That is why it is refused: a distance below the radius may be one above it after such a step."""
    keys = noise.image_keys(3, 0, range(2))

    def apart(purifier: Purifier, a: Tensor, b: Tensor, its_keys: Tensor = keys) -> float:
        """How much further apart than before."""
        x, y = purifier(torch.stack([a, a]), its_keys), purifier(torch.stack([b, b]), its_keys)
        return float((x[0] - y[0]).norm() / (a - b).norm())

    grey = torch.full((3, 16, 16), 0.5)
    green = grey.clone()
    green[1] += 0.1
    dot = grey.clone()
    dot[:, 8, 8] += 0.1
    assert apart(Grayscale(), grey, green) > 1.01  # sqrt(3) 0.587
    assert apart(Resize(32), grey, green) == pytest.approx(2, rel=1e-5)
    assert apart(BitDepth(2), torch.full((3, 16, 16), 127 / 255), torch.full((3, 16, 16), 128 / 255)) > 60
    jpeg = [
        apart(Jpeg(10), torch.full((3, 16, 16), a / 255), torch.full((3, 16, 16), (a + 1) / 255)) for a in range(99)
    ]
    assert max(jpeg) > 2
    assert max(apart(Coin(), grey, dot, noise.image_keys(seed, 0, range(2))) for seed in range(20)) > 1.01
    steps = [apart(walk(), grey, grey + shift) for shift in (0.01, 0.1, 0.3)]
    assert all(abs(step - 1) > 1e-4 for step in steps)  # the noise is the same for both, and the gradient is not
    assert apart(once(), grey, green) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("size", "tile", "overlap"), [(24, 16, 8), (24, 16, 0), (6, 8, 0)])
def test_tiles_draw_twice_for_a_pixel(size, tile, overlap):
    """Overlapping ones; such as do not, where the last is moved back; and a small image, which is mirrored."""
    purifier = Tiles(once(), tile, overlap)
    purifier(torch.full((1, 3, size, size), 0.5), noise.image_keys(3, 0, [0]))
    (watching,) = (part for part in purifier.modules() if isinstance(part, Watching))
    drawn = torch.cat([seen for seen, _ in watching.seen])
    assert len(drawn.unique()) > 1.2 * 3 * size * size


# -- models ------------------------------------------------------------------------------------------


def named(model, name):
    model.name = name
    return model


def test_the_models_inside():
    a, b = named(tiny_denoiser(), "a"), named(tiny_denoiser(seed=1), "b")
    energy, other = named(tiny_energy(), "e"), named(tiny_energy(seed=1), "f")
    purifier = Chain(
        Where(EnergyAbove(energy, 0.0), Tiles(Repeat(Diffuse(a, sigma=0.1, steps=2), 2), 8)),
        DenoiseOnce(a, 0.1),
        Langevin(other, 1),
        DenoiseOnce(b, 0.1),
        Langevin(energy, 2),
    )
    found = models_of(purifier)
    assert [model.name for model in found] == ["e", "a", "f", "b"]
    assert [weights_sha256(model) for model in found] == [weights_sha256(model) for model in (energy, a, other, b)]
    assert models_of(Chain(Jpeg(), Coin())) == []


def test_models_that_are_not_the_same():
    """Of one name and of other weights, and unnamed: nothing is left out that might have learned from other images."""
    first, second, unnamed = (tiny_denoiser(seed=seed) for seed in (0, 1, 0))
    chain = Chain(*(DenoiseOnce(model, 0.1) for model in (named(first, "m"), named(second, "m"), unnamed)))
    assert [model.name for model in models_of(chain)] == ["m", "m", None]
    fast = Chain(DenoiseOnce(first, 0.1, dtype="bfloat16"), DenoiseOnce(first, 0.2, dtype="bfloat16"))
    assert [model.name for model in models_of(fast)] == ["m"]


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return random_images(count, 8, seed).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", [tiny_denoiser, tiny_energy])
def test_images_that_a_model_learned_from(kind, tmp_path):
    images = pictures(20)
    learned = np.concatenate([images[:7], pictures(9, seed=1)])
    pretrained.save(kind(), tmp_path / "m", details={"image_hashes": hashes_as_text(image_hashes(learned))})
    hashes = image_hashes(images)
    for model in (tmp_path / "m", str(tmp_path / "m")):
        assert shared_images(model, hashes) == 7
    assert shared_images(tmp_path / "m", hashes[::-1]) == 7
    assert shared_images(tmp_path / "m", hashes[7:]) == 0
    assert shared_images(tmp_path / "m", hashes[:0]) == 0
    assert shared_images(tmp_path / "m", np.concatenate([hashes, hashes])) == 14
    moved = images.copy()
    moved[0, 0, 0, 0] ^= 1
    assert shared_images(tmp_path / "m", image_hashes(moved)) == 6


def test_shipped_models_say_what_they_learned_from():
    for name in pretrained.available():
        text = json.loads((find(name) / "config.json").read_text())["details"]["image_hashes"]
        hashes = hashes_of_text(text)
        assert shared_images(name, hashes) == len(hashes) >= 1000
        assert shared_images(name, hashes + np.uint64(1)) == 0


def learned(images: np.ndarray, **more: object) -> dict[str, object]:
    return {"image_hashes": hashes_as_text(image_hashes(images)), **more}


def test_images_of_the_model_that_a_training_started_from_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, first = pictures(20), tiny_denoiser()
    pretrained.save(first, tmp_path / "first", details=learned(images[:7]))
    start = {"name": "./first", "weights_sha256": weights_sha256(first)}
    pretrained.save(tiny_denoiser(), "second", details=learned(images[5:9], train={"start_from": start}))
    hashes = image_hashes(images)
    assert shared_images("./second", hashes) == 7 + 2
    for wrong in ({"name": None}, {"name": "./nowhere"}, {"weights_sha256": "0" * 64}):
        pretrained.save(
            tiny_denoiser(),
            "third",
            details=learned(images[9:], train={"start_from": {**start, **wrong}}),
            overwrite=True,
        )
        with pytest.raises(InputError, match=r"'./third' does not say all .* its training started from the denoiser"):
            shared_images("./third", hashes)


def test_what_shipped_models_were_trained_from_counts():
    before = hashes_of_text(json.loads((find("cifar10-sparse") / "config.json").read_text())["details"]["image_hashes"])
    assert shared_images("tiny-imagenet-sparse", before) == len(before) == 2000


def test_images_resized_for_training_cannot_be_told(tmp_path):
    images = pictures(5)
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=learned(images, resized=8, image_size=[8, 8]))
    assert shared_images(tmp_path / "m", image_hashes(images), (8, 8)) == 5
    with pytest.raises(InputError, match=r"resized to \[8, 8\]\. Whether these, which are \[16, 16\]"):
        shared_images(tmp_path / "m", image_hashes(images), (16, 16))


def test_a_share_after_the_noise_is_another_look_at_the_images():
    energy, once = tiny_energy(), DenoiseOnce(tiny_denoiser(), 0.1)
    found = noised(Chain(once, Where(EnergyAbove(energy, k=0.5), Jpeg(50))))
    assert (found.sigma, found.selected) == (None, True)
    assert "a share k" in found.reasons[0]
    assert noised(Chain(once, Where(EnergyAbove(energy, threshold=1.0), Jpeg(50)))).sigma == 0.1


@pytest.mark.parametrize("details", [None, {"image_hashes": 3}, {"indices": [1, 2]}])
def test_a_model_that_does_not_say(details, tmp_path):
    pretrained.save(tiny_denoiser(), tmp_path / "m", details=details)
    with pytest.raises(
        InputError, match=r"'.*m' does not say which images it learned from: there is no image_hashes .* Train it"
    ):
        shared_images(tmp_path / "m", image_hashes(pictures(3)))


def test_no_such_model(tmp_path):
    hashes = image_hashes(pictures(3))
    for model in ("cifar10-spares", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="shipped name"):
            shared_images(model, hashes)


@pytest.mark.parametrize(
    ("train", "got"),
    [
        (pictures(3), r"uint8 \(3, 8, 8, 3\)"),
        (np.zeros(3, np.int64), r"int64 \(3,\)"),
        (np.zeros((3, 2), np.uint64), r"uint64 \(3, 2\)"),
        ([1, 2], "list"),
    ],
    ids=["images", "signed", "of-sources", "list"],
)
def test_hashes_that_are_none(train, got):
    with pytest.raises(InputError, match=rf"hashes of training images, uint64 \(N,\)\. Got {got}\. Give it"):
        shared_images("cifar10-sparse", train)
