"""Every command: what a stranger may type before he has read anything, and how each of them begins and ends."""

from __future__ import annotations

import argparse
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
    from purifyloader.purified.ondemand import CHECKED

    assert options_of("precompute")["--check-source"].help.endswith(f"(default: {CHECKED})")


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
