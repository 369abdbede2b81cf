"""Read the images of a measurement, show how far it is, write its results to --out, and print them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from purifyloader.commands.options import settings_of, shows_progress
from purifyloader.results.folder import write_files
from purifyloader.results.values import to_json

if TYPE_CHECKING:
    from purifyloader.evaluation.inputs import Images, Models


@contextmanager
def calls_bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of network calls; the function that it yields takes the calls just made, and the calls of all work."""
    with tqdm(unit="calls", disable=not shown, leave=False) as bar:

        def progress(calls: int, total: int) -> None:
            bar.total = total
            bar.update(calls)

        yield progress


def clean_images(models: Models, options: argparse.Namespace, count: int, kind: str = "data") -> Images:
    """Read the images of --data or --clean that the options choose, by default `count`, and poison them."""
    from purifyloader.evaluation.inputs import Choice, read_images

    root = options.root if kind == "data" or options.clean_root is None else options.clean_root
    choice, bars = settings_of(options, Choice), shows_progress(options)
    return read_images(
        models, getattr(options, kind), choice, root=root, default=count, what=f"--{kind}", progress=bars
    )


def report(
    options: argparse.Namespace,
    results: Mapping[str, Any],
    table: Iterable[str],
    files: tuple[str, str],
    draw: Callable[[Path], object],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write results to --out, and print them: as JSON with --json, else as the lines of a table.

    `files` name the JSON file and the picture, which `draw` writes to a path; `texts` are other files by name. Files
    come first, for results may be printed to a pipe that was closed.
    """
    text, (json_file, picture_file) = to_json(results), files
    lines = []
    if options.out is not None:
        written = write_files(options.out, {**(texts or {}), json_file: text}, picture_file, draw)
        lines = [f"{'picture' if path.name == picture_file else 'results'}: {path}" for path in written.paths]
        lines += [written.note] if written.note else []
    print(text if options.json else "\n".join([*table, ""]), end="")
    if lines:
        print("\n".join(lines), file=sys.stderr if options.json else sys.stdout)
