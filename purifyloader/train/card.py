"""Write the card of a trained model: README.md, generated from the details in its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Fact", "card", "origin", "rate", "run"]

Fact = tuple[str, str]
"""A row of a card's first table: a name and Markdown."""


def card(
    name: str,
    kind: tuple[str, str],
    facts: Sequence[Fact],
    results: Sequence[str],
    details: Mapping[str, Any],
    pictures: Mapping[str, str],
    options: str = "",
) -> str:
    """Return the text of README.md: facts in a table, lines of results, and the captions of pictures beside it.

    `kind` is such as ("A denoiser", "denoiser"), the name of its command, and `options` are what that command needs
    beside config.json to train the model again; `purifyloader.commands.training` makes the details.
    """
    model, command = kind
    text = [f"# {name}", "", f"{model} for `purifyloader`, trained by `purifyloader train {command}`.", ""]
    if details["note"]:
        text += [details["note"], ""]
    facts = [*facts, ("Licence", details["licence"] or "not stated")]
    text += ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in facts), "", *results]
    if details["record"]["warnings"]:
        text += ["While it was trained:", "", *(f"- {warning}" for warning in details["record"]["warnings"]), ""]
    for picture, caption in pictures.items():
        text += [f"![{caption}]({picture})", "", f"*{caption}*", ""]
    text += [
        "To train it again, `config.json` of this folder says the rest:",
        "",
        "```bash",
        f"purifyloader train {command} --data DATA --config config.json --indices config.json{options} --out again",
        "```",
        "",
        "<details><summary>Indices of the training images</summary>",
        "",
        ", ".join(map(str, details["indices"])),
        "",
        "</details>",
        "",
    ]
    return "\n".join(text)


def origin(details: Mapping[str, Any], more: str = "") -> list[Fact]:
    """Describe the images, and the weights that the training started from."""
    start = details["train"]["start_from"]
    started = "random weights" if start is None else _model(start)
    teacher = details["train"].get("distil_from")
    images = f"{len(details['indices']):,} of {details['data_length']:,} images of {details['data']}{more}"
    facts = [("Trained on", images), ("Started from", started)]
    return facts if teacher is None else [*facts, ("Distilled from", _model(teacher))]


def _model(entry: Mapping[str, Any]) -> str:
    return f"the weights of `{entry['name'] or 'an unnamed model'}` (SHA-256 `{entry['weights_sha256'][:16]}`)"


def run(details: Mapping[str, Any], optimiser: str, steps: str, rows: str) -> list[Fact]:
    """Describe the length and arithmetic of a training; `steps` and `rows` name its steps and the rows of a batch."""
    train, record = details["train"], details["record"]
    length = (
        f"{record['steps']:,} {steps} of {train['batch_size']} {rows}, {record['epochs']:,g} epochs, "
        f"{record['seconds'] / 60:,.0f} minutes on {details['machine']}"
    )
    if record["processes"] > 1:
        length += f" in {record['processes']} processes"
    if record["peak_memory"]:
        length += f", {record['peak_memory'] / 1e9:.1f} GB of memory at most"
    arithmetic = f"{train['dtype']}{' with convolutions in TF32' if record.get('tf32') else ''}"
    return [
        ("Length", length),
        ("Optimiser", optimiser),
        ("Average", f"EMA {train['ema_decay']}" if train["ema_decay"] else "none"),
        ("Arithmetic", f"{arithmetic}{', compiled' if train['compile'] else ''}, seed {train['seed']}"),
    ]


def rate(train: Mapping[str, Any], optimiser: str) -> str:
    warmup = f", warm-up {train['warmup']:,} steps" if train["warmup"] else ""
    return f"{optimiser} {train['learning_rate']:g}{warmup}"
