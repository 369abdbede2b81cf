"""A model is identified by its weights and its function: two with the same weights and another function are two.

Whether a purifier is still the one that was made is tested in test_frozen.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from purifyloader import PurifiedDataset, precompute, pretrained, recipes
from purifyloader.bench.defences import Models
from purifyloader.bench.run import Bench
from purifyloader.cache import CacheReader
from purifyloader.certify import ndt_classify
from purifyloader.certify.noising import models_of
from purifyloader.commands.main import main
from purifyloader.datasets.splits import Data
from purifyloader.diffusion.blind import BlindDenoiser
from purifyloader.diffusion.denoiser import Denoiser, NetworkDenoiser
from purifyloader.diffusion.schedule import ContinuousVP, CosineSchedule, LinearSchedule, ScaledLinearSchedule, Schedule
from purifyloader.diffusion.unet import UNet, UNetConfig
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import CacheError, CheckpointError, ConfigError
from purifyloader.files.atomic import canonical_json
from purifyloader.files.weights import described, structure, structure_sha256, weights_sha256
from purifyloader.poisons.spec import CLEAN, AttackSpec
from purifyloader.pretrained.kinds import identity_of
from purifyloader.purifiers import Chain, DenoiseOnce, EnergyAbove, Jpeg, Langevin, Where
from purifyloader.results import rows
from tests.conftest import random_images, slim_denoiser, tiny_energy

RANGE = (0.001, 0.3)
CONFIG = UNetConfig(
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(1,),
    middle_attention=False,
    heads=2,
    norm_groups=4,
    learned_variance=False,
)


@functools.cache
def weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(CONFIG)
        return {name: 0.1 * torch.randn_like(value) for name, value in network.state_dict().items()}


def denoiser(
    parameterization: str = "epsilon",
    sigma_range: tuple[float, float] = RANGE,
    schedule: Schedule | None = None,
    time: str = "rescaled",
    **network: Any,
) -> NetworkDenoiser:
    net = UNet(dataclasses.replace(CONFIG, **network))
    net.load_state_dict(weights())
    return NetworkDenoiser(net, parameterization, sigma_range, schedule, time).eval().requires_grad_(False)


def edited(change: Callable[[NetworkDenoiser], object]) -> Callable[[], NetworkDenoiser]:
    def make() -> NetworkDenoiser:
        made = denoiser()
        change(made)
        return made

    return make


def put(part: str, name: str, value: Any) -> Callable[[], NetworkDenoiser]:
    return edited(lambda made: setattr(made.get_submodule(part), name, value))


VARIANTS: dict[str, Callable[[], NetworkDenoiser]] = {
    # each field of the network that changes no shape
    "heads": lambda: denoiser(heads=4),
    "head_channels": lambda: denoiser(head_channels=4, heads=4),
    "norm_groups": lambda: denoiser(norm_groups=2),
    "norm_eps": lambda: denoiser(norm_eps=1e-4),
    "norm_group_channels": lambda: denoiser(norm_group_channels=4),
    "dropout": lambda: denoiser(dropout=0.1),
    "resample": lambda: denoiser(resample="conv-right"),
    "rescale_sums": lambda: denoiser(rescale_sums=True),
    "sines_first": lambda: denoiser(sines_first=True),
    "frequency_shift": lambda: denoiser(frequency_shift=1.0),
    # and of the denoiser
    "v": lambda: denoiser("v"),
    "x0": lambda: denoiser("x0"),
    "edm": lambda: denoiser("edm"),
    "sigma_range": lambda: denoiser(sigma_range=(0.002, 0.3)),
    "cosine": lambda: denoiser(schedule=CosineSchedule(4000)),
    "cosine of 1000": lambda: denoiser(schedule=CosineSchedule(1000)),
    "linear": lambda: denoiser(schedule=LinearSchedule(1000)),
    "linear from 1e-4": lambda: denoiser(schedule=LinearSchedule(1000, 1e-4, 0.02)),
    "scaled-linear": lambda: denoiser(schedule=ScaledLinearSchedule(1000)),
    "continuous-vp": lambda: denoiser(schedule=ContinuousVP()),
    "timestep": lambda: denoiser(schedule=CosineSchedule(4000), time="timestep"),
    "continuous": lambda: denoiser(schedule=CosineSchedule(4000), time="continuous"),
    # and what no configuration says
    "eps of a layer": put("network.norm_out", "eps", 1e-3),
    "groups of a layer": put("network.norm_out", "num_groups", 2),
    "padding_mode": put("network.stem", "padding_mode", "circular"),
    "p of a dropout": put("network.middle.0.dropout", "p", 0.5),
    "dilation and padding": edited(
        lambda made: [setattr(made.network.stem, name, (2, 2)) for name in ("dilation", "padding")]
    ),
    "another activation": edited(lambda made: made.network.time_embed.__setitem__(1, nn.GELU())),
    "a hook": edited(lambda made: made.network.stem.register_forward_hook(lambda module, x, y: 2 * y)),
    "a hook before": edited(lambda made: made.network.stem.register_forward_pre_hook(lambda module, x: None)),
    "a forward of its own": put("network.norm_out", "forward", F.relu),
    "a network of the same name": edited(lambda made: setattr(made.network, "__class__", type("UNet", (UNet,), {}))),
    "a layer of the same name": edited(
        lambda made: setattr(made.network.norm_out, "__class__", type("GroupNorm", (nn.GroupNorm,), {}))
    ),
    "a configuration that it was not built from": put(
        "network", "config", dataclasses.replace(CONFIG, resample="conv-right", norm_eps=1e-2)
    ),
}


def test_there_are_more_variants_than_anybody_would_try():
    assert len(VARIANTS) >= 30
    assert {weights_sha256(make()) for make in VARIANTS.values()} == {weights_sha256(denoiser())}


def test_every_variant_is_another():
    identities = {name: canonical_json(identity_of(make())) for name, make in {"": denoiser, **VARIANTS}.items()}
    assert len(set(identities.values())) == len(identities)
    assert identities == {
        name: canonical_json(identity_of(make())) for name, make in {"": denoiser, **VARIANTS}.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_json_takes_no_variant_for_the_model_that_was_meant(name):
    variant = VARIANTS[name]()
    text = DenoiseOnce(variant, 0.1).to_json()
    with pytest.raises(CheckpointError, match=r"computes otherwise \(written → here\):\n  function\.") as error:
        recipes.from_json(text, denoiser())
    assert "Give the model of before as model=" in str(error.value)
    assert recipes.from_json(text, [denoiser(), variant]).to_json() == text


@pytest.mark.parametrize("name", ["heads", "v", "eps of a layer"])
def test_json_of_schema_1_knows_weights_alone(name):
    purifier = DenoiseOnce(denoiser(), 0.1)
    config = purifier.config()
    del config["denoiser"]["function"]
    old = canonical_json({"schema": 1, "purifier": config})
    variant = VARIANTS[name]()
    assert recipes.from_json(old, [variant, denoiser()]).to_json() == DenoiseOnce(variant, 0.1).to_json()


def test_what_changes_nothing_is_no_variant(tmp_path):
    base = identity_of(denoiser())
    renamed, moved, counted = denoiser(), denoiser().to(memory_format=torch.channels_last), denoiser().train()
    renamed.name = "mine"
    assert identity_of(renamed) == {**base, "name": "mine"}
    assert identity_of(moved) == base == identity_of(counted)
    assert identity_of(denoiser(multipliers=(1.0, 2.0), frequency_shift=0)) == base
    pretrained.save(denoiser(), tmp_path / "saved")
    assert identity_of(pretrained.load(tmp_path / "saved")) == base
    compiled = denoiser()
    compiled.network = torch.compile(compiled.network)  # type: ignore[assignment]
    assert structure_sha256(compiled) == structure_sha256(denoiser())
    of_a_compiled_network = BlindDenoiser(torch.compile(Small()), (0.01, 0.3))  # type: ignore[arg-type]
    with DenoiseOnce(of_a_compiled_network, 0.1).unchanged():
        pass


def test_an_identity_has_neither_addresses_nor_paths(tmp_path):
    for make in VARIANTS.values():
        text = canonical_json(structure(make()))
        assert "0x" not in text
        assert "/" not in text


# -- other models --------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network of a user's, with all that such a network may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.gain: Any = 0.5
        self.act: Any = F.relu
        self.table: Any = torch.ones(3)
        self.sizes: Any = [1, {"a": (2, 3)}]
        self.helpers: Any = [nn.Conv2d(3, 3, 1)]
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.gain * self.act(self.conv(x_BCHW))


def blind(change: Callable[[Any], object] = lambda network: None, residual: bool = False) -> BlindDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Small()
    change(network)
    return BlindDenoiser(network, (0.01, 0.3), residual=residual)


class Wider(Small):
    pass


def of_class(cls: type[Any]) -> Callable[[Any], None]:
    def change(network: Any) -> None:
        network.__class__ = cls

    return change


BLIND: dict[str, Callable[[Any], object]] = {
    "a number": lambda network: setattr(network, "gain", 0.25),
    "a function": lambda network: setattr(network, "act", F.gelu),
    "arguments of a function": lambda network: setattr(
        network, "act", functools.partial(F.leaky_relu, negative_slope=1)
    ),
    "other arguments": lambda network: setattr(network, "act", functools.partial(F.leaky_relu, negative_slope=2)),
    "a tensor": lambda network: setattr(network, "table", 2 * torch.ones(3)),
    "a tensor in place": lambda network: network.table.mul_(3),
    "an array": lambda network: setattr(network, "table", np.ones(3)),
    "a list": lambda network: network.sizes.append(3),
    "a dict within": lambda network: network.sizes[1].update(a=(2, 4)),
    "a module in a list": lambda network: setattr(network.helpers[0], "padding_mode", "reflect"),
    "weights of a module in a list": lambda network: network.helpers[0].weight.data.mul_(2),
    "a buffer that is not saved": lambda network: network.shift.add_(1),
    "a layer": lambda network: setattr(network.conv, "padding_mode", "reflect"),
    "its class": of_class(Wider),
    "a hook": lambda network: network.register_forward_hook(lambda module, x, y: -y),
}


def test_networks_of_a_user_are_told_apart():
    identities = {name: canonical_json(identity_of(blind(change))) for name, change in BLIND.items()}
    identities |= {
        "": canonical_json(identity_of(blind())),
        "residual": canonical_json(identity_of(blind(residual=True))),
    }
    assert len(set(identities.values())) == len(identities)
    assert identities[""] == canonical_json(identity_of(blind()))
    assert len({weights_sha256(blind(change)) for change in BLIND.values()}) == 1


class Scale:
    def __init__(self, k: Any) -> None:
        self.k = k

    def __call__(self, x: Tensor) -> Tensor:
        return self.k * x


class Slotted:
    __slots__ = ("__dict__", "_k")

    def __init__(self, k: float) -> None:
        self._k = k


def closure(k: float) -> Callable[[Tensor], Tensor]:
    return lambda x: k * x


def keyword_default(k: float) -> Callable[[Tensor], Tensor]:
    def scale(x: Tensor, *, k: float = k) -> Tensor:
        return k * x

    return scale


def holding_itself(k: float) -> Scale:
    made = Scale(k)
    made.again, made.method = [made], made.__call__  # type: ignore[attr-defined]
    return made


CALLABLES: dict[str, Callable[[float], Any]] = {
    "object": Scale,
    "object within objects": lambda k: Scale(Scale({"a": [Scale(k)]})),
    "slots": Slotted,
    "bound method": lambda k: Scale(k).__call__,
    "closure": closure,
    "closure over an object": lambda k: closure(Scale(k)),  # type: ignore[arg-type]
    "default": lambda k: lambda x, k=k: k * x,
    "keyword default": keyword_default,
    "constant": lambda k: (lambda o: o * 1.1) if k == 2 else (lambda o: o * 1.2),
    "constant of a function within": lambda k: (lambda: lambda o: o * 1.1) if k == 2 else (lambda: lambda o: o * 1.2),
    "partial": lambda k: functools.partial(Scale(k), 1),
    "list": lambda k: [F.relu, (Scale(k),)],
    "dict": lambda k: {"a": closure(k)},
    "array": lambda k: Scale(np.full(3, k)),
    "tensor": lambda k: Scale(torch.full((3,), k)),
    "method of a builtin": lambda k: {1: k}.get,
    "holds itself": holding_itself,
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_what_a_function_or_an_object_computes_with_counts(kind):
    two, again, three = (
        canonical_json(identity_of(blind(lambda network, k=k: setattr(network, "act", CALLABLES[kind](k)))))
        for k in (2.0, 2.0, 3.0)
    )
    assert two == again != three


def test_hooks_count_by_their_code_and_values():
    hooks = [lambda m, x, o: o * 1.1, lambda m, x, o: o * 1.2, closure(2), closure(3), Scale(2), Scale(3)]
    hashes = {structure_sha256(blind(lambda network, hook=hook: network.register_forward_hook(hook))) for hook in hooks}
    assert len(hashes) == len(hooks)


def test_code_is_known_without_its_place():
    one, other = ({}, {})  # type: ignore[var-annotated]
    exec(compile("def f(x):\n    return [y * 2 for y in x]", "/here/a.py", "exec"), one)
    exec(compile("\n\n\ndef f(x):\n    return [y * 2 for y in x]", "/there/b.py", "exec"), other)
    assert described(one["f"]) == described(other["f"])


def test_functions_of_torch_count_by_their_names():
    assert described(F.relu) == {"code": "relu"}
    assert described(F.silu) == {"code": "silu"}
    assert described(torch.relu)["code"].endswith("relu")
    assert described(math.sqrt) == {"code": "sqrt", "module": "math"}


def test_a_description_ends():
    deep: Any = 1
    for _ in range(50):
        deep = Scale(deep)
    assert len(canonical_json(described(deep))) < 500
    assert len(described(Scale(list(range(5000))))["values"]["k"]) < 1001


def test_an_object_may_name_places_and_refuse_to_be_read(tmp_path):
    class Closed:
        def __getattribute__(self, name: str) -> Any:
            if name == "__dict__":
                raise RuntimeError("closed")
            return super().__getattribute__(name)

    values = described(Scale([tmp_path, Closed(), logging.getLogger("mine"), math]))["values"]["k"]
    assert [set(value) for value in values] == 4 * [{"class"}]


class Scaled(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Scaling(nn.Module):
    def __init__(self, first: float = 2.0, second: float = 0.5, power: int = 1) -> None:
        super().__init__()
        self.conv, self.first, self.second, self.power = nn.Conv2d(3, 3, 1), Scaled(first), Scaled(second), power

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x))) ** self.power


def scripted(traced: bool, **settings: Any) -> BlindDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Scaling(**settings).eval().requires_grad_(False)
    made = torch.jit.trace(network, torch.zeros(1, 3, 8, 8)) if traced else torch.jit.script(network)
    return BlindDenoiser(made, (0.01, 0.3))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_torchscript_is_told_apart_by_its_code_and_settings(traced):
    settings: list[dict[str, Any]] = [{}, {"first": 3.0}, {"first": 0.5, "second": 2.0}, {"power": 2}]
    models = [scripted(traced, **values) for values in settings]
    identities = [canonical_json(identity_of(model)) for model in models]
    assert len(set(identities)) == len(settings)
    assert identities == [canonical_json(identity_of(scripted(traced, **values))) for values in settings]
    purifier, x, seeds = DenoiseOnce(models[0], 0.1), torch.rand(2, 3, 8, 8), torch.tensor([1, 2])
    want = purifier(x, seeds)
    assert torch.equal(copy.deepcopy(purifier)(x, seeds), want)
    assert torch.equal(purifier(x, seeds), want)
    next(purifier.denoiser.parameters()).mul_(2)
    with pytest.raises(ConfigError, match=r"denoiser\.weights"):
        purifier(x, seeds)


class Undescribed(Denoiser):
    """A denoiser of a user's, without a configuration."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.sigma_range = RANGE
        self.gain = gain

    def predict(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, None]:
        return self.gain * x_BCHW, None


