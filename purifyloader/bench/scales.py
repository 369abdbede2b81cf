"""Presets of a bench: what is run where nothing else is asked for. Needs no torch, for help texts."""

from __future__ import annotations

from dataclasses import dataclass

from purifyloader.bench.defences import DEFENCES

__all__ = ["ATTACK_SEED", "DENOISERS", "ROWS_FILE", "SCALES", "TABLE_FILE", "Scale"]

ROWS_FILE, TABLE_FILE = "rows.jsonl", "README.md"
ATTACK_SEED = 1000
DENOISERS = {"tiny-imagenet": "tiny-imagenet-sparse"}  # of a data set's own kind
_SAFER = "eclipse@25"  # the noise to take where the poison is not known


@dataclass(frozen=True)
class Scale:
    """A preset; `preset` is that of attacks with a surrogate."""

    data: str
    victim: str
    training: str
    preset: str
    defences: tuple[str, ...]


SCALES = {
    "cpu": Scale("sample", "resnet9", "short", "cpu", (*(d.name for d in DEFENCES.values() if not d.slow), _SAFER)),
    "full": Scale("cifar10", "resnet18", "paper", "full", (*DEFENCES, _SAFER)),
}
