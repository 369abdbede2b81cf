"""Averaged weights beside raw ones, as trainers write them: the converter asks, takes what is chosen, and says so."""

from __future__ import annotations

import json
import logging
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from purifyloader.commands.main import execute
from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained import load
from purifyloader.pretrained.checkpoint import read_config
from purifyloader.pretrained.convert import convert
from purifyloader.pretrained.convert.choice import says_average, take
from tests.conftest import random_images
from tests.pretrained.test_convert import GOLDEN, RIGHT, TRAINED

Weights = dict[str, Tensor]


def network(value: float) -> Weights:
    shapes = {"stem.weight": (2, 3), "stem.bias": (2,), "down.0.0.weight": (4, 2), "down.0.0.bias": (4,), "out": (3,)}
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


RAW, EMA = network(0.0), network(1.0)
LIST = list(EMA.values())


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def flat(weights: Weights) -> Weights:
    return {name.replace(".", ""): value for name, value in weights.items()}


def counters(**values: int) -> Weights:
    return {name: torch.tensor(value) for name, value in values.items()}


ADAM = {"state": {0: {"step": 1, "exp_avg": RAW["out"], "exp_avg_sq": RAW["out"]}}, "param_groups": [{"lr": 0.1}]}
OF_EMA_MODEL = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 9, "use_ema_warmup": False, "power": 0.7}
TORCH_EMA = {"decay": 0.999, "num_updates": 3, "shadow_params": LIST}

