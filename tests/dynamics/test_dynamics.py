"""Figure 2 of PureGen: against closed forms and the purifiers themselves, and as a command on real images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from purifyloader import pretrained
from purifyloader.commands import main as cli
from purifyloader.commands.main import execute
from purifyloader.core import noise
from purifyloader.core.images import quantize
from purifyloader.diffusion.schedule import LinearSchedule
from purifyloader.dynamics import DiffusionPath, LangevinPath, dynamics, measure, picture
from purifyloader.dynamics.measuring import crossing
from purifyloader.dynamics.paths import Piece
from purifyloader.energy import EnergyConfig, EnergyNetwork, image_energies
from purifyloader.errors import ConfigError, InputError, PurifyError
from purifyloader.purifiers import Diffuse, Langevin
from tests.audit.test_audit import Brightness, trained_on
from tests.conftest import random_images, tiny_denoiser, tiny_energy
from tests.evaluation.test_evaluation import Identity, clean_sample, folder_of, sample

ROOT = Path(__file__).parents[2]
CLEAN = "tests.evaluation.test_evaluation:clean_sample"
POISONED = "tests.evaluation.test_evaluation:poisoned_sample"


def main(arguments: list[str]) -> int:
    """The command; errors of the user's are raised."""
    return execute(["dynamics", *arguments])


class Towards:
    """A purification that takes an image the share `levels` of the way to flat grey: everything about it is known."""

    image_channels = 3

    def __init__(self, *levels: float, grey: int = 128) -> None:
        self.levels, self.work, self.grey = levels, (1,) * len(levels), grey

    def config(self):
        levels = [{"level": level, "calls": 1} for level in self.levels]
        model = {"name": "towards", "weights_sha256": "0" * 64, "parameters": 0}
        return {"kind": "langevin", "unit": "Langevin steps", "model": model, "levels": levels}

    def only(self, level: int):
        return Towards(self.levels[level], grey=self.grey)

    def purify(self, images_NCHW, keys_N) -> Iterator[Piece]:
        for i, share in enumerate(self.levels):
            x = images_NCHW.float() / 255
            yield Piece(i, slice(0, len(x)), quantize(x + share * (self.grey / 255 - x)), 0.5 * (i + 1))


def l2(a, b) -> np.ndarray:
    return (a.double() - b.double()).square().flatten(1).sum(dim=1).sqrt().numpy() / 255


# -- the measures ------------------------------------------------------------------------------------


def test_a_purification_that_does_nothing_moves_nothing():
    clean, poisoned = random_images(5), random_images(5, seed=1)
    poisoned[3] = clean[3]
    measured = measure(Towards(0.0), clean, {"p": poisoned})
    found = measured.poisoned["p"]
    assert (measured.levels, measured.moved.tolist()) == ((0, 0.0), [[0.0] * 5] * 2)
    assert found.to_poisoned.tolist() == [[0.0] * 4] * 2
    rows = [0, 1, 2, 4]  # an image that is not poisoned says nothing of poison
    np.testing.assert_allclose(found.to_clean, [l2(clean[rows], poisoned[rows])] * 2)
    assert found.largest == int((clean.int() - poisoned.int()).abs().max()) / 255
    results = dynamics(Towards(0.0), clean, {"p": poisoned})
    assert [level["poisoned"]["p"]["closer_to_clean"] for level in results["levels"]] == [0, 0]
    assert results["poisons"]["p"]["crossing"] is None
    assert results["poisons"]["p"]["images"] == 4


