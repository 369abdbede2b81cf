"""`purifyloader certify` as its users run it: numbers, guards, kills, several processes, and what it refuses."""

from __future__ import annotations

import base64
import importlib
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import pretrained
from purifyloader.certify import ABSTAIN, best_lower_bound, best_radius, certified_accuracy, certify, counts, predict
from purifyloader.certify.training import Training
from purifyloader.commands.main import main
from purifyloader.files.hashes import hashes_as_text, image_hashes
from purifyloader.files.weights import weights_sha256
from purifyloader.pretrained.kinds import identity_of
from purifyloader.purifiers import Chain, Compensation, DenoiseOnce, EnergyAbove, Jpeg, Langevin, Purifier, Where
from tests import processes
from tests.commands.conftest import undrawn
from tests.conftest import tiny_denoiser, tiny_energy

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]

MODULE = '''
"""What somebody certifies: three classes of noisy grey, and a training of a millisecond."""

import os
import time

import numpy as np
import torch


def pictures(count, seed):
    rng = np.random.default_rng(seed)
    level = np.array([105, 120, 135])[np.arange(count) % 3].reshape(-1, 1, 1, 1)
    return np.clip(level + rng.normal(0, 25, (count, 8, 8, 3)), 0, 255).astype(np.uint8), np.arange(count) % 3


def data():
    return pictures(30, 1), pictures(15, 2)


def grey():
    (train, labels), (test, its) = data()
    return (train[..., :1], labels), (test[..., :1], its)


def shared():
    """A test image is among the training images."""
    (train, labels), test = data()
    train[5] = test[0][3]
    return (train, labels), test


def two_sizes():
    train, (test, labels) = data()
    return train, (test[:, :4, :4], labels)


def only():
    return data()[0]


def number():
    return 3


def items(images, labels):
    return [(image, int(label)) for image, label in zip(images, labels)]


def others():
    """Two classes of other images, for a warm start."""
    images, labels = pictures(24, 3)
    return items(images, labels % 2)


def half_own():
    """With one of the training images."""
    images, labels = pictures(24, 3)
    images[7] = data()[0][0][20]
    return items(images, labels)


def tested():
    """With one of the test images."""
    images, labels = pictures(24, 3)
    images[7] = data()[1][0][2]
    return items(images, labels)


def nearest(dataset, seed):
    with open(os.environ["CERTIFY_LOG"], "ab", buffering=0) as file:
        file.write(b"%d %d\\n" % (os.getpid(), seed))
    time.sleep(float(os.environ.get("CERTIFY_DELAY", 0)))
    data, targets = dataset.data.astype(np.float32) / 255, np.asarray(dataset.targets)
    chosen = np.random.default_rng(seed).permutation(len(data))[: len(data) // 2]
    some, its = data[chosen], targets[chosen]
    means = np.stack([some[its == k].mean(0) if (its == k).any() else data.mean(0) for k in range(dataset.classes)])
    flat = torch.from_numpy(means).permute(0, 3, 1, 2).flatten(1)
    return lambda x_BCHW: -torch.cdist(x_BCHW.flatten(1), flat)
'''

SECRET = 0x2468ACE13579BDF
SELECTION, MODELS, ALPHA = 3, 9, 0.05
NUMBERS = ("--alpha", ALPHA, "--models", MODELS, "--selection", SELECTION, "--quiet")
DATA = ("--data", "certified_module:data")
OWN = ("--train-function", "certified_module:nearest")
BUILT_IN = ("--epochs", 1, "--width", 2, "--batch-size", 12, "--pool", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's working directory: the module, models of several honesty, purifiers."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "certified_module.py").write_text(MODULE)
    scope: Json = {}
    exec(MODULE, scope)
    (train, _), (test, _) = scope["data"]()
    elsewhere = scope["pictures"](9, 4)[0]
    for name, images in (("tiny", elsewhere), ("own", [*elsewhere, train[4]]), ("tests", [*elsewhere, test[4]])):
        details = {"image_hashes": hashes_as_text(image_hashes(np.stack([*images])))}
        pretrained.save(tiny_denoiser(), folder / name, name=name, details=details)
        pretrained.save(tiny_energy(), folder / f"energy-{name}", name=f"energy-{name}", details=details)
    pretrained.save(tiny_denoiser(), folder / "silent")
    denoiser = pretrained.load(folder / "tiny")
    energies = {name: pretrained.load(folder / f"energy-{name}", "energy") for name in ("tiny", "own", "tests")}
    once = DenoiseOnce(denoiser, 0.1, compute_batch=16)
    purifiers: dict[str, Purifier] = {
        "noise": Compensation(p=0.0, sigma=0.2),
        "jpeg-first": Chain(Jpeg(50), once),
        "jpeg-after": Chain(once, Jpeg(50)),
        "where": Where(EnergyAbove(energies["tiny"], 0.0), once),
        **{f"walk-{name}": Chain(once, Langevin(energy, 1)) for name, energy in energies.items()},
    }
    for name, purifier in purifiers.items():
        (folder / f"{name}.json").write_text(purifier.to_json())
    (folder / "other").mkdir()
    (folder / "other" / "noise.json").write_text(purifiers["noise"].to_json())
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / "list.json").write_text("[]")
    (folder / "sigma 0.1.json").write_text(purifiers["noise"].to_json())
    (folder / "file").touch()
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In that directory; what the command changes of the whole process is changed back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CERTIFY_LOG", str(tmp_path / "log"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("certified_module", None)
    torch.set_num_threads(1)


