"""A proposal from curves: the right level where it is known, and lines that can be pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from purifyloader import pretrained, recipes
from purifyloader.commands.main import execute, parse
from purifyloader.commands.recipe_options import purifier_of
from purifyloader.dynamics import DiffusionPath, LangevinPath, choose_level, picture, tune, tuning
from purifyloader.dynamics.report import reasons
from purifyloader.dynamics.tuning import compare_unpaired
from purifyloader.errors import InputError, PurifyError
from purifyloader.purifiers import Diffuse, Langevin
from tests.audit.test_audit import brightness
from tests.conftest import random_images, tiny_denoiser, tiny_energy
from tests.dynamics.test_dynamics import Towards

ROOT = Path(__file__).parents[2]
CLEAN = "tests.evaluation.test_evaluation:clean_sample"
POISONED = "tests.evaluation.test_evaluation:poisoned_sample"


def main(arguments: list[str]) -> int:
    """The command; errors of the user's are raised."""
    return execute(["tune", *arguments])


@pytest.mark.parametrize(
    ("closer", "share", "chosen", "best"),
    [
        ({"a": [0.0, 0.4, 0.6, 0.9]}, 0.5, 2, 3),
        ({"a": [0.0, 0.4, 0.6, 0.9]}, 0.6, 2, 3),
        ({"a": [0.0, 0.4, 0.6, 0.9], "b": [0.9, 0.9, 0.1, 0.7]}, 0.5, 3, 3),
        ({"a": [0.2, 0.4, 0.3]}, 0.5, None, 1),
        ({"a": [0.2, 0.4, 0.4], "b": [1.0, 1.0, 0.0]}, 0.5, None, 1),
        ({"a": [0.0, 0.0, 0.0], "b": [0.0, 1.0, 1.0]}, 0.5, None, 2),
        ({"a": [1.0]}, 1.0, 0, 0),
    ],
)
def test_the_smallest_level_that_does_for_every_attack(closer, share, chosen, best):
    found = choose_level(closer, share)
    assert (found.chosen, found.best) == (chosen, best)


@pytest.mark.parametrize(
    ("closer", "share", "message"),
    [
        ({}, 0.5, "one attack or more"),
        ({"a": []}, 0.5, "one level or more"),
        ({"a": [1]}, 0, "share"),
        ({"a": [1]}, 2, "share"),
    ],
)
def test_nothing_to_choose_from_is_an_error(closer, share, message):
    with pytest.raises(InputError, match=message):
        choose_level(closer, share)


def flat(count: int = 10) -> torch.Tensor:
    return torch.full((count, 3, 8, 8), 128, dtype=torch.uint8)


def lifted(by: list[int], count: int = 10) -> torch.Tensor:
    return flat(count) + torch.tensor([by[i % len(by)] for i in range(count)], dtype=torch.uint8)[:, None, None, None]


LEVELS = (0.1, 0.3, 0.45, 0.55, 0.7, 0.9)


def test_the_crossing_of_a_known_curve_is_chosen():
    """An image on its way to the clean one has come closer to it after half of the way."""
    results = tune(Towards(*LEVELS), flat(), {"p": lifted([40]), "q": lifted([100])})
    assert results["proposal"]["level"] == 0.55
    assert results["proposal"] == results["best"]
    assert results["before"]["level"] == 0.45
    assert results["proposal"]["attacks"]["p"]["closer_to_clean"] == 1
    assert results["before"]["attacks"]["p"]["closer_to_clean"] == 0
    assert results["proposal"]["cost_px"] == 0
    assert results["proposal"]["attacks"]["q"]["to_clean_px"] == pytest.approx(45, abs=0.5)
    assert results["proposal"]["attacks"]["q"]["to_clean_before_px"] == pytest.approx(100)
    assert {name: record["level"] for name, record in results["alone"].items()} == {"p": 0.55, "q": 0.55}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    text = " ".join(reasons(results))
    assert "At 0.55 Langevin steps, 100 % of p, 100 % of q images" in text
    assert "at 0.45 Langevin steps, 0 % of p" in text
    assert "moves clean images by 0 px" in text


