"""A purifier stays what it was when it was made: what cannot be refused is noticed at the next call.

What every purifier satisfies is tested in tests/contracts/test_purifiers.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from purifyloader import PurifiedDataset, PurifiedLoader, precompute, recipes
from purifyloader.certify import ndt_classify
from purifyloader.diffusion.blind import BlindDenoiser
from purifyloader.diffusion.schedule import CosineSchedule
from purifyloader.errors import ConfigError, InputError
from purifyloader.purified.plans import plan
from purifyloader.purifiers import (
    Chain,
    Condition,
    DenoiseOnce,
    Diffuse,
    EnergyAbove,
    Jpeg,
    Langevin,
    Purifier,
    Where,
    frozen,
)
from purifyloader.transforms import Purify
from purifyloader.transforms.kornia import RandomPurify
from tests.conftest import random_images, slim_denoiser, tiny_denoiser, tiny_energy

X, SEEDS = random_images(2, 8).float() / 255, torch.tensor([1, 2])
NOTICED = r"stays what it was when it was made[\s\S]*changed since \(then → now\):\n"


def once() -> DenoiseOnce:
    return DenoiseOnce(slim_denoiser(), 0.1, compute_batch=2)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of everything whose weights are hashed by a look."""
    done: list[str] = []
    real = frozen.weights_sha256

    def noted(module: nn.Module) -> str:
        done.append(type(module).__name__)
        return real(module)

    monkeypatch.setattr(frozen, "weights_sha256", noted)
    return done


# -- what is noticed ---------------------------------------------------------------------------------


def load_other(purifier: Any) -> None:
    purifier.denoiser.load_state_dict(slim_denoiser(seed=1).state_dict())


def put_other(purifier: Any) -> None:
    purifier.denoiser.load_state_dict(slim_denoiser(seed=1).state_dict(), assign=True)


@torch.no_grad()
def of_inference(purifier: Any) -> None:
    with torch.inference_mode():
        stem = purifier.denoiser.network.stem
        stem.weight = nn.Parameter(2 * stem.weight, requires_grad=False)


