"""Where: which images are purified, with which noise, and the plan that decides it for a dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from purifyloader import PurifiedDataset, recipes
from purifyloader.core import noise
from purifyloader.energy import image_energies
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError
from purifyloader.pretrained.kinds import identity_of
from purifyloader.purified.job import PURIFY
from purifyloader.purified.plans import is_open, plan
from purifyloader.purifiers import (
    Chain,
    Coin,
    Compensation,
    Condition,
    DenoiseOnce,
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
from tests.conftest import PictureDataset, random_images, slim_denoiser, tiny_denoiser, tiny_energy

COUNT = 23


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(COUNT, 12).float() / 255


@pytest.fixture(scope="module")
def seeds() -> Tensor:
    return noise.image_keys(0, 0, range(COUNT))


@pytest.fixture(scope="module")
def energies(x) -> Tensor:
    return image_energies(tiny_energy(), x)


def source(count: int = COUNT) -> PictureDataset:
    return PictureDataset(random_images(count, 12))


def keys(count: int = COUNT, seed: int = 0) -> Tensor:
    """As a dataset gives them to its purifier."""
    return noise.fold_in(noise.image_keys(seed, 0, range(count)), PURIFY)


def half(**options) -> Where:
    return Where(EnergyAbove(tiny_energy(), **{"k": 0.5, **options}), Coin())


def once(dtype: str = "float32") -> DenoiseOnce:
    return DenoiseOnce(slim_denoiser(), 0.1, dtype=dtype, compute_batch=16)


def planned(purifier: Purifier, dataset=None, **options) -> Purifier:
    return plan(purifier, source() if dataset is None else dataset, **{"progress": False, **options})


def changed(purifier: Purifier, x: Tensor, seeds: Tensor) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(purifier(x, seeds), x, strict=True)]


# -- which images ------------------------------------------------------------------------------------


def test_only_images_from_the_threshold_on_are_purified(x, seeds, energies):
    for position in (0, 7, 22):
        threshold = float(energies.sort().values[position])
        washes = Where(EnergyAbove(tiny_energy(), threshold), Coin())
        assert changed(washes, x, seeds) == (energies >= threshold).tolist()
    assert not any(changed(Where(EnergyAbove(tiny_energy(), 1e9), Coin()), x, seeds))


@pytest.mark.parametrize(
    "purifier",
    [
        lambda: Coin(),
        lambda: once("bfloat16"),
        lambda: Langevin(tiny_energy(), 2),
        lambda: Chain(Coin(), Repeat(once(), 2)),
        lambda: Tiles(once(), 8),
    ],
)
def test_a_condition_that_always_holds_is_the_bare_purifier(purifier, x, seeds):
    bare = purifier()
    where = Where(EnergyAbove(tiny_energy(), -1e9), bare)
    assert torch.equal(where(x, seeds), bare(x, seeds))
    images = [x[0], x[1, :, :9], x[2], x[3, :, :9]]
    for got, want in zip(where.purify_images(images, seeds[:4]), bare.purify_images(images, seeds[:4]), strict=True):
        assert torch.equal(got, want)


def test_an_image_does_not_depend_on_its_batch(x, seeds, energies):
    where = Where(EnergyAbove(tiny_energy(), float(energies.median())), Langevin(tiny_energy(), 2))
    whole = where(x, seeds)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(where(x[order], seeds[order]), whole[order])
    for rows in (*map(slice, (1, 5, 17)), *(slice(i, i + 1) for i in range(2, COUNT, 10))):
        assert torch.equal(where(x[rows], seeds[rows]), whole[rows])
    assert where(x[:0], seeds[:0]).shape == x[:0].shape


def test_gradients_are_those_of_the_purifier_and_pass_the_others(x, seeds, energies):
    threshold = float(energies[:4].sort().values[2])
    images = x[:4].clone().requires_grad_(True)
    Where(EnergyAbove(tiny_energy(), threshold), Grayscale()).purify_with_grad(images, seeds[:4])[:, 0].sum().backward()
    assert images.grad is not None
    for grad, energy in zip(images.grad, energies[:4], strict=True):
        weights = (0.299, 0.587, 0.114) if energy >= threshold else (1, 0, 0)
        torch.testing.assert_close(grad[:, 0, 0], torch.tensor(weights, dtype=torch.float32))


# -- the plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.001, 0.1, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 10, 23])
def test_a_plan_purifies_the_share_with_the_highest_energies(k, count):
    where = planned(half(k=k, compute_batch=16), source(count))
    expected = max(1, round(k * count))
    images = random_images(count, 12).float() / 255
    energies = image_energies(tiny_energy(), images)
    holds = changed(where, images, keys(count))
    assert sum(holds) == expected
    assert set(torch.tensor(holds).nonzero()[:, 0].tolist()) == set(energies.topk(expected).indices.tolist())
    found = where.condition
    assert found.planned == {"threshold": found.threshold, "purified": expected, "images": count}
    assert found.threshold == float(energies.topk(expected).values[-1])


def test_images_of_one_energy_are_all_purified_or_none():
    images = random_images(4, 12)[[0, 1, 1, 1, 1, 2, 3]]
    energies = image_energies(tiny_energy(), images.float() / 255)
    share = (int((energies > energies[1]).sum()) + 2) / 7  # in the midst of those that are alike
    where = planned(half(k=share), PictureDataset(images))
    assert where.condition.planned["purified"] == int((energies >= energies[1]).sum())
    assert changed(where, images.float() / 255, keys(7)) == (energies >= energies[1]).tolist()


@pytest.mark.parametrize("front", [None, Coin()])
def test_a_plan_is_the_same_numbers_for_any_batches(front):
    washes = half(compute_batch=16) if front is None else Chain(front, half(compute_batch=16))
    text = planned(washes).to_json()
    for batch_size in (1, 4, 23):
        assert planned(washes, batch_size=batch_size).to_json() == text


def test_a_plan_is_for_the_images_as_they_come_to_the_condition(x):
    """Through the stages in front, with the seeds of draw 0."""
    washes = Chain(Resize(9, 8), Compensation(0.5, 0.1), half())
    for seed in (0, 5):
        found = planned(washes, seed=seed)
        noised = [noise.fold_in(keys(seed=seed), i) for i in range(3)]
        with torch.no_grad():
            seen = Compensation(0.5, 0.1).run(Resize(9, 8).run(x, noised[0]), noised[1])
        energies = image_energies(tiny_energy(), seen)
        threshold = float(energies.topk(12).values[-1])
        condition = found.stages[2].condition
        assert condition.planned == {"threshold": threshold, "purified": 12, "images": COUNT}
        # and so many are purified
        out = found(x, keys(seed=seed))
        assert [not torch.equal(a, b) for a, b in zip(out, seen, strict=True)] == (energies >= threshold).tolist()


class Sizes(Dataset):
    """Bytes and floats, grey and colour, of many sizes."""

    def __getitem__(self, index: int):
        image = random_images(1, 8 + index % 5, seed=index, channels=1 if index % 4 == 3 else 3)[0]
        if index % 3 == 0:
            return image.float() / 255, index
        return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) if len(image) == 1 else image, index

    def __len__(self) -> int:
        return 21


@pytest.mark.parametrize("front", [None, Resize(8, 8)])
def test_a_plan_over_images_of_any_size_and_kind(front):
    washes = half() if front is None else Chain(front, half())
    found = planned(washes, Sizes(), batch_size=4)
    with_plan, without = PurifiedDataset(Sizes(), found), PurifiedDataset(Sizes(), front or Resize(8, 8))
    assert json.loads(found.to_json())["purifier"] == with_plan.purifier.config()
    if front is not None:
        rows = zip(with_plan.__getitems__(range(21)), without.__getitems__(range(21)), strict=True)
        # a grey image in floats comes back through colour, to the last bit but one
        assert sum(not np.allclose(as_array(a), as_array(b), atol=1e-6) for (a, _), (b, _) in rows) == 10
    assert planned(washes, Sizes(), batch_size=100).to_json() == found.to_json()


def as_array(image) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.array(image) / 255
    return image.numpy() / 255 if image.dtype == torch.uint8 else image.numpy()


def test_two_conditions_are_planned_one_after_the_other(x):
    """The second sees what the first has left."""
    first, second = half(k=0.5), Where(EnergyAbove(tiny_energy(seed=1), k=0.25), Jpeg())
    found = planned(Chain(first, second))
    a, b = (stage.condition for stage in found.stages)
    assert a.planned["purified"] == 12
    assert b.planned["purified"] == 6
    with torch.no_grad():
        seen = found.stages[0].run(x, noise.fold_in(keys(), 0))
    assert b.threshold == float(image_energies(tiny_energy(seed=1), seen).topk(6).values[-1])
    with pytest.raises(ConfigError, match="same one twice"):
        planned(Chain(first, first))


def test_planning_leaves_the_purifier_as_it_was():
    washes = half()
    text = washes.to_json()
    found = planned(washes)
    assert washes.to_json() == text
    assert washes.condition.planned is None
    assert is_open(washes)
    assert not is_open(found)
    # the weights are shared, and yet each can move by itself
    a, b = (w.condition.energy.readout.weight for w in (washes, found))
    assert a is not b
    assert a.data_ptr() == b.data_ptr()
    found.to("meta")
    assert washes.condition.energy.readout.weight.device.type == "cpu"


def test_a_plan_is_for_the_dataset_it_was_made_of():
    once = planned(half())
    other = PictureDataset(random_images(COUNT, 12, seed=9))
    again = planned(once, other)
    assert again.to_json() == planned(half(), other).to_json()
    assert again.to_json() != once.to_json()
    jpeg = Jpeg()
    assert planned(jpeg) is jpeg
    fixed = Where(EnergyAbove(tiny_energy(), 0.1), jpeg)
    assert planned(fixed) is fixed


def test_a_dataset_plans_by_itself(x):
    dataset = PurifiedDataset(source(), half(), progress=False)
    assert dataset.purifier.to_json() == planned(half()).to_json()
    rows = zip(dataset.__getitems__(range(COUNT)), source(), strict=True)
    assert sum(a.tobytes() != b.tobytes() for (a, _), (b, _) in rows) == 12
    # a plan it comes with is taken as it is
    foreign = planned(half(), PictureDataset(random_images(5, 12, seed=9)))
    assert PurifiedDataset(source(), foreign).purifier.to_json() == foreign.to_json()


def test_a_bad_image_is_named_in_a_plan():
    class Late(Dataset):
        def __getitem__(self, index: int):
            return torch.zeros(3, 8, 8) if index != 150 else torch.full((3, 8, 8), 7.0)

        def __len__(self) -> int:
            return 300

    with pytest.raises(InputError, match="Item 150 of the dataset"):
        planned(half(), Late())

    class Tiny(Late):
        def __getitem__(self, index: int):
            return torch.zeros(3, 8, 8 if index != 150 else 3)

    with pytest.raises(InputError, match=r"Items 128 to 191 of the dataset: .*at least 4"):
        planned(half(), Tiny(), batch_size=64)
    broken = tiny_energy()
    broken.readout.weight.fill_(torch.inf)
    with pytest.raises(PurifyError, match="Items 0 to 22 of the dataset: Energies must be finite"):
        planned(Where(EnergyAbove(broken, k=0.5), Jpeg()))


# -- configuration -----------------------------------------------------------------------------------


def test_golden_json():
    values = half().config()
    energy = identity_of(tiny_energy())
    assert values == {
        "kind": "where",
        "condition": {"kind": "energy-above", "energy": energy, "k": 0.5, "compute_batch": 32},
        "purifier": {"kind": "coin", "alpha": 2.0},
    }
    fixed = EnergyAbove(tiny_energy(), 1).config()
    assert fixed == {
        "kind": "energy-above",
        "energy": energy,
        "threshold": 1.0,
        "compute_batch": 32,
    }


@pytest.mark.parametrize(
    "make", [half, lambda: planned(half()), lambda: Where(EnergyAbove(tiny_energy(), 0.1), Jpeg())]
)
def test_json_builds_back_the_same_purifier(make, x, seeds):
    washes = make()
    again = recipes.from_json(washes.to_json(), tiny_energy())
    assert again.to_json() == washes.to_json()
    if not is_open(washes):
        assert torch.equal(again(x, seeds), washes(x, seeds))


def test_a_plan_is_no_identity_and_everything_else_is():
    assert planned(half()).identity() == half().identity()
    others = [
        half(k=0.3),
        half(k=None, threshold=0.1),
        half(k=None, threshold=0.2),
        half(compute_batch=64),
        Where(EnergyAbove(tiny_energy(seed=1), k=0.5), Coin()),
        Where(EnergyAbove(tiny_energy(), k=0.5), Coin(3)),
    ]
    identities = [json.dumps(washes.identity()) for washes in (half(), *others)]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planned": {"threshold": 1.0}}, "The plan of an energy condition"),
        ({"planned": {"threshold": "1", "purified": 1, "images": 2}}, r"finite number\. Got '1'"),
        ({"planned": {"threshold": 1.0, "purified": 0, "images": 2}}, "The plan of an energy condition"),
        ({"planned": [1]}, "The plan of an energy condition"),
        ({"planned": 5}, "The plan of an energy condition"),
        ({"k": None, "threshold": 1.0, "planned": {"threshold": 1.0, "purified": 1, "images": 2}}, "needs no plan"),
        ({"kind": "os.system"}, r"must be one of \['energy-above'\]"),
        ({"more": 1}, "does not fit"),
        ({"threshold": 1.0}, "Give the threshold"),
    ],
)
def test_bad_json(change, message):
    values = json.loads(half().to_json())
    values["purifier"]["condition"].update(change)
    with pytest.raises(ConfigError, match=message):
        recipes.from_json(json.dumps(values), tiny_energy())


def test_models_of_both_kinds_are_told_apart_by_their_weights(x, seeds):
    washes = Where(
        EnergyAbove(tiny_energy(), -1e9), Chain(Langevin(tiny_energy(seed=1), 1), DenoiseOnce(tiny_denoiser(), 0.1))
    )
    models = [tiny_denoiser(), tiny_energy(seed=1), tiny_energy()]
    again = recipes.from_json(washes.to_json(), models)
    assert torch.equal(again(x[:3], seeds[:3]), washes(x[:3], seeds[:3]))
    for given, message in (
        (models[1:], "an unnamed denoiser. Give it as model="),
        (models[:1], "an unnamed energy model. Give it as model="),
        (models[:2], r"energy model None must have weights .* Got .*: give the right one"),
        ([tiny_denoiser(seed=1), *models[1:]], "The denoiser None must have weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            recipes.from_json(washes.to_json(), given)
    with pytest.raises(InputError, match="Got int"):
        recipes.from_json(washes.to_json(), 5)


# -- what it refuses ---------------------------------------------------------------------------------


def test_without_its_plan_it_does_not_run(x, seeds):
    for call in (lambda: half()(x, seeds), lambda: half().purify_images(list(x), seeds)):
        with pytest.raises(ConfigError, match=r"the share k = 0\.5 .*plan\(purifier, dataset\)"):
            call()


class Always(Condition):
    kind = "always"

    def config(self):
        return {"kind": self.kind}

    @classmethod
    def build(cls, values, resolve):
        return cls(**values)

    def holds(self, x_BCHW: Tensor) -> Tensor:
        return torch.ones(len(x_BCHW), dtype=torch.bool)


class Twice(Purifier):
    """A composition of a plugin's, that says nothing about plans."""

    kind = "twice"

    def __init__(self, inner: Purifier) -> None:
        super().__init__()
        self.inner = inner

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return self.inner.run(self.inner.run(x_BCHW, seeds_B), seeds_B)


