"""Write the card of a trained model: README.md, generated from the details in its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["average", "card", "length", "start_words"]


def start_words(train: Mapping[str, Any]) -> str:
    start = train["start_from"]
    if start is None:
        return "random weights"
    return f"the weights of `{start['name'] or 'an unnamed model'}` (SHA-256 `{start['weights_sha256'][:16]}`)"


def length(details: Mapping[str, Any], steps: str, what: str) -> str:
    """Describe how long a training took; `steps` and `what` name its steps and the rows of a batch."""
    train, record = details["train"], details["record"]
    text = (
        f"{record['steps']:,} {steps} of {train['batch_size']} {what}, {record['epochs']:,g} epochs, "
        f"{record['seconds'] / 60:,.0f} minutes on {details['machine']}"
    )
    if record["processes"] > 1:
        text += f" in {record['processes']} processes"
    return text + (f", {record['peak_memory'] / 1e9:.1f} GB of memory at most" if record["peak_memory"] else "")


def average(train: Mapping[str, Any]) -> str:
    return f"EMA {train['ema_decay']}" if train["ema_decay"] else "none"


def card(
    name: str,
    kind: tuple[str, str],
    facts: Sequence[tuple[str, str]],
    results: Sequence[str],
    details: Mapping[str, Any],
    pictures: Mapping[str, str],
) -> str:
    """Return the text of README.md.

    Args:
        kind: such as "A denoiser", and the name of its command, such as "denoiser".
        facts: rows of the first table; the licence is added.
        results: lines of Markdown after it.
        details: saved with the model by `purifyloader.commands.training`.
        pictures: names of files beside the card, with their captions.
    """
    what, command = kind
    text = [f"# {name}", "", f"{what} for `purifyloader`, trained by `purifyloader train {command}`.", ""]
    if details["note"]:
        text += [details["note"], ""]
    facts = [*facts, ("Licence", details["licence"] or "not stated")]
    text += ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in facts), "", *results]
    if details["record"]["warnings"]:
        text += ["While it was trained:", "", *(f"- {warning}" for warning in details["record"]["warnings"]), ""]
    for picture, caption in pictures.items():
        text += [f"![{caption}]({picture})", "", f"*{caption}*", ""]
    return "\n".join([*text, *_again(command, details)])


def _again(command: str, details: Mapping[str, Any]) -> list[str]:
    size = f" --size {details['resized']}" if details.get("resized") else ""
    images = f"--data DATA --config config.json --indices config.json{size}"
    return [
        "To train it again, `config.json` of this folder says the rest:",
        "",
        "```bash",
        f"purifyloader train {command} {images} --out again",
        "```",
        "",
        "<details><summary>Indices of the training images</summary>",
        "",
        ", ".join(map(str, details["indices"])),
        "",
        "</details>",
        "",
    ]