NETWORK = "  denoiser.network."
CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weights loaded": (load_other, "  denoiser.weights: "),
    "weights assigned": (put_other, "  denoiser.weights: "),
    "weights of inference": (of_inference, "  denoiser.weights: "),
    "a weight in place": (lambda p: p.denoiser.network.stem.weight.mul_(2), "  denoiser.weights: "),
    "weights through .data": (lambda p: p.denoiser.network.stem.weight.data.mul_(2), "  denoiser.weights: "),
    "another tensor as .data": (
        lambda p: setattr(p.denoiser.network.stem.weight, "data", torch.zeros(4, 3, 3, 3)),
        "  denoiser.weights: ",
    ),
    "a weight taken away": (lambda p: setattr(p.denoiser.network.stem, "bias", None), "  denoiser.weights: "),
    "half": (lambda p: p.denoiser.half(), "  types.float32: 64 → absent"),
    "a layer in bfloat16": (lambda p: p.denoiser.network.stem.bfloat16(), "  types.bfloat16: absent → 2"),
    "channels last": (
        lambda p: p.denoiser.to(memory_format=torch.channels_last),
        "  strides.denoiser.network.stem.weight: absent → [27,1,9,3]",
    ),
    "parameterization": (
        lambda p: setattr(p.denoiser, "parameterization", "v"),
        '  denoiser.parameterization: "edm" → "v"',
    ),
    "schedule": (
        lambda p: setattr(p.denoiser, "schedule", CosineSchedule(4000)),
        '  denoiser.schedule: null → {"class":"purifyloader.CosineSchedule","timesteps":4000}',
    ),
    "range": (lambda p: setattr(p.denoiser, "sigma_range", (0.001, 1.0)), "  denoiser.sigma_range: "),
    "time": (lambda p: setattr(p.denoiser, "time_input", "continuous"), '  denoiser.time_input: "rescaled" → '),
    "eps": (lambda p: setattr(p.denoiser.network.norm_out, "eps", 1e-3), f"{NETWORK}norm_out.eps: 1e-05 → 0.001"),
    "a layer replaced": (
        lambda p: setattr(p.denoiser.network.time_embed, "1", nn.GELU()),
        f'{NETWORK}time_embed.1.class: "torch.SiLU" → "torch.GELU"',
    ),
    "a layer added": (
        lambda p: p.denoiser.network.middle.append(p.denoiser.network.middle[0]),
        f"{NETWORK}middle.2: absent → ",
    ),
    "a forward": (
        lambda p: setattr(p.denoiser.network.norm_out, "forward", F.relu),
        f'{NETWORK}norm_out.forward: absent → {{"code":"relu"}}',
    ),
    "a class": (
        lambda p: setattr(p.denoiser, "__class__", type("Other", (type(p.denoiser),), {})),
        '  denoiser.class: "purifyloader.NetworkDenoiser" → "Other"',
    ),
    "a hook": (
        lambda p: p.denoiser.register_forward_hook(lambda module, x, y: 2 * y),
        "  denoiser.forward_hooks: absent → ",
    ),
    "a hook of its own": (lambda p: p.register_forward_hook(lambda module, x, y: y), "  forward_hooks: absent → "),
    "a hook before": (
        lambda p: p.denoiser.network.register_forward_pre_hook(lambda module, x: None),
        f"{NETWORK}forward_pre_hooks: absent → ",
    ),
    "dropout": (lambda p: setattr(p.denoiser.network.middle[0].dropout, "p", 0.5), "middle.0.dropout.p: 0 → 0.5"),
    "training": (lambda p: p.denoiser.network.middle.train(), '  in training mode: [] → ["denoiser.network.middle"'),
    "a part of its own": (lambda p: p.add_module("other", nn.Identity()), "  other: absent → "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_named(change):
    """Before a first call and after one, in a copy, and not where the change is taken back."""
    act, text = CHANGES[change]
    for purifier, calls in ((once(), 0), (once(), 1), (copy.deepcopy(once()), 0), (Chain(Jpeg(50), once()), 1)):
        for _ in range(calls):
            purifier(X, SEEDS)
        part = purifier.stages[1] if isinstance(purifier, Chain) else purifier
        act(part)
        for _ in range(2):  # and again
            with pytest.raises(ConfigError, match=NOTICED) as error:
                purifier(X, SEEDS)
            assert text in str(error.value)
            assert "Make a new one" in str(error.value)


def test_a_change_that_is_taken_back_is_none():
    purifier = once()
    want = purifier(X, SEEDS)
    before = copy.deepcopy(purifier.denoiser.state_dict())
    load_other(purifier)
    purifier.denoiser.parameterization = "v"
    with pytest.raises(ConfigError, match=NOTICED):
        purifier(X, SEEDS)
    purifier.denoiser.load_state_dict(before)
    purifier.denoiser.parameterization = "edm"
    assert torch.equal(purifier(X, SEEDS), want)


OTHER_MODELS: dict[str, tuple[Callable[[], Purifier], Callable[[Any], object], str]] = {
    "energy": (
        lambda: Langevin(tiny_energy(), 1, compute_batch=2),
        lambda p: setattr(p.energy.blocks[0], "first", False),
        "  energy.blocks.0.first: true → false",
    ),
    "condition": (
        lambda: Where(EnergyAbove(tiny_energy(), -1e9, compute_batch=2), Jpeg(10)),
        lambda p: next(p.condition.energy.parameters()).add_(1),
        "EnergyAbove stays",
    ),
    "in bfloat16": (
        lambda: Diffuse(slim_denoiser(), sigma=0.1, dtype="bfloat16", compute_batch=2),
        lambda p: p.denoiser.network.stem.weight.add_(1),
        "  denoiser.weights: ",
    ),
    "cast back": (
        lambda: Diffuse(slim_denoiser(), sigma=0.1, dtype="bfloat16", compute_batch=2),
        lambda p: p.denoiser.float(),
        "  types.float32: absent → ",
    ),
}


def assert_noticed(make: Callable[[], Any], change: Callable[[Any], object], text: str) -> None:
    purifier = make()
    purifier(X, SEEDS)
    change(purifier)
    with pytest.raises(ConfigError, match=NOTICED) as error:
        purifier(X, SEEDS)
    assert text in str(error.value)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_looked_at_too(name):
    assert_noticed(*OTHER_MODELS[name])


def replace_stage(chain: Any) -> None:
    chain.stages[0] = Jpeg(5)


STAGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "replaced": (replace_stage, "  stages.0.quality: 50 → 5"),
    "appended": (lambda chain: chain.stages.append(Jpeg(7)), "  stages.2: absent → "),
    "taken out": (lambda chain: chain.stages.pop(1), "  stages.1: "),
    "swapped": (
        lambda chain: chain.stages._modules.update({"0": chain.stages[1], "1": chain.stages[0]}),
        '  stages.0.class: "purifyloader.Jpeg" → "purifyloader.DenoiseOnce"',
    ),
}


