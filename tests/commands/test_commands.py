"""Every command: what a stranger may type before he has read anything, and how each of them begins and ends."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from purifyloader.commands import main as cli
from purifyloader.errors import InputError

ROOT = Path(__file__).parents[2]
NAMES = [command.name for command in cli.COMMANDS]

# in a process of its own: what blocks torch must not be imported already
HELP_WITHOUT_TORCH = """
import contextlib, io, sys
for heavy in ("torch", "torchvision", "kornia", "matplotlib", "scipy"):
    sys.modules[heavy] = None  # an import of it fails
from purifyloader.commands import main as cli
names = [command.name for command in cli.COMMANDS]
for words in [[], *(name.split() for name in names), ["train"]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main([*words, "--help"])
        except SystemExit as stopped:
            assert stopped.code == 0, words
    assert out.getvalue().startswith("usage: purifyloader"), words
    print(" ".join(words), len(out.getvalue()), sep=",")
"""


def options_of(name: str) -> dict[str, argparse.Action]:
    """The options of a command by the flags that they are typed as."""
    parser = argparse.ArgumentParser()
    next(command for command in cli.COMMANDS if command.name == name).load().add_options(parser)
    found: dict[str, argparse.Action] = {}
    parsers = [parser]
    for one in parsers:
        for action in one._actions:
            found |= dict.fromkeys(action.option_strings, action)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


@pytest.mark.parametrize("command", cli.COMMANDS, ids=NAMES)
def test_a_row_of_the_table_has_a_module_behind_it(command):
    module = command.load()
    assert module.DESCRIPTION.endswith(".")
    assert callable(module.run)
    for flag, action in options_of(command.name).items():
        assert action.help, f"{flag} has no help"


def test_every_help_text_is_written_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lengths = dict(line.rsplit(",", 1) for line in done.stdout.splitlines())
    assert set(NAMES) < lengths.keys()


@pytest.mark.parametrize("words", [[], ["train"], ["nonsense"], ["train", "nonsense"], ["--nonsense"]], ids=" ".join)
def test_what_is_no_command_is_one_line(words, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("purifyloader: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_one_line(name, capsys):
    assert cli.main([*name.split(), "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("purifyloader: error: ")
    assert error.count("\n") == 1


def test_a_misspelt_option_is_named_beside_a_missing_one(capsys):
    assert cli.main(["precompute", "--data", "photos", "--recip=jpeg", "--out", "cache"]) == 2
    assert "--recip." in capsys.readouterr().err


def test_what_comes_behind_two_dashes_is_no_option(capsys):
    assert cli.main(["cache", "info", "--", "--nowhere"]) == 2
    assert "--nowhere" in (error := capsys.readouterr().err)
    assert "unrecognized" not in error


@pytest.mark.parametrize("group", ["train", "audit", "denoiser"])
def test_a_first_word_alone_is_told_the_second(group, capsys):
    assert cli.main([group]) == 2
    assert f"{group!r} is the first word of: {group} " in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if "--threads" in options_of(name)])
def test_threads_that_would_crash_are_refused(name, capsys):
    assert cli.main([*name.split(), "--threads", "99999999"]) == 2
    assert "--threads: must be at most 1024. Got '99999999'" in capsys.readouterr().err


NOWHERE = {  # each would open what is not there, if its options were not looked at first
    "precompute": ["--data", "photos", "--recipe", "jpeg", "--out", "cache"],
    "poison": ["--data", "photos", "--attack", "lsp", "--out", "out.npz"],
    "tune": ["--data", "photos", "--clean", "photos", "--energy", "nowhere"],
    "dynamics": ["--data", "photos", "--model", "nowhere"],
    "denoiser evaluate": ["nowhere", "--data", "photos"],
    "audit energy": ["--energy", "nowhere", "--data", "photos"],
    "convert": ["nowhere", "--data", "photos"],
    "train denoiser": ["--data", "photos", "--out", "model"],
    "train energy": ["--data", "photos", "--out", "model"],
    "certify": ["--data", "module:function", "--out", "out"],
}


@pytest.mark.parametrize("name", NOWHERE)
def test_options_that_would_change_nothing_are_refused(name, capsys):
    known = options_of(name)
    assert cli.main([*name.split(), *NOWHERE[name], "--root", "elsewhere"]) == 2
    error = capsys.readouterr().err
    assert "--root goes with " in error
    assert f"Got --root elsewhere with {NOWHERE[name][NOWHERE[name].index('--data') + 1]}" in error
    for flag in {"--split", "--clean-split"} & known.keys():
        other = next(choice for choice in known[flag].choices if choice != known[flag].default)
        words = ["--clean", "photos"] * (flag == "--clean-split")
        assert cli.main([*name.split(), *NOWHERE[name], flag, other, *words]) == 2
        assert f"{flag} goes with cifar10 or cifar100. Got {flag} {other} with photos" in capsys.readouterr().err


def test_a_root_of_other_images_than_the_data_is_taken():
    data = ["train", "denoiser", "--data", "photos", "--out", "model", "--root", "elsewhere"]
    for more in (["--validation", "cifar10"], ["--data", "imagefolder"]):
        assert cli.parse([*data, *more])[2].root == "elsewhere"
    assert (
        cli.parse(["tune", "--data", "photos", "--clean", "photos", "--poisoned", "lsp", "imagefolder", "--root", "x"])[
            2
        ].root
        == "x"
    )


WRONG = [
    ("train denoiser", ["--steps", "0"], "--steps: must be an integer of 1 or more. Got '0'"),
    ("train denoiser", ["--preset", "heavy"], "--preset: invalid choice: 'heavy'"),
    ("train denoiser", ["--learning-rate", "-1"], "--learning-rate: must be a number above 0. Got '-1'"),
    ("train energy", ["--preset", "heavy"], "--preset: invalid choice: 'heavy'"),
    ("train energy", ["--channels", "0"], "--channels: must be an integer of 1 or more. Got '0'"),
    *(
        (name, ["--sigma-px", value], f"--sigma-px: must be a number above 0. Got '{value}'")
        for name in ("tune", "dynamics", "denoiser evaluate")
        for value in ("-3", "nan", "x")
    ),
    ("certify", ["--sigma", "-1"], "--sigma must be above 0"),
    ("certify", ["--victim", "nothing"], "nothing"),
]


@pytest.mark.parametrize(("name", "words", "text"), WRONG, ids=[" ".join([n, *w]) for n, w, _ in WRONG])
def test_values_are_looked_at_before_any_data(name, words, text, monkeypatch, capsys):
    # the second is imported first, or a module that is imported meanwhile would keep what stands there
    for opener in ("purifyloader.certify.session._data", "purifyloader.datasets.named.open_dataset"):
        monkeypatch.setattr(opener, lambda *_, **__: pytest.fail("the data was opened"))
    assert cli.main([*name.split(), *NOWHERE[name], *words]) == 2
    assert text in capsys.readouterr().err


def test_presets_of_the_command_line_are_those_there_are():
    from purifyloader.train import RECIPES
    from purifyloader.train.energy import ENERGY_RECIPES

    assert set(options_of("train denoiser")["--preset"].choices) == set(RECIPES)
    assert set(options_of("train energy")["--preset"].choices) == set(ENERGY_RECIPES)


def test_a_recipe_from_a_file_that_is_none_names_the_file(tmp_path, capsys):
    for name, content, text in (
        ("brace.json", b"{bad", "brace.json: A purifier is read from JSON."),
        ("bytes.json", b"\xff\xfe\xfd", "bytes.json': it is not UTF-8: 'utf-8' codec"),
        ("other.json", b'{"schema": 9, "purifier": {}}', "other.json: This version of purifyloader reads"),
    ):
        (tmp_path / name).write_bytes(content)
        words = ["precompute", "--data", str(tmp_path), "--recipe", str(tmp_path / name), "--out", str(tmp_path / "c")]
        assert cli.main(words) == 2
        assert text in capsys.readouterr().err


def test_a_certificate_without_scipy_ends_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["certify", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'purifyloader[certify]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_how_a_command_ends(name, monkeypatch, capsys):
    """Three ways, and one place that knows the exit status of each."""
    module = next(command for command in cli.COMMANDS if command.name == name).load()
    monkeypatch.setattr(module, "add_options", lambda parser: parser.add_argument("--some-count"))
    for error, status, text in (
        (InputError("It is wrong. Do this."), 2, "purifyloader: error: It is wrong. Do this.\n"),
        (
            InputError("must be 1. Got 0.", argument="some_count"),
            2,
            "purifyloader: error: --some-count must be 1. Got 0.\n",
        ),
        (InputError("must be 1. Got 0.", argument="other"), 2, "purifyloader: error: other must be 1. Got 0.\n"),
        (KeyboardInterrupt(), 130, "purifyloader: interrupted\n"),
    ):

        def fail(options, error=error):
            raise error

        monkeypatch.setattr(module, "run", fail)
        assert cli.main(name.split()) == status
        assert capsys.readouterr() == ("", text)
    monkeypatch.setattr(module, "run", lambda options: 1)
    assert cli.main(name.split()) == 1


def test_an_option_has_one_default_and_one_type_everywhere():
    seen: dict[str, tuple[str, argparse.Action]] = {}
    for name in NAMES:
        for flag, action in options_of(name).items():
            if flag in ("--device", "--quiet", "--json", "--overwrite", "--choose-seed", "--root", "--size"):
                first, other = seen.setdefault(flag, (name, action))
                assert (action.default, action.type) == (other.default, other.type), f"{flag} of {name} and {first}"


def test_a_default_that_torch_keeps_is_the_one_of_the_help():
    from purifyloader.purified.filling import precompute

    assert inspect.signature(precompute).parameters["check_source"].default is True
    assert options_of("precompute")["--check-source"].help.endswith("(default: all)")


DOORS = {
    "precompute": ["purifyloader.precompute"],
    "train denoiser": ["purifyloader", "train", "denoiser"],
    "train energy": ["purifyloader", "train", "energy"],
    "certify": ["purifyloader", "certify"],
}


@pytest.mark.parametrize("name", DOORS)
def test_the_doors_of_launchers(name):
    """`accelerate launch -m ...` starts each process so; a wrong option shows that it is this command."""
    done = subprocess.run(
        [sys.executable, "-m", *DOORS[name], "--no-such-option"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("purifyloader: error: ")
    assert f"`purifyloader {name} --help`" in done.stderr
    module = next(command for command in cli.COMMANDS if command.name == name).load()
    assert f"accelerate launch -m {' '.join(DOORS[name])}" in module.DESCRIPTION