def test_distances_are_those_written_out():
    clean = torch.full((3, 3, 8, 8), 128, dtype=torch.uint8)
    poisoned = clean + torch.tensor([10, 20, 40], dtype=torch.uint8)[:, None, None, None]
    levels = (0.25, 0.5, 0.75, 1.0)
    results = dynamics(Towards(*levels), clean, {"p": poisoned})
    scale = np.sqrt(3 * 8 * 8) / 255
    for level, share in zip(results["levels"], (0, *levels), strict=True):
        found = level["poisoned"]["p"]
        away = [round(share * 10), round(share * 20), round(share * 40)]
        left = [10 - away[0], 20 - away[1], 40 - away[2]]
        px = np.array([np.mean(left), np.mean(away)])
        got = found["clean_to_purified_poisoned"], found["poisoned_to_purified_poisoned"]
        # half-way bytes round either way
        assert [g["rms_px"] for g in got] == pytest.approx(px, abs=0.4)
        assert [g["l2"] for g in got] == pytest.approx([scale * g["rms_px"] for g in got], rel=1e-5)
        assert level["clean_to_purified_clean"] == {"l2": 0, "rms_px": 0, "standard_error_l2": 0}
    assert results["levels"][4]["poisoned"]["p"]["closer_to_clean"] == 1
    assert results["poisons"]["p"]["crossing"] == pytest.approx(0.5, abs=0.02)
    assert results["poisons"]["p"]["size"]["rms_px"] == pytest.approx(70 / 3, rel=1e-5)
    assert [level["seconds_per_image"] for level in results["levels"]] == [0, 0.5, 1, 1.5, 2]


@pytest.mark.parametrize(
    ("to_clean", "to_poisoned", "want"),
    [
        ([3, 3, 3], [0, 2, 4], 15.0),
        ([3, 2, 1], [0, 1, 2], 15.0),
        ([3, 2, 1], [0, 0, 4], 10 + 10 * 2 / 5),
        ([3, 2, 2], [0, 2, 5], 10.0),
        ([3, 3, 3], [0, 1, 2.9], None),
        ([3, 1, 9, 1], [0, 2, 0, 8], 7.5),
    ],
)
def test_curves_cross_where_they_meet_first(to_clean, to_poisoned, want):
    levels = [0, 10, 20, 30][: len(to_clean)]
    assert crossing(levels, to_clean, to_poisoned) == (None if want is None else pytest.approx(want))


class Bowl(Brightness):
    """k / 2 of the squared distance from grey: Langevin steps contract to it at a known rate."""

    k = 2.0

    def forward(self, x_BCHW):
        return self.k / 2 * (x_BCHW - 0.5).square().sum(dim=(1, 2, 3))


def test_langevin_in_a_bowl_goes_as_far_as_it_must():
    bowl = Bowl(EnergyConfig(channels=4)).eval().requires_grad_(False)
    steps, size, temperature = (1, 5, 20), 0.01, 1e-3
    clean = quantize(0.5 + 0.1 * noise.normal(noise.image_keys(9, 0, range(40)), (3, 16, 16)))
    path = LangevinPath(bowl, steps, step_size=size, temperature=temperature)
    results = dynamics(path, clean, energy=bowl, temperature=temperature)
    rate = 1 - size**2 / 2 / temperature * bowl.k
    start = (clean / 255 - 0.5).square().sum(dim=(1, 2, 3))
    for level, n in zip(results["levels"][1:], steps, strict=True):
        spread = 768 * size**2 * sum(rate ** (2 * i) for i in range(n))
        want = ((1 - rate**n) ** 2 * start + spread).sqrt().mean()
        assert level["clean_to_purified_clean"]["l2"] == pytest.approx(float(want), rel=0.01)
        energy = bowl.k / 2 * (rate ** (2 * n) * start + spread).mean() / temperature
        assert level["energy"]["mean"] == pytest.approx(float(energy), rel=0.02)
    assert results["levels"][0]["energy"]["mean"] == pytest.approx(
        float(start.mean() * bowl.k / 2 / temperature), rel=1e-5
    )


def test_diffusion_without_a_denoiser_adds_its_noise():
    clean = torch.full((30, 3, 16, 16), 128, dtype=torch.uint8)
    results = dynamics(DiffusionPath(Identity(), sigmas=[0.02, 0.1]), clean)
    got = [level["clean_to_purified_clean"]["rms_px"] for level in results["levels"]]
    assert got == pytest.approx([0, np.hypot(5.1, 0.289), 25.5], rel=0.02)
    assert [level["sigma_px"] for level in results["levels"][1:]] == [5.1, 25.5]