@pytest.mark.parametrize("change", STAGES)
def test_stages_are_those_that_were_given(change):
    act, text = STAGES[change]
    chain = Chain(Jpeg(50), once())
    for purifier in (chain, Chain(chain)):
        act(chain)
        with pytest.raises(ConfigError, match=NOTICED) as error:
            purifier(X, SEEDS)
        assert text in str(error.value)
        chain = Chain(Jpeg(50), once())


def test_a_plan_is_not_changed():
    dataset = [(image, 0) for image in random_images(6, 8)]
    half = Where(EnergyAbove(tiny_energy(), k=0.5, compute_batch=2), Jpeg(10))
    planned: Any = plan(half, dataset, progress=False)
    want = planned(X, SEEDS)
    with pytest.raises(ConfigError, match="Got a change of planned"):
        planned.condition.planned = {"threshold": 0.0, "purified": 1, "images": 6}
    planned.condition.planned["threshold"] = 1e9
    with pytest.raises(ConfigError, match=r"planned.threshold: .* → 1000000000\.0"):
        planned(X, SEEDS)
    assert half.condition.planned is None
    assert torch.equal(plan(half, dataset, progress=False)(X, SEEDS), want)


# -- what is none ------------------------------------------------------------------------------------


def test_the_model_that_was_given_may_change_afterwards():
    model, energy = slim_denoiser(), tiny_energy()
    purifiers: list[Purifier] = [
        DenoiseOnce(model, 0.1, compute_batch=2),
        Diffuse(model, sigma=0.1, dtype="bfloat16", compute_batch=2),
        Langevin(energy, 1, compute_batch=2),
        Where(EnergyAbove(energy, -1e9, compute_batch=2), Jpeg(10)),
    ]
    want = [(purifier.to_json(), purifier(X, SEEDS)) for purifier in purifiers]
    model.load_state_dict(slim_denoiser(seed=1).state_dict())
    energy.load_state_dict(tiny_energy(seed=1).state_dict())
    model.parameterization = "v"
    model.half()
    energy.double().train()
    energy.register_forward_hook(lambda module, x, y: 2 * y)
    for purifier, (text, pixels) in zip(purifiers, want, strict=True):
        assert purifier.to_json() == text
        assert torch.equal(purifier(X, SEEDS), pixels)


