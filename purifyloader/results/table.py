"""Print tables: Markdown for pages, aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["escaped", "markdown", "plain"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table: the first column is aligned left, the others right."""
    aligned = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, aligned, *rows])


def escaped(name: str) -> str:
    """Escape a name for a Markdown cell, so that it neither ends the cell nor changes its font."""
    return "".join(f"\\{letter}" if letter in "\\|*_`<[" else letter for letter in name)


def plain(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_last: bool = False) -> list[str]:
    """Align columns with spaces, one line a row, the head first: to the right, or with `text_last` all but the last."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if text_last:
        widths[-1] = 0
    return ["  ".join([" ", *map(str.rjust, cells, widths)]).rstrip() for cells in lines]