def words(*options: object) -> list[str]:
    return list(map(str, options))


def run(*options: object) -> int:
    return main(words("certify", *options))


def with_secrets(out: Path, *conditions: str) -> Path:
    for number, name in enumerate(conditions):
        folder = out / "votes" / name
        folder.mkdir(parents=True)
        (folder / "secret.json").write_text(json.dumps({"seed": SECRET + number}))
    return out


def results(out: Path) -> Json:
    found: Json = json.loads((out / "certificates.json").read_text())
    return found


def condition(out: Path, name: str) -> Json:
    (found,) = (its for its in results(out)["conditions"] if its["name"] == name)
    return dict(found)


def trainings(tmp_path: Path) -> list[int]:
    """The seeds of all models that `nearest` has trained."""
    log = tmp_path / "log"
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def votes_of(folder: Path) -> np.ndarray:
    """Read without the library."""
    files = sorted(folder.glob("[0-9]*.json"))
    assert [path.name for path in files] == [f"{i:05d}.json" for i in range(len(files))]
    return np.stack(
        [np.frombuffer(base64.b64decode(json.loads(path.read_text())["votes"]), np.uint8) for path in files]
    )


def everything(out: Path, locks: bool = True) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and (locks or path.suffix != ".lock")
    }


ONCE = ("--model", "tiny", "--sigma", 0.1, 0.25, "--plain")
CONDITIONS = ("sigma-0.1", "sigma-0.25", "sigma-0.1-plain", "sigma-0.25-plain")
NOISE = (*DATA, *OWN, "--model", "tiny", "--recipe", "noise.json", *NUMBERS)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four conditions."""
    out = with_secrets(tmp_path_factory.mktemp("whole") / "out", *CONDITIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CERTIFY_LOG", str(out.parent / "log"))
        assert run(*DATA, *OWN, *ONCE, *NUMBERS, "--out", out) == 0
    assert len(trainings(out.parent)) == 4 * (SELECTION + MODELS)
    return out


@pytest.fixture(scope="module")
def noise_alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one condition, and no network in it."""
    out = with_secrets(tmp_path_factory.mktemp("noise") / "out", "recipe-noise")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CERTIFY_LOG", str(out.parent / "log"))
        assert run(*NOISE, "--out", out) == 0
    assert len(trainings(out.parent)) == SELECTION + MODELS
    return out


# -- what comes out ------------------------------------------------------------------------------------


