"""Run a command of `purifyloader`: one row a command, and one place for how each of them begins and ends.

A command's module has its options and what it does with them:

    DESCRIPTION                     a sentence or two for its --help
    add_options(parser)             adds its options; imports no torch, for a help text must not take seconds
    run(options) -> int             does the work and returns the exit status; imports the rest
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from purifyloader.commands.options import check_data
from purifyloader.commands.processes import exit_status
from purifyloader.core.version import __version__
from purifyloader.errors import InputError, PurifyError


class Command(NamedTuple):
    """A row of the table: a name of one word or two, a line of help, and a module of `purifyloader.commands`."""

    name: str
    help: str
    module: str

    def load(self) -> Any:
        return importlib.import_module(f"purifyloader.commands.{self.module}")


COMMANDS = (
    Command("precompute", "purify a dataset once, into a cache", "precompute"),
    Command("cache", "look at a cache, verify it, compare two, or take one to tars and back", "cache"),
    Command("models", "list the models that ship with the library", "models"),
    Command("tune", "propose how strongly to purify, from clean images and attacks", "tune"),
    Command("train denoiser", "train a denoiser from a few clean images", "train_denoiser"),
    Command("train energy", "train an energy model from clean images", "train_energy"),
    Command("convert", "bring a published checkpoint into this library's form", "convert"),
    Command("denoiser evaluate", "measure how well a denoiser denoises, by noise level and frequency", "evaluate"),
    Command("audit energy", "rank the images of a dataset by how unusual an energy model finds them", "audit"),
    Command("sanitize", "find images with wrong labels that a back door put into a dataset", "sanitize"),
    Command("dynamics", "measure how purification moves clean and poisoned images, step by step", "dynamics"),
    Command("bench", "train victims on poisons, with and without defences", "bench"),
    Command("certify", "certify how far training images may be changed without changing a vote", "certify"),
    Command("poison", "poison a dataset, to test a defence on it", "poison"),
)


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, as all other code does, and takes no shortened options, nor do its commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options first: argparse names a missing one alone, and hides that it was misspelt."""
        words = itertools.takewhile(lambda word: word != "--", args or ())
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        if self._subparsers is None and (unknown := [n for n in names if n not in self._option_string_actions]):
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.rstrip('.')}. `{self.prog} --help` lists the options.")


def _overview(arguments: Sequence[str]) -> NoReturn:
    """Print the commands or the version, or refuse what is no command."""
    group = [row for row in COMMANDS if arguments and row.name.split()[0] == arguments[0]]
    rows = group or COMMANDS
    width = max(len(row.name) for row in rows) + 2
    parser = _Parser(
        prog="purifyloader",
        usage="purifyloader COMMAND ... (each has its --help)",
        description="Train on images you cannot trust.",
        epilog="\n".join(["commands:", *(f"  {row.name:<{width}}{row.help}" for row in rows)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"purifyloader {__version__}")
    parser.parse_args(arguments[1:] if group else arguments[:1] if arguments[0:1] and arguments[0][0] == "-" else [])
    names = ", ".join(row.name for row in rows)
    if group:
        raise InputError(f"{arguments[0]!r} is the first word of: {names}. Give the second one.")
    got = f"Got {' '.join(arguments[:2])!r}." if arguments else "Got none."
    raise InputError(f"A command is one of {names}. {got}")


def parse(arguments: Sequence[str]) -> tuple[Any, argparse.ArgumentParser, argparse.Namespace]:
    """Find the command's module and parse its options: (module, parser, options).

    It exits after a help text or the version, and raises an `InputError` for another command or option.
    """
    for command in COMMANDS:
        words = command.name.split()
        if list(arguments[: len(words)]) == words:
            module = command.load()
            parser = _Parser(prog=f"purifyloader {command.name}", description=module.DESCRIPTION)
            module.add_options(parser)
            options = parser.parse_args(arguments[len(words) :])
            check_data(options)
            return module, parser, options
    _overview(arguments)


def execute(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status. An error of the user's is raised, as a `PurifyError`."""
    module, _, options = parse(arguments)
    return int(module.run(options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; an error of the user's is one line on standard error, and status 2."""
    flags: dict[str, str] = {}

    def work() -> int:
        module, parser, options = parse(sys.argv[1:] if arguments is None else arguments)
        flags.update({action.dest: action.option_strings[0] for action in parser._actions if action.option_strings})
        return int(module.run(options))

    def in_words(error: PurifyError) -> str:
        # the library names its argument, a command line its option
        return str(error) if error.argument is None else f"{flags.get(error.argument, error.argument)} {error.message}"

    return exit_status(work, in_words)


if __name__ == "__main__":
    sys.exit(main())