def test_a_condition_of_ones_own(x, seeds):
    assert torch.equal(Where(Always(), Coin())(x, seeds), Coin()(x, seeds))
    with pytest.raises(ConfigError, match="Got one inside a Twice"):
        planned(Twice(half()))


def test_a_condition_of_ones_own_is_built_back_by_its_entry_point(x, seeds, tmp_path, monkeypatch):
    """Of an installed package, as importlib finds it."""
    installed = tmp_path / "plugin-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[purifyloader.conditions]\nalways = {__name__}:Always\n")
    purifier = Where(Always(), Coin())
    with pytest.raises(ConfigError, match=r"one of \['energy-above'\]\. Got 'always'"):
        recipes.from_json(purifier.to_json())
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(recipes.from_json(purifier.to_json())(x, seeds), purifier(x, seeds))


def test_a_threshold_does_not_depend_on_how_weights_and_numbers_are_held():
    ours = half()
    plain = planned(ours).condition.threshold
    weights = tiny_energy().to(memory_format=torch.channels_last)
    assert planned(Where(EnergyAbove(weights, k=0.5), Coin())).condition.threshold == plain
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert planned(ours).condition.threshold == plain
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda e: Repeat(Jpeg(), True), ConfigError, "positive number of times"),
        (lambda e: EnergyAbove(e, k=0.5, compute_batch=True), ConfigError, "compute_batch"),
        (lambda e: EnergyAbove(e), ConfigError, "Give the threshold .* or the share"),
        (lambda e: EnergyAbove(e, 1.0, k=0.5), ConfigError, r"Got threshold=1\.0, k=0\.5"),
        (lambda e: EnergyAbove(e, k=0), ConfigError, "k is the share .* Got 0"),
        (lambda e: EnergyAbove(e, k=1.01), ConfigError, r"k is the share .* Got 1\.01"),
        (lambda e: EnergyAbove(e, k=float("nan")), ConfigError, "k is the share .* Got nan"),
        (lambda e: EnergyAbove(e, k=True), ConfigError, "k is the share .* Got True"),
        (lambda e: EnergyAbove(e, k="0.5"), ConfigError, "k is the share .* Got '0.5'"),
        (lambda e: EnergyAbove(e, float("inf")), ConfigError, "threshold must be a finite number"),
        (lambda e: EnergyAbove(e, k=0.5, compute_batch=0), ConfigError, "compute_batch"),
        (
            lambda e: EnergyAbove(tiny_denoiser(), k=0.5),
            InputError,
            "EnergyAbove takes an energy model.* recipes.eclipse",
        ),
        (lambda e: Where(e, Jpeg()), ConfigError, "Got EnergyNetwork and Jpeg"),
        (lambda e: Where(EnergyAbove(e, 1.0), e), ConfigError, "Got EnergyAbove and EnergyNetwork"),
        (lambda e: Where(EnergyAbove(e, 1.0), Resize(8)), ConfigError, "put the Resize before"),
        (lambda e: Where(EnergyAbove(e, 1.0), Chain(Resize(32, 32), Jpeg())), ConfigError, "put the Resize before"),
        (lambda e: Where(EnergyAbove(e, 1.0), DenoiseOnce(tiny_denoiser(1), 0.1)), ConfigError, r"Got \[1, 3\]"),
        (lambda e: Where(EnergyAbove(e, 1.0), half()), ConfigError, "Another Where takes no condition"),
        (lambda e: Repeat(half(), 2), ConfigError, "Repeat takes no condition with a share k"),
        (lambda e: Tiles(half(), 8), ConfigError, "Tiles takes no condition with a share k"),
        (lambda e: Repeat(planned(half()), 2), ConfigError, "Repeat takes no condition with a share k"),
    ],
)
def test_bad_configurations(make, error, message):
    with pytest.raises(error, match=message):
        make(tiny_energy())


def test_a_threshold_may_stand_anywhere(x, seeds):
    fixed = Where(EnergyAbove(tiny_energy(), 0.1), Coin())
    for washes in (Repeat(fixed, 2), Tiles(fixed, 8), Where(EnergyAbove(tiny_energy(), 0.05), fixed)):
        whole = washes(x, seeds)
        assert torch.equal(washes(x[3:4], seeds[3:4]), whole[3:4])