def test_files_and_numbers(whole: Path) -> None:
    """Against votes that are read, and figures that are computed, without the command."""
    found = results(whole)
    assert [its["name"] for its in found["conditions"]] == [
        "sigma 0.1",
        "sigma 0.25",
        "sigma 0.1, plain noise",
        "sigma 0.25, plain noise",
    ]
    labels = np.arange(15) % 3
    assert found["labels"] == labels.tolist()
    assert (found["alpha"], found["classes"], found["test_inputs"]) == (ALPHA, 3, 15)
    radii = []
    for its, name in zip(found["conditions"], CONDITIONS, strict=True):
        sigma = 0.1 if "0.1" in name else 0.25
        assert (its["sigma"], its["certified_sigma"], its["draws"]) == (sigma, sigma, 1)
        assert its["plain"] is name.endswith("plain")
        assert its["models"] == {"selection": SELECTION, "estimation": MODELS}
        assert its["reasons"] == []
        every = votes_of(whole / "votes" / name)
        assert every.shape == (SELECTION + MODELS, 15)
        expected = certify(counts(every[:SELECTION], 3), counts(every[SELECTION:], 3), sigma, ALPHA)
        certificate = its["certificate"]
        assert certificate["predictions"] == expected.predictions.tolist()
        assert certificate["agreeing"] == (every[SELECTION:] == expected.predictions).sum(0).tolist()
        assert certificate["radii"] == pytest.approx(expected.radii.tolist())
        assert certificate["best_radius"] == best_radius(sigma, MODELS, ALPHA)
        assert certificate["certified"] == pytest.approx(100 * certified_accuracy(expected, labels, [0.0])[0])
        at = its["curve"]["radii"][:-1]
        assert its["curve"]["accuracy"][:-1] == pytest.approx((100 * certified_accuracy(expected, labels, at)).tolist())
        assert its["one_model"]["mean"] == pytest.approx(100 * (every == labels).mean())
        predicted = predict(counts(every, 3), ALPHA)
        assert its["vote"]["predicted"] == pytest.approx(100 * (predicted == labels).mean())
        assert its["vote"]["abstained"] == pytest.approx(100 * (predicted == ABSTAIN).mean())
        radii += certificate["radii"]
    assert len(set(radii)) > 4, "all agree or none: nothing is tested"
    page = (whole / "README.md").read_text()
    assert all(f"| {its['name']} |" in page for its in found["conditions"])
    assert "![Certified accuracy against the radius](certified.png)" in page
    with Image.open(whole / "certified.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 22) or []) > 20
    assert sorted(p.name for p in whole.iterdir()) == ["README.md", "certificates.json", "certified.png", "votes"]
    for name in CONDITIONS:
        left = {path.name for path in (whole / "votes" / name).iterdir()}
        assert left == {"settings.json", "secret.json", *(f"{i:05d}.json" for i in range(SELECTION + MODELS))}


def test_a_settings_word(whole: Path) -> None:
    settings = results(whole)["settings"]
    assert settings["data"] == {"name": "certified_module:data", "train": 30, "test": 15, "values": 192}
    assert settings["training"]["function"] == "certified_module:nearest"
    assert settings["draws"] == settings["threads"] == 1
    assert settings["stated"] == {"triggered": False, "learned_elsewhere": False}
    its = condition(whole, "sigma 0.25")["purifier"]
    assert its["denoiser"] == {**identity_of(tiny_denoiser()), "name": "tiny"}
    assert its["dtype"] == "float32"


def test_no_secret_and_no_path_is_published(whole: Path, place: Path) -> None:
    published = b"".join(path.read_bytes() for path in whole.iterdir() if path.is_file())
    published += b"".join((whole / "votes" / name / "settings.json").read_bytes() for name in CONDITIONS)
    for number in range(len(CONDITIONS)):
        secret = SECRET + number
        for text in (str(secret), f"{secret:x}", f"{secret:X}"):
            assert text.encode() not in published
    assert str(place).encode() not in published
    assert str(whole.parent).encode() not in published


@pytest.mark.usefixtures("drawn")
def test_the_same_command_changes_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(whole)
    times = {path: path.stat().st_mtime_ns for path in (whole / "votes").rglob("*.json")}
    assert run(*DATA, *OWN, *ONCE, *NUMBERS, "--out", whole) == 0
    assert everything(whole) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert trainings(tmp_path) == []
    out = capsys.readouterr().out.split()
    assert out == [str(whole / name) for name in ("certificates.json", "README.md", "certified.png")]
    assert not [word for word in out if str(SECRET) in word]


def test_another_secret_is_another_run(noise_alone: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        assert run(*NOISE, "--out", out) == 0
    found = [votes_of(out / "votes" / "recipe-noise").tolist() for out in (*outs, noise_alone)]
    assert found[0] != found[1] != found[2] != found[0]
    assert len(set(trainings(tmp_path))) == 2 * (SELECTION + MODELS)


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [word for word in NOISE if word != "--quiet"]
    assert run(*loud, "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == SELECTION + MODELS
    assert lines[0].startswith(f"1 of {SELECTION + MODELS} models, ")
    assert re.fullmatch(rf"{SELECTION + MODELS} of {SELECTION + MODELS} models, 0 s left", lines[-1])


def test_the_built_in_training(tmp_path: Path) -> None:
    out = with_secrets(tmp_path / "out", "recipe-noise")
    options = (*DATA, *BUILT_IN, "--model", "tiny", "--recipe", "noise.json", "--dtype", "float32", *NUMBERS)
    assert run(*options, "--out", out) == 0
    found = results(out)
    built_in = found["settings"]["training"]["built_in"]
    assert (built_in["epochs"], built_in["width"], built_in["batch_size"]) == (1, 2, 12)
    assert (built_in["bfloat16"], found["settings"]["training"]["start_sha256"]) == (False, None)
    every = votes_of(out / "votes" / "recipe-noise")
    assert len(np.unique(every, axis=0)) > 1
    before = everything(out)
    (out / "votes" / "recipe-noise" / "00003.json").unlink()
    assert run(*options, "--out", out) == 0
    assert everything(out) == before


def test_grey_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", "certified_module:grey", "--recipe", "noise.json", "--model", "tiny", *NUMBERS)
    assert run(*options, *OWN, "--out", tmp_path / "a") == 0
    assert results(tmp_path / "a")["settings"]["data"]["values"] == 64
    assert run(*options, "--out", tmp_path / "b") == 2
    assert "takes images of 3 channels. Got 1" in capsys.readouterr().err


def test_some_of_the_images(tmp_path: Path) -> None:
    assert run(*NOISE, "--train", 20, "--test", 7, "--out", tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert found["settings"]["data"]["train"] == 20
    assert found["test_inputs"] == len(found["labels"]) == 7


# -- several processes, and kills ----------------------------------------------------------------------


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CERTIFY_LOG": str(tmp_path / "log"), **more}


def assert_same_run(out: Path, expected: Path) -> None:
    """All but the picture, whose bytes are matplotlib's affair, and which another test looks at."""
    found, wanted = everything(out), everything(expected, locks=False)
    assert sorted(found) == sorted(wanted)
    assert [name for name in found if found[name] != wanted[name] and not name.endswith(".png")] == []


def run_slowly(*options: object) -> None:
    """In a child."""
    os.environ["CERTIFY_DELAY"] = "0.2"
    run(*options)


def with_forked_workers(*command: object) -> int:
    """In a child: a command whose own processes are forked, for a new interpreter imports torch for four seconds."""
    fork = multiprocessing.get_context("fork")

    class Context:
        @staticmethod
        def Process(target: Any, args: tuple[Any, ...]) -> Any:
            return fork.Process(target=target, args=pickle.loads(pickle.dumps(args)))

    multiprocessing.get_context = lambda method: Context  # type: ignore[assignment,return-value]
    return undrawn(main, *command)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_goes_on_in_two_processes(noise_alone: Path, tmp_path: Path) -> None:
    out = with_secrets(tmp_path / "out", "recipe-noise")
    # forked, so that it need not import torch first
    process = multiprocessing.get_context("fork").Process(target=run_slowly, args=(*NOISE, "--out", out))
    process.start()
    while process.is_alive() and len(trainings(tmp_path)) < 4:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = sorted((out / "votes" / "recipe-noise").glob("[0-9]*.json"))
    assert 3 <= len(done) < SELECTION + MODELS
    assert not (out / "certificates.json").exists()
    before = {path: path.stat().st_mtime_ns for path in done}
    command = ("certify", *NOISE, "--out", out, "--processes", 2)
    child = processes.run(with_forked_workers, *command, cwd=Path.cwd(), env={"CERTIFY_DELAY": 0.05})
    assert child.value == 0, child.stderr
    assert before == {path: path.stat().st_mtime_ns for path in done}, "what was done is kept"
    assert_same_run(out, noise_alone)
    seeds = trainings(tmp_path)
    assert len(set(seeds)) == SELECTION + MODELS
    assert len(seeds) <= SELECTION + MODELS + 1, "a kill costs a model, two processes none"
    assert len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) == 3


def test_processes_that_a_launcher_starts(noise_alone: Path, tmp_path: Path) -> None:
    """Two, which learn from their environment who they are, as torchrun and accelerate launch tell it."""
    out = with_secrets(tmp_path / "out", "recipe-noise")
    environment = {"WORLD_SIZE": 2, "CERTIFY_DELAY": 0.05}
    children = [
        processes.start(
            *(undrawn, main, "certify", *NOISE, "--out", out),
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            cwd=Path.cwd(),
        )
        for rank in (1, 0)
    ]
    ended = [child.wait() for child in children]
    assert [done.value for done in ended] == [0, 0], ended
    second, first = (done.stdout for done in ended)
    assert second == "", "one of them writes"
    assert "certificates.json" in first
    found = everything(out, locks=False)
    for name, data in everything(noise_alone, locks=False).items():
        assert name.endswith(".png") or found.pop(name) == data
    assert [*found] == ["certified.png"]
    assert sorted(trainings(tmp_path)) == sorted(set(trainings(tmp_path)))


@pytest.mark.slow
def test_accelerate_launch(noise_alone: Path, tmp_path: Path) -> None:
    """The command that people are told."""
    out = with_secrets(tmp_path / "out", "recipe-noise")
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", "purifyloader", "certify")
    command = words(sys.executable, "-m", *launch, *NOISE, "--out", out)
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, noise_alone)


def test_not_both_kinds_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*NOISE, "--out", tmp_path / "out", "--processes", 2) == 2
    assert "Got both: leave --processes out" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    assert run(*NOISE, "--out", tmp_path / "out") == 2
    assert "rank must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- guards --------------------------------------------------------------------------------------------


def words_of(found: object) -> Iterator[str]:
    """All keys of nested results."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield key
            yield from words_of(value)
    elif isinstance(found, list):
        for value in found:
            yield from words_of(value)


TINY = ("--model", "tiny")

# options → what is said against a certificate, in one reason or, where a | is, in as many
GUARDS: dict[str, tuple[tuple[object, ...], str]] = {
    "where": (
        (*OWN, *TINY, "--recipe", "where.json"),
        "Where, which chooses images by how they look|decided by looking at them without noise",
    ),
    "jpeg first": ((*OWN, *TINY, "--recipe", "jpeg-first.json"), "Got Jpeg, whose rounding takes images apart"),
    "its own images": ((*OWN, "--model", "own", "--sigma", 0.1), "denoiser or energy model has learned from the same"),
    "an energy model of its own": (
        (*OWN, *TINY, "--recipe", "walk-own.json"),
        "denoiser or energy model has learned from the same",
    ),
    "a warm start": (
        (*BUILT_IN, *TINY, "--recipe", "noise.json", "--warm-start", "train"),
        "Training began on the same",
    ),
    "a warm start in part": (
        (*BUILT_IN, *TINY, "--recipe", "noise.json", "--warm-start", "certified_module:half_own"),
        "Training began on the same",
    ),
    "a trigger": ((*OWN, *TINY, "--recipe", "noise.json", "--triggered"), "A trigger changes the test inputs"),
    "few models": (
        (*OWN, *TINY, "--recipe", "noise.json", "--models", 5, "--alpha", 0.001),
        "5 models cannot certify anything at alpha 0.001, even where all agree: it takes at least 10",
    ),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_a_reason_against_a_certificate(guard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is an error before anything is made; to train all the same is asked for, and leaves no radius."""
    options, reasons = GUARDS[guard][0], GUARDS[guard][1].split("|")
    out = tmp_path / "out"
    given = (*DATA, *NUMBERS, *options, "--warm-start-epochs", 1, "--out", out)
    assert run(*given) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("purifyloader: error: Expected a run that may end in certificates. Got reasons against")
    assert [reason for reason in reasons if reason not in said.err] == []
    assert "an empirical run" in said.err
    assert not out.exists()
    assert trainings(tmp_path) == []

    assert run(*given, "--empirical") == 0
    assert (out / "certified.png").exists()
    (its,) = results(out)["conditions"]
    assert [reason for reason in reasons if not any(reason in given for given in its["reasons"])] == []
    assert its["certificate"] is its["curve"] is its["certified_sigma"] is None
    assert 0 < its["one_model"]["mean"] <= 100
    assert not {"radii", "best_radius", "certified", "median_radius"} & {*words_of(results(out))}
    page = (out / "README.md").read_text()
    assert "no certificate:" in page
    assert "What a radius allows" not in page
    assert len(list(out.glob("votes/*/0*.json"))) == sum(its["models"].values())


def test_what_one_condition_lacks_the_others_have(tmp_path: Path) -> None:
    recipes_ = ("--recipe", "noise.json", "--recipe", "jpeg-first.json", "--recipe", "jpeg-after.json")
    assert run(*DATA, *OWN, *TINY, *recipes_, *NUMBERS, "--empirical", "--out", tmp_path / "out") == 0
    found = {its["name"]: its["certificate"] is None for its in results(tmp_path / "out")["conditions"]}
    assert found == {"noise": False, "jpeg-first": True, "jpeg-after": False}


def test_draws_divide_the_radius(noise_alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*NOISE, "--draws", 4, "--out", out) == 0
    its, one = condition(out, "noise"), condition(noise_alone, "noise")
    assert (its["sigma"], its["draws"], its["certified_sigma"]) == (0.2, 4, 0.1)
    assert its["certificate"]["best_radius"] == pytest.approx(one["certificate"]["best_radius"] / 2)
    every = votes_of(out / "votes" / "recipe-noise")
    expected = certify(counts(every[:SELECTION], 3), counts(every[SELECTION:], 3), 0.1, ALPHA)
    assert its["certificate"]["radii"] == pytest.approx(expected.radii.tolist())
    assert max(its["certificate"]["radii"]) > 0


def test_a_warm_start_from_other_images_keeps_the_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = (*DATA, *BUILT_IN, *TINY, "--recipe", "noise.json", *NUMBERS, "--out", out)
    warm = ("--warm-start", "certified_module:others", "--warm-start-epochs")
    assert run(*given, *warm, 1) == 0
    (its,) = results(out)["conditions"]
    assert its["reasons"] == []
    assert its["certificate"] is not None
    settings = results(out)["settings"]
    assert settings["warm_start"] == ["certified_module:others", 1]
    assert not settings["training"]["built_in"]["keep_head"]
    start = Training(width=2).empty(3)
    from safetensors.torch import load_file

    start.load_state_dict(load_file(out / "start.safetensors"))
    assert settings["training"]["start_sha256"] == weights_sha256(start)
    before = everything(out)
    assert run(*given, *warm, 1) == 0
    assert everything(out) == before
    capsys.readouterr()
    for others in ((*warm, 2), ("--warm-start", "certified_module:tested"), ()):
        assert run(*given, *others) == 2
        assert everything(out, locks=False) == before
    error = capsys.readouterr().err
    assert "Got: one that was made from other images, or otherwise" in error
    assert "Expected a warm start from images that are not tested on. Got 1 of 24 that are" in error
    assert "training.start_sha256 was" in error


def test_a_warm_start_is_not_taken_for_one_from_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder, at another level: else what began with the very images would be certified."""
    out = tmp_path / "out"
    given = (*DATA, *BUILT_IN, *TINY, *NUMBERS, "--warm-start-epochs", 1, "--out", out, "--warm-start")
    assert run(*given, "train", "--recipe", "noise.json", "--empirical") == 0
    assert results(out)["settings"]["warm_start"] == ["the training set", 1]
    assert results(out)["settings"]["training"]["built_in"]["keep_head"] is True
    before = everything(out)
    assert run(*given, "certified_module:others", "--recipe", "jpeg-after.json") == 2
    assert "Got: one that was made from other images, or otherwise" in capsys.readouterr().err
    assert everything(out, locks=False) == before
    (out / "start.safetensors").write_bytes(b"damaged")
    assert run(*given, "train", "--recipe", "noise.json", "--empirical") == 2
    assert f"Expected in {out / 'start.safetensors'} the network that this run begins with" in capsys.readouterr().err


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "a denoiser that does not say": (
        ("--model", "silent", "--sigma", 0.1),
        "does not say which images it learned",
    ),
}
KNOWN: dict[str, tuple[tuple[object, ...], str]] = {
    "a denoiser that knows test images": (("--model", "tests", "--sigma", 0.1), "Got 1 of 15 that tests has"),
    "an energy model that knows them": ((*TINY, "--recipe", "walk-tests.json"), "Got 1 of 15 that energy-tests has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_users_word_overrides(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[case]
    out = tmp_path / "out"
    given = (*DATA, *OWN, *options, *NUMBERS, "--out", out)
    for more in ((), ("--empirical",), ("--estimate",)):
        assert run(*given, *more) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert trainings(tmp_path) == []
    assert run(*given, "--learned-elsewhere") == 0
    (its,) = results(out)["conditions"]
    assert its["reasons"] == []
    assert results(out)["settings"]["stated"]["learned_elsewhere"] is True


@pytest.mark.parametrize("case", KNOWN)
def test_what_nothing_overrides(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = KNOWN[case]
    out = tmp_path / "out"
    for more in ((), ("--empirical",), ("--estimate",), ("--learned-elsewhere",)):
        assert run(*DATA, *OWN, *options, *NUMBERS, "--out", out, *more) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert trainings(tmp_path) == []


def test_the_users_word_does_not_stand_against_what_a_model_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(*DATA, *OWN, "--model", "own", "--sigma", 0.1, *NUMBERS, "--learned-elsewhere", "--out", out) == 2
    assert "has learned from the same images" in capsys.readouterr().err
    assert not out.exists()
    options, message = KNOWN["a denoiser that knows test images"]
    assert run(*DATA, *OWN, *options, *NUMBERS, "--learned-elsewhere", "--out", out) == 2
    assert message in capsys.readouterr().err


def test_plain_noise_is_that_of_a_sigma(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*DATA, *OWN, *TINY, "--recipe", "noise.json", "--plain", *NUMBERS, "--out", tmp_path / "out") == 2
    assert "--plain is the noise of a sigma without denoising" in capsys.readouterr().err


def test_models_of_two_kinds_are_each_asked(tmp_path: Path) -> None:
    """An energy model beside a denoiser in a folder: what the one learned from is not what the other did."""
    out = tmp_path / "out"
    assert run(*DATA, *OWN, *TINY, "--recipe", "walk-tiny.json", *NUMBERS, "--out", out) == 0
    assert condition(out, "walk-tiny")["certificate"] is not None


def test_a_test_image_that_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", "certified_module:shared", *NOISE[2:], "--out", tmp_path / "out")
    for more in ((), ("--empirical",), ("--learned-elsewhere",), ("--estimate",)):
        assert run(*options, *more) == 2
        error = capsys.readouterr().err
        assert "Expected test images that are not trained on. Got 1 of 15 that are" in error
        assert "--leave-out" not in error, "there is no such option"
    assert not (tmp_path / "out").exists()


# -- a plan --------------------------------------------------------------------------------------------


def test_a_plan(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = sorted(p.name for p in place.iterdir() if p.name != "__pycache__")
    out = tmp_path / "out"
    options = (*DATA, *OWN, *TINY, "--recipe", "noise.json", "--recipe", "jpeg-first.json", "--triggered")
    given = (*options, "--alpha", 0.01, "--models", 40, "--estimate")
    assert run(*given, "--out", out) == 0
    first = capsys.readouterr().out
    assert "no certificate: A certificate needs Gaussian noise on every value" in first
    assert first.count("no certificate: A trigger changes the test inputs") == 2
    assert "radius" not in first.replace("the radius", "")

    bare = (*DATA, *OWN, *TINY, "--recipe", "noise.json", "--alpha", 0.01, "--models", 40, "--estimate")
    assert run(*bare, "--radius", 0.5, "--draws", 4, "--selection", 7) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "30 training images of certified_module:data, 15 test images; 7 + 40 models for each condition, alpha 0.01"
    )
    assert re.fullmatch(
        r"noise: a model takes \d+\.\d s, \d+\.\d of them to make its training set; all 47 take \d+ s", lines[1]
    )
    radius = best_radius(0.1, 40, 0.01)
    assert f"p_A {best_lower_bound(40, 0.01):.4f}, radius {radius:.3g} over" in lines[2]
    assert best_lower_bound(40, 0.01) == pytest.approx(0.01 ** (1 / 40))
    assert f"one image by {255 * radius / math.sqrt(192):.2f} levels" in lines[2]
    assert f"10 images by {255 * radius / math.sqrt(1920):.2f}" in lines[2]
    needed = int(re.fullmatch(r"  a radius of 0\.5 takes at least ([\d,]+) models", lines[3])[1].replace(",", ""))
    assert best_radius(0.1, needed, 0.01) >= 0.5 > best_radius(0.1, needed - 1, 0.01)
    assert re.fullmatch(r"all together: \d+ s", lines[4])
    assert len(lines) == 5

    assert not out.exists()
    assert sorted(p.name for p in place.iterdir() if p.name != "__pycache__") == here
    assert len(trainings(tmp_path)) == 3, "one model of each condition"


def test_a_plan_of_a_warm_start_trains_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        *DATA,
        *BUILT_IN,
        *TINY,
        "--recipe",
        "noise.json",
        "--estimate",
        "--out",
        tmp_path / "out",
        "--warm-start",
    )
    assert run(*options, "train") == 0
    assert "no certificate: Training began on the same images" in capsys.readouterr().out
    assert run(*options, "certified_module:others") == 0
    assert "no certificate" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--models", MODELS + 1), f"models was {SELECTION + MODELS} and is {SELECTION + MODELS + 1}"),
        (("--models", MODELS + 1, "--selection", SELECTION - 1), "selection was 3 and is 2"),
        (("--selection", SELECTION + 1), "selection was 3 and is 4"),
        (("--alpha", 0.06), "alpha was 0.05 and is 0.06"),
        (("--draws", 2), "draws was 1 and is 2"),
        (("--threads", 2), "threads was 1 and is 2"),
        (("--train", 29), "data was"),
        (("--test", 14), "inputs was 15 and is 14"),
    ],
    ids=str,
)
def test_other_numbers_for_votes_that_are_there(
    noise_alone: Path, tmp_path: Path, more: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever adds models until a certificate is better has none at that alpha."""
    before = everything(noise_alone, locks=False)
    assert run(*NOISE, *more, "--out", noise_alone) == 2
    error = capsys.readouterr().err
    assert "Expected votes of these settings" in error
    assert message in error
    assert error.count("\n") == 1
    assert everything(noise_alone, locks=False) == before
    assert trainings(tmp_path) == []


def test_other_numbers_are_said_once_by_several_processes(noise_alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before they begin, each of which would say it too."""
    assert run(*NOISE, "--alpha", 0.06, "--out", noise_alone, "--processes", 2) == 2
    error = capfd.readouterr().err
    assert "alpha was 0.05 and is 0.06" in error
    assert error.count("\n") == 1


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "no models": (("--models", 0), "--models must be at least 1. Got 0"),
    "no selection": (("--selection", 0), "--selection must be at least 1"),
    "no draws": (("--draws", 0), "--draws must be at least 1"),
    "no processes": (("--processes", 0), "--processes: must be an integer of 1 or more"),
    "no threads": (("--threads", -1), "--threads: must be an integer of 1 or more. Got '-1'"),
    "no epochs of a warm start": (("--warm-start-epochs", 0), "--warm-start-epochs must be at least 1"),
    "alpha 0": (("--alpha", 0), "--alpha must be above 0 and below 1"),
    "alpha 1": (("--alpha", 1), "--alpha must be above 0 and below 1"),
    "alpha NaN": (("--alpha", "nan"), "--alpha must be above 0 and below 1"),
    "a negative radius": (("--radius", -1, "--estimate"), "--radius must be from 0"),
    "a radius NaN": (("--radius", "nan", "--estimate"), "--radius must be from 0"),
    "a radius out of reach": (("--radius", 1000, "--estimate"), "Expected a radius within reach"),
    "sigma 0": (("--sigma", 0), "--sigma must be above 0"),
    "sigma negative": (("--sigma", 0.1, -0.1), "--sigma must be above 0"),
    "sigma NaN": (("--sigma", "nan"), "--sigma must be above 0"),
    "sigma in levels": (("--sigma", 25), "Expected|sigma"),
    "a sigma twice": (("--sigma", 0.1, 0.1), "Got sigma-0.1 twice"),
    "a recipe twice": (("--recipe", "other/noise.json"), "Got recipe-noise twice"),
    "two conditions of one name": (("--recipe", "sigma 0.1.json", "--sigma", 0.1), "Got sigma 0.1 twice"),
    "no recipe": (("--recipe", "nowhere.json"), "'nowhere.json': no such file"),
    "a folder for a recipe": (("--recipe", "tiny"), "'tiny': no such file"),
    "a recipe of bytes": (("--recipe", "binary.json"), "'binary.json': it is not UTF-8: 'utf-8' codec"),
    "a recipe that is none": (("--recipe", "list.json"), "an object with schema and purifier"),
    "no model": (("--model", "nowhere"), "Got 'nowhere', which is none of these"),
    "another model": (("--model", "energy-tiny", "--sigma", 0.1), "an energy"),
    "no data": (("--data", "cifar11"), "Got 'cifar11'"),
    "data that are not there": (("--data", "certified_module:nothing"), "'nothing' of a module 'certified_module'"),
    "a path for data": (("--data", "./certified_module.py:data"), "package.module:function. Got './certified"),
    "one set": (("--data", "certified_module:only"), r"Item 0 of the dataset must be \(image, label\)"),
    "a number for data": (("--data", "certified_module:number"), "Got int"),
    "two sizes": (("--data", "certified_module:two_sizes"), "Expected images of one size in both sets"),
    "no training images": (("--train", 0), "has 30 train images. Got 0"),
    "too many test images": (("--test", 16), "has 15 test images. Got 16"),
    "no function": (("--train-function", "nearest"), "package.module:function. Got 'nearest'"),
    "no such function": (("--train-function", "certified_module:furthest"), "'furthest' of a module"),
    "a function and epochs": (("--epochs", 3), "--epochs is of the built-in training"),
    "a function and a batch size": (("--batch-size", 3), "--batch-size is of the built-in training"),
    "a function and a warm start": (("--warm-start", "train"), "--warm-start is of the built-in training"),
    "no device": (("--device", "tpu9"), "Expected a device of this machine"),
    "a file for a folder": (("--out", "file"), "Could not write"),
}

BAD_BUILT_IN: dict[str, tuple[tuple[object, ...], str]] = {
    "no learning rate": (("--learning-rate", 0), "lr must be a finite number above 0"),
    "a learning rate NaN": (("--learning-rate", "nan"), "lr must be a finite number above 0"),
    "no epochs": (("--epochs", 0), "epochs must be a positive integer"),
    "no width": (("--width", 0), "width must be"),
    "no pool": (("--pool", 0), "pool must be"),
    "negative pad": (("--pad", -1), "pad must be"),
    "no batch": (("--batch-size", 0), "batch_size must be"),
    "no such network": (("--victim", "resnet10"), "one of 'resnet9'.*Got 'resnet10'"),
    "a network and a width": (("--victim", "resnet9", "--width", 3), "--width is of the ResNet-9"),
    "a warm start that is not there": (("--warm-start", "certified_module:no"), "'no' of a module"),
    "no warm start": (("--warm-start", "nowhere"), "There is no dataset 'nowhere'"),
}

CASES = [
    *((NOISE, *BAD[name]) for name in BAD),
    *(((*DATA, *TINY, "--recipe", "noise.json", *NUMBERS), *BAD_BUILT_IN[name]) for name in BAD_BUILT_IN),
]


@pytest.mark.parametrize(("given", "more", "message"), CASES, ids=[*BAD, *BAD_BUILT_IN])
def test_an_option_that_is_refused(
    given: tuple[object, ...],
    more: tuple[object, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(*given, "--out", out, *more) == 2
    said = capsys.readouterr()
    assert said.err.startswith("purifyloader: error: ")
    assert said.err.count("\n") == 1
    assert re.search(message, said.err)
    assert said.out == ""
    assert not out.exists()
    assert len(trainings(tmp_path)) == ("--estimate" in more and "1000" in map(str, more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x", "--sigma"), "--sigma: expected at least one argument"),
        (("--out", "x", "--models", "many"), "--models: invalid int value"),
        (("--out", "x", "--seed", "3"), "unrecognized arguments: --seed. `purifyloader certify --help`"),
    ],
    ids=str,
)
def test_an_option_that_is_not_understood(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    assert message in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_it_needs_a_folder_or_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert capsys.readouterr().err == "purifyloader: error: --out is required, or --estimate.\n"


def test_the_command_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "accelerate launch -m purifyloader certify" in text
    assert "no certificate covers that" in text
