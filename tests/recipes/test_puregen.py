"""PureGen's recipes: each is the loop that the paper writes, with noise of its own at every stage and repetition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from purifyloader import plans, pretrained, recipes
from purifyloader.cache import CacheReader
from purifyloader.commands import main as cli
from purifyloader.core import noise
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.samplers import ancestral
from purifyloader.diffusion.schedule import LinearSchedule, spaced_sigmas
from purifyloader.energy import langevin
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError
from purifyloader.purifiers import Chain, Diffuse, EnergyAbove, Langevin, Purifier, Repeat, Resize, Tiles, Where
from tests.conftest import PictureDataset, random_images, tiny_energy, tiny_network

COUNT = 5
FEW = {"compute_batch": 4}  # images a network call, for they are few
SCHEDULE = LinearSchedule()


def ddpm(seed: int = 0) -> NetworkDenoiser:
    """As PureGen's: trained on t < 250 of the linear schedule, with no learned variance."""
    sigma_range = (float(SCHEDULE.sigmas[1]), float(SCHEDULE.sigma(250)))
    return NetworkDenoiser(tiny_network(seed=seed, width=4, multipliers=(1,)), "epsilon", sigma_range, SCHEDULE)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return random_images(COUNT, 8).float() / 255


@pytest.fixture(scope="module")
def seeds() -> Tensor:
    return noise.image_keys(0, 0, range(COUNT))


MODELS = {"energy": tiny_energy(), "model": ddpm()}


def walked(x_BCHW: Tensor, keys_B: Tensor, steps: int) -> Tensor:
    """The EBM stage, by the functions it is made of."""
    return langevin(tiny_energy(), x_BCHW, steps, lambda i: noise.normal(keys_B, x_BCHW.shape[1:], i))


def diffused(x_BCHW: Tensor, keys_B: Tensor, steps: int, calls: int | None = None) -> Tensor:
    """The DDPM stage: noised to t = steps, then denoised from there."""
    sigmas = spaced_sigmas(SCHEDULE, steps, calls or steps)
    shape = x_BCHW.shape[1:]
    with torch.no_grad():
        noised = x_BCHW + sigmas[0] * noise.normal(keys_B, shape)
        return ancestral(ddpm(), noised, sigmas, lambda step: noise.normal(keys_B, shape, step + 1))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


# -- the loops ---------------------------------------------------------------------------------------


def test_ebm_and_ddpm(x, seeds):
    close(recipes.puregen_ebm(4, energy=tiny_energy(), **FEW)(x, seeds), walked(x, seeds, 4))
    close(recipes.puregen_ddpm(5, model=ddpm(), **FEW)(x, seeds), diffused(x, seeds, 5))
    close(recipes.puregen_ddpm(75, model=ddpm(), calls=3, **FEW)(x, seeds), diffused(x, seeds, 75, 3))


def test_naive_is_one_after_the_other(x, seeds):
    got = recipes.puregen_naive(3, 2, **MODELS, **FEW)(x, seeds)
    close(got, diffused(walked(x, noise.fold_in(seeds, 0), 3), noise.fold_in(seeds, 1), 2))


def test_reps_is_the_loop_written_out(x, seeds):
    got = recipes.puregen_reps(2, 3, 3, **MODELS, **FEW)(x, seeds)
    for i in range(COUNT):  # image for image, with its own noise at every stage and repetition
        image, key = x[i : i + 1], seeds[i : i + 1]
        for repetition in range(3):
            of_this = noise.fold_in(key, repetition)
            image = walked(image, noise.fold_in(of_this, 0), 2)
            image = diffused(image, noise.fold_in(of_this, 1), 3)
        close(got[i : i + 1], image)


def test_no_two_stages_and_repetitions_share_noise(x, seeds, monkeypatch):
    """Every number that is drawn in a run of Reps is drawn once."""
    drawn: list[Tensor] = []
    normal = noise.normal

    def noted(keys_B, shape, step=0):
        drawn.append(normal(keys_B, shape, step)[0])
        return drawn[-1].expand(len(keys_B), *shape).clone()

    monkeypatch.setattr(noise, "normal", noted)
    recipes.puregen_reps(3, 2, 4, **MODELS, **FEW)(x[:1], seeds[:1])
    assert len(drawn) == 4 * (3 + 2)  # the last diffusion step draws nothing, the noising does
    numbers = torch.stack(drawn).flatten(1)
    correlation = torch.corrcoef(numbers) - torch.eye(len(drawn))
    assert correlation.abs().max() < 5 / numbers.shape[1] ** 0.5
    assert len(torch.unique(numbers, dim=0)) == len(drawn)


