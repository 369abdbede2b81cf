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
    """Align columns with spaces: all to the right, each as wide as its widest cell.

    Args:
        head: names of the columns.
        rows: cells, as many as names.
        text_last: the last column is text of any length; it is aligned left.

    Returns:
        One line per row, the head first.
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = []
    for cells in lines:
        text = cells.pop() if text_last else None
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=False)]
        out.append("  ".join([" ", *aligned, *([] if text is None else [text])]).rstrip())
    return out
