"""The `purifyloader` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from purifyloader.core.version import __version__
from purifyloader.errors import PurifyError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="purifyloader", description="Train on images you cannot trust.")
    parser.add_argument("--version", action="version", version=f"purifyloader {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # listed here; their options are their own modules', which cost seconds of torch to import
    commands.add_parser("precompute", help="purify a dataset once, into a cache", add_help=False)
    commands.add_parser(
        "cache", help="look at a cache, verify it, compare two, or take one to tars and back", add_help=False
    )
    commands.add_parser("models", help="list the models that ship with the library")
    commands.add_parser("convert", help="bring a published checkpoint into this library's form", add_help=False)

    train = commands.add_parser("train", help="train a model").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    train.add_parser("denoiser", help="train a denoiser from a few clean images", add_help=False)
    train.add_parser("energy", help="train an energy model from clean images", add_help=False)
    denoiser = commands.add_parser("denoiser", help="judge a denoiser").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    denoiser.add_parser("evaluate", help="how well it denoises, by noise level and by frequency", add_help=False)
    audit = commands.add_parser("audit", help="look at a dataset before trusting it").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    audit.add_parser("energy", help="which images an energy model finds unusual", add_help=False)
    commands.add_parser(
        "dynamics", help="how purification moves clean and poisoned images, step by step", add_help=False
    )
    commands.add_parser("tune", help="propose how strongly to purify, from clean images and attacks", add_help=False)
    commands.add_parser("bench", help="train victims on poisons, with and without defences", add_help=False)
    commands.add_parser(
        "certify", help="how far training images could be changed without changing a vote", add_help=False
    )
    commands.add_parser("poison", help="poison a dataset, to test a defence on it", add_help=False)
    return parser


def _models() -> Iterator[str]:
    """A line for each model that ships, also for one that cannot be read; no weights are loaded."""
    from purifyloader.pretrained.checkpoint import summary
    from purifyloader.pretrained.registry import available, find

    for name in available():
        try:
            its = summary(find(name))
        except PurifyError as error:
            yield f"{name:<23} cannot be read: {' '.join(str(error).split())}"
            continue
        what = "an energy model"
        if its.noise_px is not None:
            what = "for noise from {:.2g} to {:.0f} px".format(*its.noise_px)
        yield f"{name:<23} {its.parameters / 1e6:>6.2f} M parameters, {what}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Errors of the user's are one line on standard error and exit status 2; so is an interruption, with 130.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if argv[:2] == ["train", "denoiser"]:
            from purifyloader.commands import train_denoiser as command

            return command.main(argv[2:])
        if argv[:2] == ["train", "energy"]:
            from purifyloader.commands.train_energy import main as train_energy

            return train_energy(argv[2:])
        if argv[:2] == ["denoiser", "evaluate"]:
            from purifyloader.commands.evaluate import main as evaluate

            return evaluate(argv[2:])
        if argv[:2] == ["audit", "energy"]:
            from purifyloader.commands.audit import main as audit

            return audit(argv[2:])
        if argv[:1] == ["dynamics"]:
            from purifyloader.commands.dynamics import main as dynamics

            return dynamics(argv[1:])
        if argv[:1] == ["tune"]:
            from purifyloader.commands.tune import main as tune

            return tune(argv[1:])
        if argv[:1] == ["bench"]:
            from purifyloader.commands.bench import main as bench

            return bench(argv[1:])
        if argv[:1] == ["certify"]:
            from purifyloader.commands.certify import main as certify

            return certify(argv[1:])
        if argv[:1] == ["poison"]:
            from purifyloader.commands.poison import main as poison

            return poison(argv[1:])
        if argv[:1] == ["convert"]:
            from purifyloader.commands.convert import main as convert

            return convert(argv[1:])
        if argv[:1] == ["precompute"]:
            from purifyloader.precompute import main as precompute

            return precompute(argv[1:])
        if argv[:1] == ["cache"]:
            from purifyloader.commands.cache import main as cache

            return cache(argv[1:])
        _parser().parse_args(argv)  # "models" is what is left
        for line in _models():
            print(line)
        return 0
    except PurifyError as error:
        print(f"purifyloader: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("purifyloader: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