def test_filt_purifies_the_share_and_leaves_the_others(x, seeds):
    images = PictureDataset(random_images(COUNT, 8))
    purifier = plans.plan(recipes.puregen_filt(0.4, ddpm_steps=3, **MODELS, **FEW), images, progress=False)
    assert isinstance(purifier, Where)
    got = purifier(x, seeds)
    bare = recipes.puregen_ddpm(3, model=ddpm(), **FEW)(x, seeds)
    high = set(tiny_energy()(x).topk(2).indices.tolist())
    for i in range(COUNT):
        assert torch.equal(got[i], bare[i] if i in high else x[i])


# -- the settings ------------------------------------------------------------------------------------


def test_the_published_settings_are_the_defaults():
    ebm = recipes.puregen_ebm(energy=tiny_energy())
    assert isinstance(ebm, Langevin)
    assert (ebm.steps, ebm.step_size, ebm.temperature) == (150, 0.00625, 1e-4)
    diffusion = recipes.puregen_ddpm(model=ddpm())
    assert isinstance(diffusion, Diffuse)
    assert diffusion.steps == 75
    assert diffusion.sigmas == (*[float(SCHEDULE.sigma(t)) for t in range(75, 0, -1)], 0.0)
    assert round(255 * diffusion.sigmas[0], 1) == 32.5

    naive = recipes.puregen_naive(**MODELS)
    assert isinstance(naive, Chain)
    assert [stage.steps for stage in naive._stages()] == [150, 75]
    reps = recipes.puregen_reps(**MODELS)
    assert isinstance(reps, Repeat)
    assert reps.times == 5
    assert [stage.steps for stage in reps.purifier._stages()] == [10, 50]
    filt = recipes.puregen_filt(**MODELS)
    assert isinstance(filt, Where)
    assert isinstance(filt.condition, EnergyAbove)
    assert filt.condition.k == 0.5
    assert isinstance(filt.purifier, Diffuse)
    assert filt.purifier.steps == 125


def test_a_stage_of_no_steps_is_left_out_and_its_model_not_asked_for():
    ebm, diffusion = recipes.puregen_ebm(3, energy=tiny_energy()), recipes.puregen_ddpm(3, model=ddpm())
    assert recipes.puregen_naive(3, 0, energy=tiny_energy(), model="nowhere").to_json() == ebm.to_json()
    assert recipes.puregen_naive(0, 3, energy="nowhere", model=ddpm()).to_json() == diffusion.to_json()
    reps = recipes.puregen_reps(0, 3, 2, energy="nowhere", model=ddpm())
    assert reps.to_json() == Repeat(diffusion, 2).to_json()
    filt = recipes.puregen_filt(0.3, ebm_steps=3, ddpm_steps=0, energy=tiny_energy(), model="nowhere")
    assert filt.purifier.to_json() == ebm.to_json()
    filt = recipes.puregen_filt(0.3, ebm_steps=3, ddpm_steps=3, repeats=2, **MODELS)
    assert filt.purifier.to_json() == Repeat(Chain(ebm, diffusion), 2).to_json()


RECIPES = {
    "ebm": lambda **o: recipes.puregen_ebm(2, energy=tiny_energy(), **{**FEW, **o}),
    "ddpm": lambda **o: recipes.puregen_ddpm(3, model=ddpm(), **{**FEW, **o}),
    "naive": lambda **o: recipes.puregen_naive(2, 3, **MODELS, **{**FEW, **o}),
    "reps": lambda **o: recipes.puregen_reps(2, 3, 2, **MODELS, **{**FEW, **o}),
    "filt": lambda **o: recipes.puregen_filt(0.5, ddpm_steps=3, **MODELS, **{**FEW, **o}),
}


def planned(purifier: Purifier) -> Purifier:
    return plans.plan(purifier, PictureDataset(random_images(9, 12)), progress=False)