# -- the paths are the purifiers ---------------------------------------------------------------------


def gathered(path, images, keys) -> torch.Tensor:
    out = torch.zeros(len(path.levels), *images.shape, dtype=torch.uint8)
    for level, rows, purified, seconds in path.purify(images, keys):
        out[level, rows] = purified
        assert seconds > 0
    return out


PATHS = {
    "langevin": lambda **more: LangevinPath(tiny_energy(), [1, 3, 7], **more),
    "t": lambda **more: DiffusionPath(tiny_denoiser(), t=[2, 5], schedule=LinearSchedule(1000), **more),
    "sigma": lambda **more: DiffusionPath(tiny_denoiser(), sigmas=[0.05, 0.1], calls=2, sampler="ddim", **more),
}


@pytest.mark.parametrize("kind", PATHS)
def test_an_image_is_that_of_the_purifier_whatever_comes_with_it(kind):
    images, keys = random_images(37, 8), noise.image_keys(3, 0, range(37))
    path = PATHS[kind]()
    got = gathered(path, images, keys)
    for level, value in enumerate(path.levels):
        purifier = {
            "langevin": lambda n=value: Langevin(tiny_energy(), n),
            "t": lambda t=value: Diffuse(tiny_denoiser(), t=t, schedule=LinearSchedule(1000)),
            "sigma": lambda s=value: Diffuse(tiny_denoiser(), sigma=s, steps=2, sampler="ddim"),
        }[kind]()
        assert torch.equal(got[level], quantize(purifier(images / 255, keys)))
        assert torch.equal(gathered(path.only(level), images[30:], keys[30:])[0], got[level, 30:])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gathered(path, images[order], keys[order]), got[:, order])
    assert torch.equal(gathered(path, images[4:5], keys[4:5]), got[:, 4:5])


@pytest.mark.parametrize("kind", PATHS)
def test_results_do_not_depend_on_the_images_measured_together(kind):
    clean, poisoned = random_images(35, 8), random_images(35, 8, seed=1)
    energy = tiny_energy(seed=1)
    every = measure(PATHS[kind](), clean, {"p": poisoned}, energy=energy)
    few = measure(PATHS[kind](), clean[:3], {"p": poisoned[:3]}, energy=energy)
    for many, some in ((every, few), (every.poisoned["p"], few.poisoned["p"])):
        for name in ("moved", "energy", "to_clean", "to_poisoned"):
            if hasattr(many, name):
                np.testing.assert_array_equal(getattr(many, name)[:, :3], getattr(some, name))
    torch.testing.assert_close(torch.from_numpy(every.energy[0]).float(), image_energies(energy, clean / 255))
    other = measure(PATHS[kind](), clean[:3], seed=1)
    assert not np.array_equal(other.moved, few.moved)


def test_progress_counts_every_call_and_results_are_json():
    calls = []
    clean, poisoned = random_images(35), random_images(35, seed=1)
    poisoned[:5] = clean[:5]
    path = LangevinPath(tiny_energy(), [2, 5])
    results = dynamics(path, clean, {"p": poisoned}, progress=lambda count, total: calls.append((count, total)))
    assert {total for _, total in calls} == {sum(count for count, _ in calls)} == {5 * (35 + 30)}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    again = dynamics(path, clean, {"p": poisoned})
    for level in (*results["levels"], *again["levels"]):
        level.pop("seconds_per_image")
    assert again == results
    assert dynamics(DiffusionPath(tiny_denoiser(), t=[1, 4], calls=2), clean[:1])["levels"][2]["calls"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LangevinPath(tiny_energy(), []), "numbers of Langevin steps, rising"),
        (lambda: LangevinPath(tiny_energy(), [5, 5]), r"rising.*Got \[5, 5\]"),
        (lambda: LangevinPath(tiny_energy(), [0, 5]), "above 0"),
        (lambda: LangevinPath(tiny_energy(), [1.5]), "steps must be an integer from 1 to 1000000"),
        (lambda: LangevinPath(tiny_denoiser(), [5]), "takes an energy model"),
        (lambda: LangevinPath(tiny_energy(), [5], temperature=-1), "temperature"),
        (lambda: DiffusionPath(tiny_energy(), t=[5]), "takes a denoiser.*Got EnergyNetwork"),
        (lambda: DiffusionPath(tiny_denoiser()), "as t or as sigmas"),
        (lambda: DiffusionPath(tiny_denoiser(), t=[5], sigmas=[0.1]), "as t or as sigmas"),
        (lambda: DiffusionPath(tiny_denoiser(), sigmas=[0.1, 0.9]), "0.9|sigma"),
        (lambda: DiffusionPath(tiny_denoiser(), t=[7, 5]), "rising"),
        (lambda: DiffusionPath(tiny_denoiser(), t=[5], calls=0), "calls is the number"),
        (lambda: DiffusionPath(tiny_denoiser(), t=[5], sampler="luck"), "sampler must be"),
    ],
)
def test_bad_levels_are_named(make, message):
    with pytest.raises(PurifyError, match=message):
        make()