def test_the_attack_that_asks_for_most_decides():
    """Clean is 100. On the way to 110, what was 140 is closer to clean below 120, and what was 60 above 80."""
    clean = torch.full((10, 3, 8, 8), 100, dtype=torch.uint8)
    poisoned = {"p": torch.full_like(clean, 140), "q": torch.full_like(clean, 60)}
    results = tune(Towards(*LEVELS, grey=110), clean, poisoned)
    assert results["proposal"]["level"] == 0.7
    assert {name: record["level"] for name, record in results["alone"].items()} == {"p": 0.7, "q": 0.45}
    assert "It is p that asks for so much: alone, 0.45 Langevin steps for q would do" in " ".join(reasons(results))
    # on the way to 128 what was 140 never is
    results = tune(Towards(*LEVELS, grey=128), clean, poisoned)
    assert results["proposal"] is None
    assert results["best"]["level"] == 0.9
    assert (results["alone"]["p"], results["alone"]["q"]["level"]) == (None, 0.45)
    text = " ".join(reasons(results))
    assert "No level tried does it: 50 % of the images" in text
    assert "That is the last level tried" in text
    assert "It is p that asks for so much" in text


def test_what_compensation_removes_need_not_be_washed_off():
    """As above, p an attack that compensation is known to remove: the level that the others ask for is given too."""
    clean = torch.full((10, 3, 8, 8), 100, dtype=torch.uint8)
    poisoned = {"lsp": torch.full_like(clean, 140), "q": torch.full_like(clean, 60)}
    results = tune(Towards(*LEVELS, grey=110), clean, poisoned)
    assert (results["proposal"]["level"], results["with_compensation"]["level"]) == (0.7, 0.45)
    text = " ".join(reasons(results))
    assert "with it 0.45 Langevin steps may do, where 100 % of q images have come closer" in text
    assert "`Compensate()`" in text
    assert "less may do" not in text
    # also where no level does for all
    results = tune(Towards(*LEVELS, grey=128), clean, poisoned)
    assert (results["proposal"], results["with_compensation"]["level"]) == (None, 0.45)
    # nothing to be said where it is the others that decide, or none of the attacks, or all
    for others in ({"lsp": poisoned["q"], "q": poisoned["lsp"]}, {"a": poisoned["lsp"]}, {"lsp": poisoned["lsp"]}):
        results = tune(Towards(*LEVELS, grey=110), clean, others)
        assert (results["proposal"]["level"], results["with_compensation"]) == (0.7, None)
        assert "`Compensate()`" not in " ".join(reasons(results))