@pytest.mark.parametrize("name", RECIPES)
def test_options(name, x, seeds):
    make = RECIPES[name]
    plain, fast = make().to_json(), make(fast=True, compute_batch=16).to_json()
    assert '"dtype":"float32"' in plain
    assert '"dtype":"bfloat16"' in fast
    assert '"dtype":"float32"' not in fast
    assert '"compute_batch":16' in fast
    assert '"compute_batch":4' not in fast
    big = random_images(2, 20).float() / 255
    sized = planned(make(resize=10, crop=8))
    assert sized(big, seeds[:2]).shape == (2, 3, 8, 8)
    tiled = planned(make(tile=8, overlap=2))
    assert tiled(big, seeds[:2]).shape == big.shape
    outer = tiled.purifier if name == "filt" else tiled  # the energy is of the whole image
    assert isinstance(outer, Tiles)
    both = make(resize=16, tile=8)
    assert isinstance(both, Chain)
    assert isinstance(both.stages[0], Resize)
    for options, message in (({"crop": 8}, "crop needs resize"), ({"overlap": 2}, "overlap needs tile")):
        with pytest.raises(ConfigError, match=message):
            make(**options)


@pytest.mark.parametrize("name", RECIPES)
def test_json_builds_back_the_same_purifier(name, x, seeds):
    purifier = planned(RECIPES[name](resize=8, tile=8, fast=True))
    again = recipes.from_json(purifier.to_json(), list(MODELS.values()))
    assert again.to_json() == purifier.to_json()
    assert torch.equal(again(x, seeds), purifier(x, seeds))


@pytest.mark.parametrize(("name", "networks"), [("ebm", 1), ("ddpm", 1), ("naive", 2), ("reps", 2)])
def test_compile_is_of_every_network(name, networks):
    assert RECIPES[name](compile=True).to_json().count('"compile":true') == networks
    assert '"compile":true' not in RECIPES[name]().to_json()


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_does_not_depend_on_its_batch(name, x, seeds):
    purifier = planned(RECIPES[name](fast=True))
    whole = purifier(x, seeds)
    order = [3, 1, 4, 0, 2]
    assert torch.equal(purifier(x[order], seeds[order]), whole[order])
    for i in (0, COUNT - 1):
        assert torch.equal(purifier(x[i : i + 1], seeds[i : i + 1]), whole[i : i + 1])


# -- models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    pretrained.save(tiny_energy(), root / "energy", name="an-energy")
    pretrained.save(ddpm(), root / "ddpm", name="a-ddpm")
    return {"energy": root / "energy", "model": root / "ddpm"}


def test_models_by_folder(folders, x, seeds):
    for by_folder in (folders, {key: str(path) for key, path in folders.items()}):
        purifier = recipes.puregen_naive(2, 2, **by_folder, **FEW)
        assert torch.equal(purifier(x, seeds), recipes.puregen_naive(2, 2, **MODELS, **FEW)(x, seeds))
        again = recipes.from_json(purifier.to_json(), list(by_folder.values()))
        assert again.to_json() == purifier.to_json()
    # the other one by its name, which this machine does not know
    with pytest.raises(CheckpointError, match="an-energy"):
        recipes.from_json(purifier.to_json(), folders["model"])


def test_a_name_in_json_downloads_nothing(folders, monkeypatch):
    def asked(*arguments):
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr("purifyloader.pretrained.registry._from_hub", asked)
    text = recipes.puregen_ddpm(2, model=folders["model"]).to_json().replace("a-ddpm", "owner/name")
    with pytest.raises(CheckpointError, match=r"'owner/name'\. Got no model of that name here: give it as model="):
        recipes.from_json(text)
    assert recipes.from_json(text, folders["model"]).to_json()


def test_an_energy_is_walked_at_the_temperature_it_was_trained_for(tmp_path, x, seeds):
    hot = tiny_energy()
    hot.temperature = 4e-4
    pretrained.save(hot, tmp_path / "hot", name="hot")
    assert pretrained.load(tmp_path / "hot", kind="energy").temperature == 4e-4
    expected = recipes.puregen_ebm(3, energy=tiny_energy(), temperature=4e-4)(x, seeds)
    assert not torch.equal(recipes.puregen_ebm(3, energy=tiny_energy())(x, seeds), expected)
    assert torch.equal(recipes.puregen_ebm(3, energy=tmp_path / "hot")(x, seeds), expected)
    assert torch.equal(recipes.puregen_naive(3, 0, energy=hot)(x, seeds), expected)
    plain = recipes.puregen_naive(3, 0, energy=hot, temperature=1e-4, step_size=0.005)
    assert torch.equal(plain(x, seeds), recipes.puregen_ebm(3, energy=tiny_energy(), step_size=0.005)(x, seeds))
    for bad in (0, -1.0, float("nan"), True):
        with pytest.raises(ConfigError, match="temperature"):
            recipes.puregen_reps(1, 1, 1, temperature=bad)
    assert "temperature" not in tiny_energy().describe()  # the published one