@pytest.mark.parametrize(
    ("clean", "poisoned", "message"),
    [
        (random_images(2).float(), {}, "Dynamics take uint8"),
        (random_images(2, channels=1), {}, "3 channels"),
        (random_images(2), {"p": random_images(3)}, r"\(p\) must be the same images in the same order"),
        (random_images(2), {"p": random_images(2)}, r"\(p\) must differ from the clean ones"),
    ],
)
def test_bad_images_are_named(clean, poisoned, message):
    with pytest.raises(InputError, match=message):
        measure(Towards(0.5), clean, poisoned)


def test_a_model_that_breaks_is_named():
    class Cliff(Brightness):
        def forward(self, x_BCHW):
            return 1e30 * super().forward(x_BCHW).square()

    with pytest.raises(PurifyError, match="Langevin steps must leave images about"):
        measure(LangevinPath(Cliff(EnergyConfig(channels=4)), [1, 2, 9]), random_images(2))

    class Nan(Brightness):
        def forward(self, x_BCHW):
            return super().forward(x_BCHW) * float("nan")

    with pytest.raises(PurifyError, match="Energies must be finite"):
        measure(Towards(0.5), random_images(2), energy=Nan(EnergyConfig(channels=4)))


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path) -> Path:
    pretrained.save(tiny_energy(), tmp_path / "energy", name="tiny-energy")
    pretrained.save(tiny_denoiser(), tmp_path / "denoiser", name="tiny-denoiser")
    return tmp_path


def run(*options: str, data: str = CLEAN) -> int:
    return main(["--data", data, "--device", "cpu", "--count", "6", "--batch-size", "16", *options])