COPIES: dict[str, Callable[[Purifier], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda purifier: pickle.loads(pickle.dumps(purifier)),
    "moved": lambda purifier: purifier.to("cpu"),
    "shared memory": lambda purifier: purifier.share_memory(),
    "asked for no gradients": lambda purifier: purifier.requires_grad_(False),
    "trained": lambda purifier: purifier.train(),
    "moved within a module": lambda purifier: nn.ModuleList([purifier]).to("cpu")[0],
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_and_moves_are_what_they_were(name):
    purifier = Chain(Jpeg(50), once(), Langevin(tiny_energy(), 1, compute_batch=2))
    want = purifier(X, SEEDS)
    again = COPIES[name](purifier)
    assert torch.equal(again(X, SEEDS), want)
    assert again.to_json() == purifier.to_json()
    load_other(again.stages[1])
    with pytest.raises(ConfigError, match=NOTICED):
        again(X, SEEDS)


def test_weights_are_hashed_once_where_they_lie_elsewhere(hashed):
    purifier = once()
    for _ in range(3):
        purifier(X, SEEDS)
    assert hashed == []  # it was hashed for its identity
    again = copy.deepcopy(purifier)
    for _ in range(3):
        again(X, SEEDS)
    assert hashed == ["NetworkDenoiser"]
    cast = Diffuse(slim_denoiser(), sigma=0.1, dtype="bfloat16", compute_batch=2)
    assert len(hashed) == 2  # in another type it has another hash
    cast(X, SEEDS)
    assert len(hashed) == 2


class Counting(nn.Module):
    """A network of a user's that takes notes."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.calls, self.seen, self.gain = 0, [], gain

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x_BCHW)
        self.last = x_BCHW
        return self.gain * self.conv(x_BCHW)


def test_a_network_may_take_notes_and_no_more(hashed):
    purifier = DenoiseOnce(BlindDenoiser(Counting(), (0.01, 0.3)), 0.1, compute_batch=2)
    whole: Any = Chain(purifier)
    network: Any = purifier.denoiser.network
    want = whole(X, SEEDS)
    for _ in range(3):
        assert torch.equal(whole(X, SEEDS), want)
    assert hashed == []
    network.seen.clear()
    network.calls = 0
    again = copy.deepcopy(whole)
    assert torch.equal(whole(X, SEEDS), want)
    assert torch.equal(again(X, SEEDS), want)
    network.gain = 0.25
    with pytest.raises(ConfigError, match=r"denoiser\.network\.gain: 0\.5 → 0\.25"):
        whole(X, SEEDS)


class Scale:
    def __init__(self, k: Any) -> None:
        self.k = k

    def __call__(self, x: Any) -> Any:
        return self.k * x


def closure(k: float) -> Any:
    def scale(x: Any, more: float = 0, *, other: float = 0) -> Any:
        return k * x + more + other

    return scale


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "object": (lambda: Scale(2), lambda o: setattr(o, "k", 3)),
    "object within": (lambda: [Scale({"a": Scale(2)})], lambda o: setattr(o[0].k["a"], "k", 3)),
    "bound method": (lambda: Scale(2).__call__, lambda f: setattr(f.__self__, "k", 3)),
    "cell": (lambda: closure(2), lambda f: setattr(f.__closure__[0], "cell_contents", 3)),
    "defaults": (lambda: closure(2), lambda f: setattr(f, "__defaults__", (1,))),
    "keyword defaults": (lambda: closure(2), lambda f: f.__kwdefaults__.update(other=1)),
    "code": (lambda: lambda x: x * 1.1, lambda f: setattr(f, "__code__", (lambda x: x * 1.2).__code__)),
    "partial": (lambda: functools.partial(Scale(2)), lambda f: setattr(f.func, "k", 3)),
    "array": (lambda: np.ones(3), lambda array: array.fill(2)),
    "array within": (lambda: Scale(np.ones(3)), lambda o: o.k.fill(2)),
    "tensor within": (lambda: Scale(torch.ones(3)), lambda o: o.k.mul_(2)),
    "module within": (lambda: Scale(nn.Conv2d(1, 1, 1)), lambda o: setattr(o.k, "padding_mode", "reflect")),
}


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("name", HELD)
def test_a_change_inside_of_functions_and_objects_is_noticed(name, calls):
    make, change = HELD[name]
    network: Any = Counting()
    network.held = make()
    purifier = DenoiseOnce(BlindDenoiser(network, (0.01, 0.3)), 0.1, compute_batch=2)
    for _ in range(calls):
        purifier(X, SEEDS)
    change(purifier.denoiser.network.held)
    with pytest.raises(ConfigError, match=r"denoiser\.network\.held"):
        purifier(X, SEEDS)


def test_a_change_inside_of_a_hook_is_noticed():
    model, hook = slim_denoiser(), closure(1)
    model.network.register_forward_hook(lambda module, x, y: hook(y))
    purifier = DenoiseOnce(model, 0.1, compute_batch=2)
    purifier(X, SEEDS)
    hook.__defaults__ = (1,)
    with pytest.raises(ConfigError, match=r"forward_hooks"):
        purifier(X, SEEDS)


def test_a_hook_may_take_notes(hashed):
    model, notes = slim_denoiser(), []
    model.network.register_forward_hook(lambda module, x, y: notes.append(y.mean().item()))
    purifier = DenoiseOnce(model, 0.1, compute_batch=2)
    want = purifier(X, SEEDS)
    for _ in range(2):
        assert torch.equal(purifier(X, SEEDS), want)
    assert torch.equal(copy.deepcopy(purifier)(X, SEEDS), want)
    assert notes
    purifier.denoiser.network.register_forward_hook(lambda module, x, y: 2 * y)
    with pytest.raises(ConfigError, match=r"forward_hooks"):
        purifier(X, SEEDS)


def test_an_object_may_hold_the_network_that_holds_it():
    network: Any = Counting()
    network.held = Scale(network)
    network.method = network.forward
    purifier = DenoiseOnce(BlindDenoiser(network, (0.01, 0.3)), 0.1, compute_batch=2)
    want = purifier(X, SEEDS)
    assert torch.equal(copy.deepcopy(purifier)(X, SEEDS), want)
    assert torch.equal(pickle.loads(pickle.dumps(purifier))(X, SEEDS), want)


def test_nothing_is_looked_at_while_a_graph_is_traced(monkeypatch):
    purifier = once()
    want = purifier(X, SEEDS)
    monkeypatch.setattr(frozen, "_Look", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(purifier(X, SEEDS), want)


# -- purifiers of others -----------------------------------------------------------------------------


class Shape(ABC):
    @abstractmethod
    def amount_of(self) -> float: ...


class Fade(Purifier, Shape):
    """With an abstract base, an attribute that is set after those of the base class, and a setting of its own."""

    kind = "test-fade"

    def __init__(self, amount: float = 0.5) -> None:
        super().__init__()
        self.amount = amount
        self._state = {"amount": amount}

    def amount_of(self) -> float:
        return self._state["amount"]

    @functools.cached_property
    def doubled(self) -> float:
        return 2 * self.amount_of()

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "amount": self.amount_of()}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return x_BCHW + self.amount_of() * (0.5 - x_BCHW)


class Faded(Fade):
    def __init__(self) -> None:
        super().__init__(0.25)
        self.more = 1


class Silent(Purifier):
    """Without a configuration, and so without a cache."""

    kind = "test-silent"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return 1 - x_BCHW


class Own(Purifier):
    """With weights of its own, in no submodule."""

    kind = "test-own"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return self.weight * x_BCHW + self.shift


class Mixed(Purifier):
    """With a network and a purifier in one list."""

    kind = "test-mixed"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.parts = nn.ModuleList([nn.Conv2d(3, 3, 1).requires_grad_(False), Jpeg(50)])

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return self.parts[0](self.parts[1].run(x_BCHW, seeds_B))


@dataclasses.dataclass(eq=False)
class Data(Purifier):
    amount: float = 0.5
    kind = "test-data"

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        made = super().__new__(cls)
        nn.Module.__init__(made)
        return made

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "amount": self.amount}

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return self.amount * x_BCHW


@pytest.mark.parametrize("make", [Fade, Faded, Silent, Own, Mixed, Data])
def test_a_plugin_is_frozen_and_need_do_nothing_for_it(make):
    purifier = make()
    assert getattr(purifier, "doubled", 1.0) in (1.0, 0.5)  # which is kept in it
    want = purifier(X, SEEDS)
    for again in (purifier, copy.deepcopy(purifier), pickle.loads(pickle.dumps(purifier)), Chain(make()).stages[0]):
        with pytest.raises(ConfigError, match="Got a change of amount"):
            again.amount = 0.1
        assert torch.equal(again(X, SEEDS), want)


PRIVATE: dict[str, tuple[Callable[[], Purifier], Callable[[Any], object], str]] = {
    "what its configuration shows": (Fade, lambda p: p._state.update(amount=0.1), "  amount: 0.5 → 0.1"),
    "a setting": (Faded, lambda p: vars(p).update(more=2), "  more: 1 → 2"),
    "a method": (Silent, lambda p: vars(p).update(run=lambda x, seeds: x), "  run: absent → "),
    "a weight": (Own, lambda p: p.weight.data.mul_(2), "  its own.weights: "),
    "a weight in a list of several": (Mixed, lambda p: p.parts[0].bias.add_(1), "  parts.0.weights: "),
    "a buffer": (Own, lambda p: p.shift.add_(1), "  shift.sha256: "),
    "a field": (Data, lambda p: vars(p).update(amount=0.1), "  amount: 0.5 → 0.1"),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_changes_of_a_plugin_are_noticed(name):
    assert_noticed(*PRIVATE[name])


class Bright(Condition):
    """A condition of a plugin, which takes its plan as it always did."""

    kind = "test-bright"

    def __init__(self, level: float = 0.1) -> None:
        super().__init__()
        self.level = level

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "level": self.level}

    def holds(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean((1, 2, 3)) >= self.level


def test_a_condition_takes_a_plan_once():
    condition = Bright()
    with pytest.raises(ConfigError, match="Got a change of level: make a new Bright"):
        condition.level = 0.2
    condition.planned = {"a": 1}
    with pytest.raises(ConfigError, match="Got a change of planned"):
        condition.planned = {"a": 2}
    assert condition.planned == {"a": 1}
    where = Where(Bright(), Jpeg(10))
    where(X, SEEDS)
    vars(where.condition)["level"] = 2.0
    with pytest.raises(ConfigError, match=r"Bright stays[\s\S]*  level: 0\.1 → 2"):
        where(X, SEEDS)


# -- work that has begun -----------------------------------------------------------------------------


class Source:
    """Images, one of which changes a purifier when it is read."""

    def __init__(self, act: Callable[[], object], at: int = 5, count: int = 8) -> None:
        self.images, self.act, self.at = random_images(count, 8), act, at

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.at:
            self.act()
        return self.images[index], 0


def test_a_cache_that_is_being_filled_takes_no_image_of_another_purifier(tmp_path: Path):
    chain = Chain(Jpeg(50), once())
    source: Any = Source(lambda: replace_stage(chain))
    with pytest.raises(ConfigError, match=NOTICED):
        precompute(source, chain, tmp_path, batch_size=2, shard_size=2, progress=False)
    assert not (tmp_path / "index.json").exists()


def test_a_shard_made_on_demand_is_of_the_purifier_that_began(tmp_path: Path):
    chain = Chain(Jpeg(50), once())
    source: Any = Source(lambda: None)
    dataset = PurifiedDataset(source, chain, cache=tmp_path, missing="purify", progress=False)
    replace_stage(chain)
    with pytest.raises(ConfigError, match=NOTICED):
        dataset[7]
    assert not list(tmp_path.glob("shard-*"))


def test_a_purifier_that_changed_opens_no_cache_and_says_no_configuration(tmp_path: Path):
    """A finished cache is read without a call of the purifier, which is not the one that made it."""
    chain, dataset = Chain(Jpeg(50), once()), [(image, 0) for image in random_images(4, 8)]
    precompute(dataset, chain, tmp_path, progress=False)
    load_other(chain.stages[1])
    for ask in (
        lambda: PurifiedDataset(dataset, chain, cache=tmp_path, progress=False),  # type: ignore[arg-type]
        lambda: precompute(dataset, chain, tmp_path, progress=False),  # type: ignore[arg-type]
        chain.to_json,
        chain.identity,
    ):
        with pytest.raises(ConfigError, match=NOTICED):
            ask()


@pytest.mark.parametrize("name", ["purifier", "seed", "draws", "sanitation", "dataset"])
def test_what_decides_the_images_of_a_dataset_stays(name):
    dataset = PurifiedDataset([(image, 0) for image in random_images(2, 8)], Jpeg(10))
    for again in (dataset, pickle.loads(pickle.dumps(dataset))):
        with pytest.raises(InputError, match=f"{name} of a PurifiedDataset decides its images"):
            setattr(again, name, getattr(dataset, name))
    for held in (Purify(Jpeg(10)), RandomPurify(Jpeg(10))):
        with pytest.raises(InputError, match="is the one that it was made with"):
            held.purifier = Jpeg(20)


def batches(purifier: Any) -> Iterator[Callable[[], object]]:
    """Ways to purify one batch after another with a purifier that was given before."""
    images = random_images(4, 8)
    dataset = PurifiedDataset([(image, 0) for image in images], purifier)
    loader = iter(PurifiedLoader([[images, torch.zeros(4)]] * 9, purifier))
    kornia, torchvision = RandomPurify(purifier), Purify(purifier)
    yield lambda: dataset[0]
    yield lambda: [next(loader) for _ in range(4)]
    yield lambda: kornia(images.float() / 255)
    yield lambda: torchvision(images)


@pytest.mark.parametrize("way", range(4))
def test_the_next_batch_is_refused(way):
    chain = Chain(Jpeg(50), once())
    batch = list(batches(chain))[way]
    batch()
    replace_stage(chain)
    with pytest.raises(ConfigError, match=NOTICED):
        batch()


def test_votes_of_a_purifier_that_changed_are_refused(tmp_path):
    images = random_images(4, 8).permute(0, 2, 3, 1).contiguous().numpy()
    purifier = once()

    def train(dataset: Any, seed: int) -> Callable[[Any], Any]:
        purifier.denoiser.parameterization = "v"
        return lambda x: np.ones(len(x), int)

    with pytest.raises(ConfigError, match=NOTICED):
        ndt_classify((images, np.array([0, 1, 0, 1])), images[:2], purifier, train, 2, tmp_path)
    assert len(list(tmp_path.glob("0*.json"))) <= 1


def test_recipes_give_frozen_purifiers():
    for purifier in (recipes.jpeg(10), recipes.eclipse(tiny_denoiser(), sigma=0.1, steps=1), recipes.coin()):
        with pytest.raises(ConfigError, match="Got a change of quality"):
            purifier.quality = 3