def test_a_model_of_the_wrong_kind(folders):
    for make, message in (
        (lambda: recipes.puregen_ebm(energy=folders["model"]), r"must hold an energy model\. Got a denoiser"),
        (lambda: recipes.puregen_ddpm(model=folders["energy"]), r"must hold a denoiser\. Got an energy model"),
        (lambda: recipes.puregen_filt(energy=folders["model"], model=ddpm()), "must hold an energy model"),
        (lambda: recipes.eclipse(folders["energy"]), r"must hold a denoiser\. Got an energy model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make()
    for make, message in (
        (lambda: recipes.puregen_ebm(energy=ddpm()), r"takes an energy model.* recipes\.eclipse"),
        (lambda: recipes.puregen_filt(energy=ddpm(), model=ddpm()), "takes an energy model"),
        (lambda: recipes.puregen_ddpm(model=tiny_energy()), r"takes a denoiser.* recipes\.puregen_ebm"),
        (lambda: recipes.puregen_ddpm(model=5), "takes a denoiser.* Got int"),
        (lambda: recipes.puregen_ddpm(300, model=ddpm(), calls=1), "trained for sigma"),
        (lambda: recipes.puregen_ddpm(1001, model=ddpm(), calls=1), r"t must lie in \[0, 1000\]"),
    ):
        with pytest.raises(InputError, match=message):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **m: recipes.puregen_ebm(0, energy=m["energy"]), "steps.* Got 0"),
        (lambda **m: recipes.puregen_ebm(-5, energy=m["energy"]), "steps.* Got -5"),
        (lambda **m: recipes.puregen_ebm(temperature=0, energy=m["energy"]), "temperature.* Got 0"),
        (lambda **m: recipes.puregen_ebm(step_size=-1, energy=m["energy"]), "step_size.* Got -1"),
        (lambda **m: recipes.puregen_ddpm(0, model=m["model"]), "steps.* Got 0"),
        (lambda **m: recipes.puregen_ddpm(7.5, model=m["model"]), r"steps.* Got 7\.5"),
        (lambda **m: recipes.puregen_ddpm(75, calls=76, model=m["model"]), "calls.* Got 76"),
        (lambda **m: recipes.puregen_ddpm(75, calls=0, model=m["model"]), "calls.* Got 0"),
        (lambda **m: recipes.puregen_naive(0, 0, **m), "must be above 0. Got 0 for both"),
        (lambda **m: recipes.puregen_naive(-1, 5, **m), "ebm_steps.* Got -1"),
        (lambda **m: recipes.puregen_naive(5, -1, **m), "ddpm_steps.* Got -1"),
        (lambda **m: recipes.puregen_naive(5, 0, calls=2, **m), "calls=2 with ddpm_steps=0"),
        (lambda **m: recipes.puregen_reps(repeats=0, **m), "repeats.* Got 0"),
        (lambda **m: recipes.puregen_reps(0, 0, **m), "Got 0 for both"),
        (lambda **m: recipes.puregen_filt(0, **m), "k is the share.* Got 0"),
        (lambda **m: recipes.puregen_filt(1.5, **m), r"k is the share.* Got 1\.5"),
        (lambda **m: recipes.puregen_filt(repeats=0, **m), "repeats.* Got 0"),
        (lambda **m: recipes.puregen_filt(ddpm_steps=0, **m), "Got 0 for both"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(make, message):
    with pytest.raises(ConfigError, match=message):
        make(energy="no-such-energy", model="no-such-model")


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(random_images(4, 8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def command(folder: Path, out: Path, *options: object) -> int:
    fixed = ["--dataset", folder, "--out", out, "--quiet", "--device", "cpu", "--threads", 1]
    return cli.main(["precompute", *map(str, [*fixed, *options])])


COMMANDS = {
    "puregen-ebm": (
        ["--steps", 2, "--step-size", 0.01, "--temperature", 0.001, "--compute-batch", 16],
        lambda **m: recipes.puregen_ebm(2, step_size=0.01, temperature=0.001, compute_batch=16, energy=m["energy"]),
    ),
    "puregen-ddpm": (
        ["--steps", 4, "--calls", 2, "--dtype", "bfloat16"],
        lambda **m: recipes.puregen_ddpm(4, calls=2, fast=True, model=m["model"]),
    ),
    "puregen-naive": (
        ["--ebm-steps", 2, "--ddpm-steps", 3],
        lambda **m: recipes.puregen_naive(2, 3, **m),
    ),
    "puregen-reps": (
        ["--ebm-steps", 2, "--ddpm-steps", 3, "--repeats", 2, "--calls", 1],
        lambda **m: recipes.puregen_reps(2, 3, 2, calls=1, **m),
    ),
    "puregen-filt": (
        ["--k", 0.25, "--ebm-steps", 2, "--ddpm-steps", 2, "--repeats", 2, "--tile", 8],
        lambda **m: recipes.puregen_filt(0.25, ebm_steps=2, ddpm_steps=2, repeats=2, tile=8, **m),
    ),
    "grayscale": ([], lambda **m: recipes.grayscale()),
    "bit-depth": (["--bits", 3], lambda **m: recipes.bit_depth(3)),
    "coin": (["--alpha", 1.5, "--resize", 8, "--crop", 8], lambda **m: recipes.coin(1.5, resize=8, crop=8)),
}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_command(recipe, folders, picture, tmp_path):
    options, make = COMMANDS[recipe]
    takes = {"puregen-ebm": ["energy"], "puregen-ddpm": ["model"]}.get(recipe, ["energy", "model"])
    models = [o for key in takes for o in (f"--{key}", folders[key])] if recipe.startswith("puregen") else []
    assert command(picture, tmp_path / "out", "--recipe", recipe, *models, *options) == 0
    reader = CacheReader(tmp_path / "out")
    assert reader.config["purifier"] == make(**folders).identity()
    assert (reader.plan is not None) is (recipe == "puregen-filt")


def test_the_command_with_a_recipe_from_a_file(folders, picture, tmp_path, capsys):
    purifier = recipes.puregen_filt(0.25, ebm_steps=2, ddpm_steps=2, **MODELS)
    (tmp_path / "recipe.json").write_text(purifier.to_json())
    base = ["--recipe", tmp_path / "recipe.json"]
    assert command(picture, tmp_path / "out", *base, "--energy", folders["energy"]) == 2
    assert "an unnamed denoiser" in capsys.readouterr().err
    assert command(picture, tmp_path / "out", *base, "--energy", folders["energy"], "--model", folders["model"]) == 0
    assert CacheReader(tmp_path / "out").config["purifier"] == purifier.identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["puregen-ebm", "--model", "x"], "takes --energy, ... Got --model: leave it out"),
        (["puregen-ddpm", "--energy", "x"], "takes --model, ... Got --energy: leave it out"),
        (["puregen-ebm", "--ebm-steps", 3], "Got --ebm-steps"),
        (["puregen-naive", "--steps", 3], "Got --steps"),
        (["puregen-naive", "--repeats", 3], "Got --repeats"),
        (["puregen-reps", "--k", 0.5], "Got --k"),
        (["puregen-filt", "--k", 0], "k is the share"),
        (["puregen-filt", "--sigma", 0.1], "Got --sigma"),
        (["puregen-ebm", "--energy", "FOLDER"], "must hold an energy model"),
        (["grayscale", "--energy", "x"], "has no network"),
        (["coin", "--dtype", "float32"], "has no network"),
        (["coin", "--alpha", -1], "alpha"),
        (["bit-depth", "--bits", 9], "from 1 to 8"),
        (["bit-depth", "--alpha", 1], "Got --alpha"),
        (["eclipse", "--model", "x", "--energy", "y"], "takes --model, ... Got --energy: leave it out"),
    ],
)
def test_wrong_options_are_one_error(options, message, folders, picture, tmp_path, capsys):
    options = [folders["model"] if option == "FOLDER" else option for option in options]
    assert command(picture, tmp_path / "out", "--recipe", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("purifyloader: error: ")
    assert all(part in error for part in message.split(" ... "))
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["precompute", "--help"])
    text = capsys.readouterr().out
    for name in recipes.RECIPES:
        assert name in text
        assert callable(getattr(recipes, name.replace("-", "_")))


def test_json_says_the_models_by_name(folders):
    values = json.loads(recipes.puregen_naive(2, 2, **folders).to_json())["purifier"]["stages"]
    assert [stage["energy" if "energy" in stage else "denoiser"]["name"] for stage in values] == ["an-energy", "a-ddpm"]
    with pytest.raises(PurifyError):
        recipes.from_json(recipes.puregen_naive(2, 2, **folders).to_json())