def read(folder: Path) -> dict:
    return json.loads((folder / "dynamics.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("blank_figures")
def test_the_command_on_real_images(models, tmp_path, capsys):
    np.save(tmp_path / "trigger.npy", np.full((1, 3, 32, 32), 0.125, np.float32))
    out = tmp_path / "out"
    options = ["--data", CLEAN, "--model", "cifar10-fast", "--energy", str(models / "energy"), "--count", "4"]
    options += ["--poisoned", "ar", f"{tmp_path / 'trigger.npy'}:units=minus-one-to-one", "--out", str(out)]
    assert main([*options, "--sigma-px", "25", "6.37", "--device", "cpu", "--batch-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["dynamics.json", "dynamics.png"]
    results = read(out)
    assert [level.get("sigma_px") for level in results["levels"]] == [None, 6.37, 25]
    assert results["poisons"]["trigger.npy"]["largest_px"] == 16
    low, high = results["levels"][1:]
    assert low["clean_to_purified_clean"]["rms_px"] < high["clean_to_purified_clean"]["rms_px"] < 25
    # AR is fine, and gone at 25 px of noise
    assert high["poisoned"]["ar"]["closer_to_clean"] > 0.7
    assert results["energy"]["name"] == "tiny-energy"
    assert str(tmp_path) not in (out / "dynamics.json").read_text()
    for text in ("cifar10-fast", "6.37 px", "trigger.npy, 1", "seconds", "U = E / 0.0001"):
        assert text in printed
    assert max(map(len, printed.splitlines()[:-2])) <= 120
    with Image.open(out / "dynamics.png") as drawn:
        drawn.load()


def test_files_are_not_overwritten_unasked_and_json_is_the_file(models, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = ("--energy", str(models / "energy"), "--steps", "2", "1", "--poisoned", "none", "--out", str(out))
    with monkeypatch.context() as patched:  # drawn once is enough
        patched.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"blank"))
        assert run(*options) == 0
    assert "clean images:" in capsys.readouterr().out.lower()
    with pytest.raises(InputError, match=r"with dynamics.json, dynamics.png: give another one, or overwrite them"):
        run(*options)
    assert run(*options, "--overwrite", "--json") == 0
    printed = capsys.readouterr()
    assert printed.out == (out / "dynamics.json").read_text()
    assert [level["level"] for level in read(out)["levels"]] == [0, 1, 2]
    assert read(out)["poisons"] == {}
    drawn = (out / "dynamics.png").read_bytes()
    assert picture(read(out), tmp_path / "again.png").read_bytes() == drawn
    for bad in ({}, None, {**read(out), "version": 99}):
        with pytest.raises(InputError, match="Expected results of dynamics"):
            picture(bad, tmp_path / "bad.png")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "more", [("--steps", "3", "5"), ("--sigma-px", "10"), ("--calls", "1"), ("--schedule", "cosine", "--calls", "1")]
)
def test_a_denoiser_alone_has_no_energies(more, models, tmp_path):
    options = (*more, "--count", "2", "--size", "8", "--out", str(tmp_path / "out"))
    assert run("--model", str(models / "denoiser"), *options) == 0
    results = read(tmp_path / "out")
    assert results["energy"] is None
    assert set(results["poisons"]) == {"lsp", "ar"}
    if more[0] == "--steps":
        assert [level["calls"] for level in results["levels"]] == [0, 3, 5]
    if more[0] == "--calls":
        assert [level["calls"] for level in results["levels"][1:]] == [1] * 10


def test_results_without_energies_are_drawn(tmp_path):
    results = dynamics(Towards(0.4, 0.8), random_images(2), {"lsp": random_images(2, seed=1)})
    assert results["energy"] is None
    assert picture(results, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def other_order():
    from tests.evaluation.test_evaluation import Listed

    return Listed(sample()[0][::-1].copy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "energy must name an energy model, .* Got neither"),
        (["--energy", "nothing"], "must be a shipped name"),
        (["--energy", "{tmp}/denoiser"], "must hold an energy model. Got a denoiser"),
        (["--model", "{tmp}/energy"], "must hold a denoiser. Got an energy model"),
        (["--energy", "{tmp}/energy", "--sigma-px", "9"], "Langevin steps take --steps. Got --sigma-px"),
        (["--energy", "{tmp}/energy", "--schedule", "linear"], "Got --schedule"),
        (["--energy", "{tmp}/energy", "--sampler", "ddim"], "Got --sampler, which is about diffusion"),
        (["--energy", "{tmp}/energy", "--size", "99999"], "at most 4096 pixels. Got 99999"),
        (["--energy", "{tmp}/energy", "--steps", "0"], "rising, above 0"),
        (
            ["--model", "{tmp}/denoiser", "--sigma-px", "9", "--steps", "3"],
            "Give the levels as --sigma-px, or as --steps",
        ),
        (["--model", "{tmp}/denoiser", "--sigma-px", "900"], "sigma"),
        (["--model", "{tmp}/denoiser", "--steps", "999"], "sigma"),
        (
            ["--energy", "{tmp}/energy", "--data", "tests.audit.test_audit:empty"],
            "Expected images in --data. Got an empty",
        ),
        (["--energy", "{tmp}/energy", "--poisoned", "none", "ar"], "none stands alone"),
        (["--energy", "{tmp}/energy", "--poisoned", "ar", "ar"], "Got ar twice"),
        (["--energy", "{tmp}/energy", "--poisoned", "lsp:units=unit"], "The attack lsp takes norm.* Got 'units'"),
        (
            ["--energy", "{tmp}/energy", "--poisoned", "tests.evaluation.test_evaluation:short_sample"],
            "must have the 40 images of",
        ),
        (
            ["--energy", "{tmp}/energy", "--poisoned", "tests.dynamics.test_dynamics:other_order"],
            "so the order is another",
        ),
        (
            ["--energy", "{tmp}/energy", "--poisoned", "tests.evaluation.test_evaluation:clean_sample"],
            "must move images",
        ),
        (["--energy", "{tmp}/energy", "--count", "41"], "count must be from 1 to 40"),
        (["--energy", "{tmp}/energy", "--batch-size", "0"], "compute_batch"),
        (["--energy", "{tmp}/energy", "--overwrite"], "^overwrite is about"),
    ],
)
def test_bad_options_are_named_and_write_nothing(options, message, models, tmp_path):
    options = [option.format(tmp=tmp_path) for option in options]
    out = [] if "--overwrite" in options else ["--out", str(tmp_path / "out")]
    steps = [] if {"--steps", "--sigma-px"} & set(options) or "--energy" not in options else ["--steps", "1"]
    with pytest.raises(PurifyError, match=message):
        run(*options, *steps, *out)
    assert not (tmp_path / "out").exists()


def test_images_that_either_model_was_trained_on_are_left_out(tmp_path, capsys):
    energy = trained_on(tmp_path / "e", list(range(10, 40)), clean_sample())
    more = ["--data", CLEAN, "--device", "cpu", "--poisoned", "none", "--json"]
    assert main([*more, "--energy", str(energy), "--steps", "1"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["data"]["indices"] == list(range(10))
    assert "left out 30 of the 40 images in --data" in printed.err
    pretrained.save(tiny_denoiser(), tmp_path / "d")
    assert main([*more, "--model", str(tmp_path / "d"), "--energy", str(energy), "--sigma-px", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["indices"] == list(range(10))


def test_images_of_many_sizes_need_one(models, tmp_path):
    images, _ = sample(4)
    data = folder_of(tmp_path / "d", [images[0], images[1][:, :20], images[2]])
    options = ["--data", data, "--energy", str(models / "energy"), "--steps", "1", "--device", "cpu"]
    with pytest.raises(InputError, match="size must be given"):
        main(options)
    assert main([*options, "--size", "16", "--poisoned", "ar"]) == 0


def test_the_command_is_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dynamics", "--help"])
    assert "FILE.npy:units=bytes" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        main(["--data", CLEAN])
    assert isinstance(tiny_energy(), EnergyNetwork)


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(2, "0 1 2"), (9, "0 1 2 3 4 5 6 7 8 9"), (20, "0 5 10 15 20"), (30, "0 5 10 15 20 25 30"), (225, "0 25 50 75")],
)
def test_langevin_steps_are_counted_in_whole_numbers(last, ticks):
    from matplotlib.figure import Figure

    from purifyloader.dynamics.pictures import _over_levels

    axis = Figure().add_subplot()
    purification = {"kind": "langevin", "unit": "Langevin steps"}
    levels = [{"level": 0, "seconds_per_image": 0}, {"level": last, "seconds_per_image": 1}]
    _over_levels(axis, {"purification": purification, "levels": levels})
    shown = [label.get_text().split("\n")[0] for label in axis.get_xticklabels()]
    assert shown[: len(ticks.split())] == ticks.split()
    assert [float(label) for label in shown] == axis.get_xticks().tolist()


def test_a_picture_is_the_same_from_results_and_from_their_json(tmp_path):
    poisoned = {"p": random_images(2, seed=1)}
    results = dynamics(Towards(0.4, 0.8), random_images(2), poisoned, energy=tiny_energy())
    again = json.loads(json.dumps(results, sort_keys=True))
    drawn = picture(results, tmp_path / "1.png").read_bytes()
    assert picture(again, tmp_path / "2.png").read_bytes() == drawn