def test_a_denoiser_without_a_configuration_works_and_has_an_identity(tmp_path):
    one, other = (DenoiseOnce(Undescribed(gain), 0.1) for gain in (0.5, 0.25))
    assert one.identity()["denoiser"]["function"]["class"] == "Undescribed"
    assert one.identity() != other.identity()
    dataset = [(image, 0) for image in random_images(4, 8)]
    precompute(dataset, one, tmp_path, progress=False)
    with pytest.raises(CacheError, match=r"purifier\.denoiser\.function\.structure_sha256: "):
        precompute(dataset, other, tmp_path, progress=False)


def other_energy(**changes: Any) -> EnergyNetwork:
    energy = tiny_energy()
    for name, value in changes.items():
        setattr(energy.blocks[0] if name in ("first", "down") else energy, name, value)
    return energy


ENERGIES: dict[str, Callable[[], EnergyNetwork]] = {
    "temperature": lambda: other_energy(temperature=1e-3),
    "first": lambda: other_energy(first=False),
    "down": lambda: other_energy(down=False),
    "config": lambda: other_energy(config=EnergyConfig(channels=8, image_channels=1)),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_energies_are_told_apart_wherever_they_stand(name):
    other = ENERGIES[name]()
    assert weights_sha256(other) == weights_sha256(tiny_energy())
    for make in (lambda e: EnergyAbove(e, 0.1), lambda e: Langevin(e, 2, temperature=1e-4)):
        assert make(other).config() != make(tiny_energy()).config()
    purifier = Where(EnergyAbove(tiny_energy(), 0.1), Jpeg(10))
    with pytest.raises(CheckpointError, match="computes otherwise"):
        recipes.from_json(purifier.to_json(), other)


# -- where it counts -----------------------------------------------------------------------------------


def test_models_of_lists_each_function():
    models = denoiser(), denoiser("v"), denoiser()
    found = models_of(Chain(*(DenoiseOnce(model, 0.1) for model in models)))
    assert [model.parameterization for model in found] == ["epsilon", "v"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(random_images(5, 8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def converted(folder: Path, schedule: Schedule) -> Path:
    """A checkpoint as a converter writes it, told which schedule the network was trained with."""
    model = slim_denoiser()
    pretrained.save(
        NetworkDenoiser(model.network, "epsilon", (0.005, 0.3), schedule), folder, name="mine", overwrite=True
    )
    return folder


@pytest.mark.parametrize("half_filled", [False, True])
def test_a_model_converted_with_a_wrong_schedule_and_corrected(pictures, tmp_path, capsys, half_filled):
    """The same command is refused with what differs; the cache is not finished, and not taken for one of the other."""
    model, out = converted(tmp_path / "model", LinearSchedule(1000)), tmp_path / "out"
    command = ["precompute", "--dataset", pictures, "--out", out, "--quiet", "--recipe", "eclipse", "--model", model]
    command += ["--sigma", "0.05", "--steps", "1", "--shard-size", "2", "--device", "cpu", "--threads", "1"]
    assert main([*map(str, command)]) == 0
    if half_filled:
        (out / "index.json").unlink()
        (out / "shard-00001.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    converted(model, CosineSchedule(4000))
    capsys.readouterr()
    assert main([*map(str, command)]) == 2
    error = capsys.readouterr().err
    assert 'function.schedule.kind: "linear" → "cosine"' in error
    assert "function.schedule.timesteps: 1000 → 4000" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    if not half_filled:
        with pytest.raises(CacheError, match=r"schedule"):
            CacheReader(out, {"purifier": recipes.eclipse(model, sigma=0.05, steps=1).identity(), "schema": 2})


def test_a_plan_is_of_the_function_too(tmp_path):
    dataset = [(image, 0) for image in random_images(6, 8)]

    def half(energy: EnergyNetwork) -> Where:
        return Where(EnergyAbove(energy, k=0.5), Jpeg(10))

    PurifiedDataset(dataset, half(tiny_energy()), cache=tmp_path, progress=False)
    with pytest.raises(CacheError, match=r"condition\.energy\.function\.temperature: 0\.0001 → 0\.001"):
        PurifiedDataset(dataset, half(ENERGIES["temperature"]()), cache=tmp_path, progress=False)


def test_votes_of_two_functions_do_not_mix(tmp_path):
    images = random_images(4, 8).permute(0, 2, 3, 1).contiguous().numpy()
    data, train = (images, np.array([0, 1, 0, 1])), lambda dataset, seed: lambda x: np.ones(len(x), int)
    ndt_classify(data, images[:2], DenoiseOnce(denoiser(), 0.1), train, 1, tmp_path)
    for name in ("v", "norm_eps", "a hook"):
        with pytest.raises(ConfigError, match=r"Got others: purifier\.denoiser\.function"):
            ndt_classify(data, images[:2], DenoiseOnce(VARIANTS[name](), 0.1), train, 1, tmp_path)


def test_rows_and_work_of_a_bench_of_two_functions_do_not_mix(tmp_path):
    images = random_images(8, 8).permute(0, 2, 3, 1).contiguous().numpy()
    data = Data("imagefolder", images[:4], np.arange(4) % 2, images[4:], np.arange(4) % 2, 2)
    rows_of, poisons_of = set(), set()
    for name in ("v", "norm_eps", "cosine"):
        pretrained.save(VARIANTS[name](), tmp_path / "model", overwrite=True)
        bench = Bench(data, Models(denoiser=str(tmp_path / "model")), "resnet9", "short", tmp_path / "work")
        rows_of.add(rows.fingerprint(bench.settings(AttackSpec(CLEAN), "eclipse@25", 0)))
        adaptive = AttackSpec("adaptive", {})
        poisons_of.add(bench._poison_path(adaptive, 0))
    assert (len(rows_of), len(poisons_of)) == (3, 3)