def test_what_is_said_of_compensation_is_what_was_measured():
    """LSP by noise level, purified and with compensation, in the README's table."""
    page = (ROOT / "purifyloader" / "recipes" / "README.md").read_text(encoding="utf-8")
    text = page.split("<!-- noise -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip().split(" ±")[0] for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    assert rows[0][5:] == ["LSP, purified", "LSP, ECLIPSE"]
    of_lsp = [(float(row[5]), float(row[6])) for row in rows[2:] if float(row[0].removesuffix(" px")) <= 25]
    assert len(of_lsp) == 3
    assert all(44 <= round(alone) <= 62 and 66 <= compensated <= 67 for alone, compensated in of_lsp)


def test_a_share_of_the_images_is_enough():
    class TwoSpeeds(Towards):
        """Three images of ten go half as far."""

        def purify(self, images_NCHW, keys_N):
            for piece in super().purify(images_NCHW, keys_N):
                slow = torch.arange(len(images_NCHW)) % 10 < 3
                half = ((images_NCHW.int() + piece.images.int()) // 2).to(torch.uint8)
                yield piece._replace(images=torch.where(slow[:, None, None, None], half, piece.images))

    path = TwoSpeeds(*LEVELS)
    assert tune(path, flat(), {"p": lifted([80])}, share=0.7)["proposal"]["level"] == 0.55
    results = tune(path, flat(), {"p": lifted([80])}, share=0.71)
    assert results["proposal"] is None
    assert results["best"]["attacks"]["p"]["closer_to_clean"] == 0.7


def test_unpaired_images_are_compared_before_and_after():
    clean = torch.randint(100, 156, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = torch.randint(130, 186, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = compare_unpaired(Towards(1.0), Towards(0.1), clean, data, energy=brightness())
    assert found["images"] == {"clean": 40, "data": 30}
    before, after = found["energy"]["before"], found["energy"]["after"]
    assert (before["auc"], before["share_above"]) == (1, 1)
    assert before["clean_auc"][0] < 0.5 < before["clean_auc"][1]
    assert 0 == before["clean_share_above"][0] < before["clean_share_above"][1] < 0.5
    assert (after["auc"], after["share_above"], after["clean_median"]) == (0.5, 0, after["data_median"])
    # what is removed by a tenth of the way to grey is a tenth of the distance to it
    assert found["removed_px"]["before"]["auc"] == 1
    assert found["removed_px"]["before"]["data_median"] == pytest.approx(3.4, abs=0.3)
    assert found["removed_px"]["after"]["data_median"] == 0
    results = tune(Towards(*LEVELS), flat(), {"p": lifted([40])}, data_NCHW=lifted([9]), energy=brightness())
    assert results["unpaired"]["energy"]["before"]["auc"] == 1
    assert "Your data and the clean images are apart before" in " ".join(reasons(results))
    results = tune(Towards(*LEVELS), flat(), {"p": lifted([40])}, data_NCHW=flat(5))
    assert results["unpaired"]["energy"] is None
    assert "are not told apart before" in " ".join(reasons(results))


def test_data_of_which_a_part_is_unusual_is_told_apart():
    """A fifth is far brighter: an image of the data is above a clean one in little more than half of the pairs."""
    draw = np.random.default_rng(0)

    def grey(levels) -> torch.Tensor:
        return torch.from_numpy(levels.round().astype(np.uint8))[:, None, None, None].expand(-1, 3, 8, 8).contiguous()

    clean, data = draw.normal(128, 10, 100), draw.normal(128, 10, 100)
    data[:20] = 200
    results = tune(Towards(*LEVELS), grey(clean), {"p": grey(clean + 40)}, data_NCHW=grey(data), energy=brightness())
    before = results["unpaired"]["energy"]["before"]
    assert before["clean_auc"][0] < before["auc"] < before["clean_auc"][1]
    assert before["share_above"] == pytest.approx(0.2, abs=0.01)
    assert before["share_above"] > before["clean_share_above"][1]
    text = " ".join(reasons(results))
    assert "Your data and the clean images are apart before" in text
    assert "20 % of yours are above the clean ones' 99th percentile (of halves, 0 to" in text
    assert "a part of it is not: that part may be poisoned" in text
    one = tune(Towards(*LEVELS), grey(clean)[:1], {"p": grey(clean + 40)[:1]}, data_NCHW=grey(data))
    assert one["unpaired"]["removed_px"]["before"]["clean_share_above"] is None
    assert "apart" not in " ".join(reasons(one))


def test_a_picture_shows_what_was_asked_for_and_proposed(tmp_path, monkeypatch):
    clean = torch.full((10, 3, 8, 8), 100, dtype=torch.uint8)
    poisoned = {"q": torch.full_like(clean, 60), "lsp": torch.full_like(clean, 140)}
    results = tune(Towards(*LEVELS, grey=110), clean, poisoned, share=0.8, energy=brightness())
    assert picture(results, tmp_path / "1.png").read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr("purifyloader.dynamics.pictures.save_figure", lambda figure, path: figures.append(figure))
    picture(json.loads(json.dumps(results, sort_keys=True)), tmp_path / "2.png")
    (figure,) = figures
    assert len(figure.axes) == 5
    for axis in figure.axes:
        at = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
        assert {0.45, 0.7} <= set(at)
    shares = figure.axes[0]
    printed = [text.get_text() for text in shares.get_legend().get_texts()]
    assert printed == ["LSP", "q", "asked for: 80 %", "the proposal: 0.7", "with compensation: 0.45"]
    assert shares.lines[0].get_ydata()[-1] == 100
    assert list(shares.lines[2].get_ydata()) == [80, 80]
    picture({**results, "proposal": None}, tmp_path / "3.png")
    assert "no level proposed" in figures[-1].axes[0].get_title(loc="left")
    with pytest.raises(
        InputError, match=r"results of dynamics or tune.*Got {'format': 'purifyloader-tune', 'version': 9}"
    ):
        picture({**results, "version": 9}, tmp_path / "4.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"poisoned": {}}, "needs one attack or more"),
        ({"share": 0}, "share is the part"),
        ({"data_NCHW": random_images(3, 9)}, "images of one size"),
        ({"data_NCHW": random_images(3).float()}, "The dataset's images are uint8"),
        ({"poisoned": {"p": flat(9)}}, "must be the same images in the same order"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InputError, match=message):
        tune(Towards(0.5), **{"clean_NCHW": flat(), "poisoned": {"p": lifted([40])}, **change})


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path) -> Path:
    pretrained.save(tiny_energy(), tmp_path / "energy", name="tiny-energy")
    pretrained.save(tiny_denoiser(), tmp_path / "denoiser", name="tiny-denoiser")
    return tmp_path


def run(*options: str) -> int:
    return main(["--clean", CLEAN, "--device", "cpu", "--count", "6", "--batch-size", "16", *options])


def lines(text: str) -> tuple[str, list[str]]:
    """The two lines to be pasted."""
    found = [line.strip() for line in text.splitlines() if line.startswith(("    recipes.", "    purifyloader "))]
    python = next(line for line in found if line.startswith("recipes."))
    return python, shlex.split(next(line for line in found if line.startswith("purifyloader precompute")))


@pytest.mark.usefixtures("blank_figures")
def test_the_command_on_real_images(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--clean", CLEAN, "--data", POISONED, "--model", "cifar10-fast", "--count", "8", "--device", "cpu"]
    options += ["--sigma-px", "3", "20", "--batch-size", "16"]
    assert main([*options, "--poisoned", "ar", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["tune.json", "tune.png"]
    results = json.loads((out / "tune.json").read_text())
    proposal = results["proposal"]
    # AR: 6.37 to 20 px are enough for half of the images
    assert 19 < proposal["sigma_px"] < 21
    assert proposal["attacks"]["ar"]["closer_to_clean"] >= 0.5 > results["before"]["attacks"]["ar"]["closer_to_clean"]
    python, command = lines(printed)
    assert python == results["pasted"]
    purifier = eval(python, {"recipes": recipes})
    assert isinstance(purifier, Diffuse)
    assert (purifier.sigma, purifier.steps) == (proposal["level"], 1)
    parsed = parse(command[1:])[2]
    assert purifier_of(parsed).to_json() == purifier.to_json()
    assert (parsed.data, str(parsed.out)) == (POISONED, "cache/purified")
    assert "Your data and the clean images" in printed
    assert results["pasted_with_compensation"] is None
    assert str(tmp_path) not in (out / "tune.json").read_text()
    assert max(len(line) for line in printed.splitlines()[:-2] if "precompute" not in line) <= 120


@pytest.mark.parametrize(
    ("options", "kind", "want"),
    [
        (["--energy", "{tmp}/energy", "--steps", "2", "9"], Langevin, {"steps": 9}),
        (["--model", "{tmp}/denoiser", "--sigma-px", "25", "--calls", "3"], Diffuse, {"steps": 3, "sigma": 0.09804}),
        (["--model", "{tmp}/denoiser", "--recipe", "puregen-ddpm", "--steps", "4"], Diffuse, {"t": 4, "steps": 4}),
        (
            ["--model", "{tmp}/denoiser", "--recipe", "puregen-ddpm", "--steps", "4", "--calls", "2"],
            Diffuse,
            {"t": 4, "steps": 2},
        ),
    ],
)
def test_what_is_pasted_is_what_was_measured(options, kind, want, models, tmp_path, capsys, monkeypatch):
    """A share that any purification reaches, so that there is a proposal."""
    real = tuning.tune

    def proposing(*arguments, **more):
        results = real(*arguments, **more)
        return {**results, "proposal": results["best"]}

    monkeypatch.setattr(tuning, "tune", proposing)
    options = [option.format(tmp=tmp_path) for option in options]
    assert run(*options, "--poisoned", "ar") == 0
    python, command = lines(capsys.readouterr().out)
    purifier = eval(python, {"recipes": recipes})
    assert isinstance(purifier, kind)
    assert {name: getattr(purifier, name) for name in want} == want
    parsed = parse(command[1:])[2]
    assert purifier_of(parsed).to_json() == purifier.to_json()
    # with a size, what is measured is what is purified, resized
    assert run(*options, "--size", "16", "--poisoned", "ar") == 0
    python, command = lines(capsys.readouterr().out)
    assert eval(python, {"recipes": recipes}).output_shape((3, 40, 30)) == (3, 16, 16)
    assert command[command.index("--dataset") + 1] == "YOUR_DATA"
    assert command[command.index("--crop") + 1] == "16"


@pytest.mark.usefixtures("undrawn")
def test_the_level_with_compensation_stands_next_to_the_proposal(models, tmp_path, capsys, monkeypatch):
    """The measurement is the fixture's own: which levels do is not decided by a network with random weights."""
    real = tuning.tune

    def known(*arguments, **more):
        results = real(*arguments, **more)
        low, high = ({**results["best"], "level": sigma, "sigma_px": 255 * sigma} for sigma in (0.02, 0.2))
        return {**results, "proposal": high, "best": high, "with_compensation": low}

    monkeypatch.setattr(tuning, "tune", known)
    options = ("--model", str(models / "denoiser"), "--sigma-px", "5.1", "51", "--poisoned", "ar")
    assert run(*options, "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    where = printed.index(
        "Or, with compensation in training (PurifiedDataset(..., compensate=Compensate())): 5.1 px of noise"
    )
    assert printed.index("Proposal: 51 px of noise") < where
    python, command = lines(printed[where:])
    assert eval(python, {"recipes": recipes}).sigma == 0.02
    assert command[command.index("--sigma") + 1] == "0.02"
    assert {line.split()[0]: line.split("<-")[1] for line in printed.splitlines() if "<-" in line} == {
        "0.02": " with compensation",
        "0.2": "",
    }
    results = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert "sigma=0.02)" in results["pasted_with_compensation"]
    assert str(tmp_path) not in results["pasted_with_compensation"]


def test_no_proposal_is_said_plainly(models, tmp_path, capsys):
    np.save(tmp_path / "bright.npy", np.full((1, 3, 32, 32), 0.1, np.float32))
    options = ("--energy", str(models / "energy"), "--steps", "1", "2")
    assert run(*options, "--poisoned", f"{tmp_path / 'bright.npy'}:units=unit") == 0
    printed = capsys.readouterr().out
    assert "No proposal." in printed
    assert "recipes." not in printed
    assert "That is the last level tried" in printed
    assert run(*options, "--poisoned", f"{tmp_path / 'bright.npy'}:units=unit", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["proposal"] is results["pasted"] is None
    assert results["best"]["level"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Got neither"),
        (["--energy", "{tmp}/denoiser"], "Got a denoiser"),
        (["--energy", "{tmp}/energy", "--recipe", "eclipse"], "Got --recipe, which is about diffusion"),
        (["--model", "{tmp}/denoiser", "--steps", "9"], "eclipse takes --sigma-px"),
        (["--model", "{tmp}/denoiser", "--recipe", "puregen-ddpm", "--sigma-px", "9"], "puregen-ddpm takes --steps"),
        (["--energy", "{tmp}/energy", "--share", "1.5"], "share"),
        (["--energy", "{tmp}/energy", "--steps", "1", "--poisoned", "none"], "needs one attack or more"),
        (
            ["--energy", "{tmp}/energy", "--clean", "tests.audit.test_audit:empty"],
            "Expected images in --clean. Got an empty",
        ),
        (
            ["--energy", "{tmp}/energy", "--data", "tests.audit.test_audit:empty"],
            "Expected images in --data. Got an empty",
        ),
        (
            ["--energy", "{tmp}/energy", "--steps", "1", "--data", "tests.evaluation.test_evaluation:other_sample"],
            "of one size",
        ),
        (
            ["--energy", "{tmp}/energy", "--poisoned", "tests.evaluation.test_evaluation:short_sample"],
            "40 images of --clean",
        ),
        (
            ["--energy", "{tmp}/energy", "--poisoned", "tests.dynamics.test_dynamics:other_order"],
            "so the order is another",
        ),
        (["--energy", "{tmp}/energy", "--count", "41"], "^count must be from 1 to 40"),
    ],
)
def test_bad_options_are_named_and_write_nothing(options, message, models, tmp_path):
    options = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(PurifyError, match=message):
        run(*options, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_levels_that_are_measured_are_those_of_the_recipes():
    assert LangevinPath(tiny_energy(), [3]).work == (3,)
    assert DiffusionPath(tiny_denoiser(), sigmas=[0.05, 0.1]).work == (1, 1)