# trainer → what it writes, and the keys that lead to its average
TRAINERS: dict[str, tuple[Any, list[str]]] = {
    "torch_ema": ({"model": RAW, "ema": {**TORCH_EMA, "collected_params": None}}, ["ema", "ema.shadow_params"]),
    "torch_ema, put aside": (
        {"model": RAW, "ema": {**TORCH_EMA, "collected_params": list(RAW.values())}},
        ["ema.shadow_params"],
    ),
    "score_sde": ({"optimizer": ADAM, "model": under("module.", RAW), "ema": TORCH_EMA, "step": 5}, ["ema"]),
    "diffusers EMAModel": (
        {"state_dict": RAW, "ema": {**OF_EMA_MODEL, "shadow_params": LIST}},
        ["ema", "ema.shadow_params"],
    ),
    "swa_utils": (
        {"model_state_dict": RAW, "swa_model": {**counters(n_averaged=7), **under("module.", EMA)}},
        ["swa_model"],
    ),
    "torchvision references": (
        {"model": RAW, "optimizer": ADAM, "epoch": 1, "model_ema": {**counters(n_averaged=1), **under("module.", EMA)}},
        ["model_ema"],
    ),
    "timm": (
        {"epoch": 3, "arch": "unet", "state_dict": RAW, "optimizer": ADAM, "version": 2, "state_dict_ema": EMA},
        ["state_dict_ema"],
    ),
    "timm of DataParallel": ({"state_dict": RAW, "state_dict_ema": under("module.", EMA)}, ["state_dict_ema"]),
    "Lightning, optimizer of NeMo": (
        {"state_dict": under("model.", RAW), "optimizer_states": [{"opt": ADAM, "ema": tuple(LIST), "decay": 0.9}]},
        ["optimizer_states.0.ema", "optimizer_states.0"],
    ),
    "Lightning, callback": (
        {"state_dict": under("model.", RAW), "callbacks": {"EMA": {"ema_weights": under("model.", EMA)}}},
        ["callbacks.EMA.ema_weights", "callbacks.EMA"],
    ),
    "Lightning, module": (
        {"epoch": 1, "state_dict": {**under("model.", RAW), **under("ema_model.module.", EMA)}},
        ["state_dict.ema_model", "state_dict.ema_model.module"],
    ),
    "Lightning, WeightAveraging": (
        {"state_dict": EMA, "current_model_state": RAW, "averaging_state": counters(n_averaged=2)},
        ["state_dict"],
    ),
    "MMEngine": ({"state_dict": EMA, "ema_state_dict": {**counters(steps=2), **under("module.", RAW)}}, ["state_dict"]),
    "latent diffusion": (
        {
            "state_dict": {
                **under("model.diffusion_model.", RAW),
                **under("model_ema.", flat(under("diffusion_model.", EMA))),
                "model_ema.decay": torch.tensor(0.9999),
                "model_ema.num_updates": torch.tensor(3),
                **under("first_stage_model.encoder.", {f"{i}.weight": torch.zeros(9) for i in range(40)}),
            }
        },
        ["state_dict.model_ema"],
    ),
    "latent diffusion, flat file": (
        {**under("model.diffusion_model.", RAW), **under("model_ema.", flat(under("diffusion_model.", EMA)))},
        ["model_ema"],
    ),
    "k-diffusion": ({"config": {}, "model": RAW, "model_ema": EMA, "opt": ADAM, "step": 1}, ["model_ema"]),
    "ema_pytorch, its networks": (
        {
            "step": 1,
            "model": under("model.", RAW),
            "opt": ADAM,
            "ema": {
                **counters(initted=1, step=1),
                **under("online_model.model.", RAW),
                **under("ema_model.model.", EMA),
            },
        },
        ["ema.ema_model"],
    ),
    "DiT": ({"model": RAW, "ema": EMA, "opt": ADAM}, ["ema"]),
    "EDM, weights alone": ({"net": RAW, "ema": EMA}, ["ema"]),
    "BasicSR": ({"params": RAW, "params_ema": EMA}, ["params_ema"]),
    "a shadow by name": ({"model": RAW, "ema": {"decay": 0.99, "shadow": EMA}}, ["ema", "ema.shadow"]),
    "a list itself": ({"model": RAW, "ema": LIST}, ["ema"]),
    "a list of several rates": ({"model": RAW, "emas": {"0.999": LIST, "0.9999": list(RAW.values())}}, ["emas.0.999"]),
    "parameters alone, buffers left out": (
        {"model": {**RAW, "norm.mean": torch.zeros(3), "norm.count": torch.tensor(1)}, "averaged": EMA},
        ["averaged"],
    ),
    "a list without counters": (
        {"model": {**RAW, "norm.count": torch.tensor(1)}, "ema": {"shadow_params": LIST}},
        ["ema"],
    ),
    "ordered": (OrderedDict(model=OrderedDict(RAW), weights_swa=OrderedDict(EMA)), ["weights_swa"]),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_trainers_write_is_asked_about_and_the_average_is_taken(trainer: str) -> None:
    read, keys = TRAINERS[trainer]
    with pytest.raises(CheckpointError, match=r"must say which of its weights to take.*--key.*averaged ones"):
        take(read, Path("x.ckpt"))
    for key in keys:
        taken = take(read, Path("x.ckpt"), key)
        assert list(taken.weights) == list(EMA)
        assert all(bool((value == 1).all()) for value in taken.weights.values())
        assert key in taken.where
        assert "x.ckpt" in taken.where


@pytest.mark.parametrize(
    ("trainer", "note"),
    [
        ("Lightning, WeightAveraging", "'state_dict', 'current_model_state' .*writes the average as state_dict"),
        ("MMEngine", "'state_dict', 'ema_state_dict' .*EMAHook writes the average as state_dict"),
        ("torch_ema, put aside", "'model', 'ema.shadow_params', 'ema.collected_params' .*raw weights put aside"),
        ("Lightning, module", "such as state_dict.ema_model"),
        ("a list of several rates", "'model', 'emas.0.999', 'emas.0.9999'"),
    ],
)
def test_the_question_names_all_and_what_misleads(trainer: str, note: str) -> None:
    with pytest.raises(CheckpointError, match=note):
        take(TRAINERS[trainer][0], Path("x.ckpt"))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no raw weights beside it": ({"ema": TORCH_EMA}, "ema.shadow_params", "none that has these"),
    "another number": ({"model": RAW, "ema": LIST[:-1]}, "ema", "none that has these"),
    "another order": ({"model": RAW, "ema": LIST[::-1]}, "ema", "none that has these"),
    "a buffer among the raw weights": (
        {"model": {"sigmas": torch.zeros(5), **RAW}, "ema": LIST},
        "ema",
        "none that has these",
    ),
    "two networks of these shapes": (
        {"model": RAW, "other": under("x.y", RAW), "ema": LIST},
        "ema",
        "'model', 'other', which all have these",
    ),
    "a list alone": (LIST, "", "A list of tensors has no names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_list_that_cannot_be_told_is_refused(case: str) -> None:
    read, key, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        take(read, Path("x.pt"), key or None)


def test_an_average_that_fits_no_more_is_no_twin() -> None:
    """An optimiser's tensors, a small part, another network."""
    vae = {f"vae.{name}": torch.zeros(7) for name in RAW}
    for beside in (ADAM, list(RAW.values())[:2], {"out": torch.zeros(4)}, vae, [torch.zeros(1)] * 5, LIST[::-1]):
        taken = take({"model": EMA, "beside": beside, "lr": 0.1}, Path("x.pt"))
        assert (taken.weights, taken.where) == (EMA, "'model' of x.pt")


def test_names_that_say_average() -> None:
    yes = ("ema_0.9999_050000.pt", "unet_ema/x.bin", "netEMA.pt", "model-EMA.ckpt", "swa.pt", "model_averaged.pth")
    no = ("model050000.pt", "x.non_ema.bin", "scheme.pt", "nonema.pt", "cinema.pt", "opt.pt", "average_pooling.pt")
    assert [name for name in (*yes, *no) if says_average(name)] == [*yes, "average_pooling.pt"]


# -- files beside each other -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_images(monkeypatch) -> None:
    """How well the result denoises is another question, and takes seconds."""
    monkeypatch.setattr("purifyloader.pretrained.convert.dead_leaves", lambda *_: random_images(1, 8))


@pytest.fixture(scope="module")
def good() -> Weights:
    return {name: value.float() for name, value in load_file(TRAINED).items()}


BESIDE = {
    "guided-diffusion, renamed": ("model.pt", "ema_0.9999_050000.pt"),
    "safetensors before pickles": ("model.safetensors", "ema.pt"),
    "NeMo": ("model.ckpt", "model-EMA.ckpt"),
    "a folder below": ("model.pt", "ema/model.pt"),
    "one usual name": ("pytorch_model.bin", "averaged.bin"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_folder_with_an_average_is_asked_about(case, good, tmp_path, caplog) -> None:
    raw, average = (tmp_path / "run" / name for name in BESIDE[case])
    for path, factor in ((raw, 0), (average, 1)):
        path.parent.mkdir(exist_ok=True, parents=True)
        weights = {name: value * factor for name, value in good.items()}
        (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    common = {"format": "improved-diffusion", "settings": RIGHT}
    said = {"image_hashes": "", "weights_sha256": "0" * 64}
    (tmp_path / "run/config.json").write_text(json.dumps({**said, "details": said}))
    with pytest.raises(InputError, match=f"Got {raw.name}, and .*{average.name}, whose name .*--file"):
        convert(tmp_path / "run", tmp_path / "out", **common)
    convert(tmp_path / "run", tmp_path / "out", file=BESIDE[case][1], **common)
    details = read_config(tmp_path / "out")["details"]
    assert details["converted"]["weights"] == f"all of {average.name}"
    assert set(details) == {"purifyloader", "converted"}  # nothing of the images that some weights learned from
    if average.parent == raw.parent:
        with caplog.at_level(logging.WARNING):
            convert(raw, tmp_path / "raw", **common)
        assert f"the average beside it, {average.name}, denoises best" in caplog.text


def test_the_command_says_which_weights_it_took(good, tmp_path, capsys) -> None:
    raw = {name: value * 0 for name, value in good.items()}
    torch.save({"model": raw, "ema": {"decay": 0.99, "shadow_params": list(good.values())}}, tmp_path / "both.pt")
    torch.save(good, tmp_path / "alone.pt")
    settings = ["--schedule", "cosine", "--timesteps", "4000", "--rescale-timesteps", "--qkv-order", "heads-first"]
    settings += ["--heads", "2", "--norm-groups", "4"]
    for name, key, where in (
        ("both", ["--key", "ema"], "'ema.shadow_params' of both.pt, a list that has its names from 'model'"),
        ("alone", [], "all of alone.pt"),
    ):
        words = [f"{tmp_path}/{name}.pt", f"{tmp_path}/{name}", "--format", "improved-diffusion", *key, *settings]
        assert execute(["convert", *words]) == 0
        assert f"weights taken: {where}" in capsys.readouterr().out
        assert f"| Weights | {where} |" in (tmp_path / name / "README.md").read_text()
    assert weights_sha256(load(tmp_path / "both")) == weights_sha256(load(tmp_path / "alone"))


def test_score_sde_takes_its_average_and_no_other(tmp_path) -> None:
    common = {"format": "score-sde", "preset": "score-sde-ddpmpp-cifar10"}
    with pytest.raises(InputError, match=r"takes the average, ema.shadow_params. Got --key model"):
        convert(GOLDEN / "score_sde.pth", tmp_path / "out", key="model", **common)


def test_an_average_of_diffusers_is_asked_about_and_read(tmp_path) -> None:
    source, golden = tmp_path / "checkpoint-500", GOLDEN / "diffusers"
    for name, extra in (("unet", {}), ("unet_ema", {**OF_EMA_MODEL, "inv_gamma": 1.0, "update_after_step": 0})):
        shutil.copytree(golden, source / name)
        config = json.loads((source / name / "config.json").read_text())
        (source / name / "config.json").write_text(json.dumps({**config, **extra}))
    weights = next(path.name for path in (source / "unet").iterdir() if path.suffix in (".safetensors", ".bin"))
    with pytest.raises(InputError, match=f"Got unet/{weights}, and unet_ema/{weights}, whose name says"):
        convert(source, tmp_path / "out", "diffusers")
    convert(source, tmp_path / "out", "diffusers", file=f"unet_ema/{weights}")
    convert(source / "unet_ema", tmp_path / "folder", "diffusers")
    assert weights_sha256(load(tmp_path / "out")) == weights_sha256(load(tmp_path / "folder"))
