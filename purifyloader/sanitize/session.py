"""Find images with a label that is not theirs: train, purify in rounds, weigh the evidence, name the suspects."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.cache.format import source_sha256
from purifyloader.certify.functions import Train, training_settings
from purifyloader.core import sizes
from purifyloader.core.checks import as_path, check_choice, check_integer, check_seed
from purifyloader.core.devices import device_of
from purifyloader.datasets.samples import ImageKey
from purifyloader.datasets.sources import random_state_kept
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json, replacing, writing
from purifyloader.files.opening import opened
from purifyloader.purified.tensors import check_applicable
from purifyloader.purifiers import Purifier
from purifyloader.sanitize import evidence, inputs, scoring
from purifyloader.sanitize.verdict import Verdict

__all__ = ["sanitize"]

FOLDS = 4  # networks that learn from the reference, each without a quarter of it
LIKELY = 0.8  # percentile among clean images above which an image under a target's label is a suspect


def sanitize(
    dataset: Dataset[Any],
    purifier: Purifier | None = None,
    *,
    reference: Dataset[Any] | None = None,
    by: str | None = None,
    rounds: int = 5,
    train: Train | None = None,
    seed: int = 0,
    size: int | None = None,
    image_key: ImageKey = None,
    label_key: ImageKey = None,
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Verdict:
    """Find the images of a back door with wrong labels: the classes they are put under, and which they are.

    With a `reference`, four networks learn from three quarters of it each, and say how unlikely each image of the
    dataset is for its label, measured by clean images that they have not seen. With a `purifier`, a network learns from
    the dataset as it is, and the images are purified round after round, each from where the last one ended, as in
    DataElixir (Zhou et al., AAAI 2024, arXiv:2312.11057): a trigger goes, and the image loses the label that it gave.
    A class where the evidence is beyond chance is a target. Its suspects are those images that the reference finds
    unlikely, or else those that lose their label.

    An attack that keeps labels right cannot be seen so; purify all images against it.

    Args:
        dataset: map-style, of samples with an image and a class number.
        purifier: see `purifyloader.recipes`, of one network call best; None to go by the reference alone.
        reference: clean images of the same classes with right labels, none of which is in the dataset. The images that
            a denoiser was trained on will do.
        by: the kind of evidence that decides, of `purifyloader.sanitize.evidence.KINDS`; "reference" where there is
            one, else "published".
        rounds: how often images are purified.
        train: (training set, seed) to a predictor, as `purifyloader.certify` takes it; a small network by default.
        seed: of trainings and noise.
        size: bring the shorter side of images to this and crop the centre first, where they are of several sizes.
        image_key, label_key: where image and label are in a sample; as in `PurifiedDataset` and `plans.Sanitation`.
        work: folder in which finished trainings and votes are kept, so that a stopped run goes on.
        progress: show a bar.

    Raises `InputError` for datasets without integer labels or with one class, of other classes than the reference, or
    with images in common with it; where no class has 20 images; and for a `train` that learns nothing.

    >>> import numpy as np, torch
    >>> from purifyloader import sanitize
    >>> def grey(level, label):
    ...     return np.full((8, 8, 3), level, np.uint8), label
    >>> clean = [grey(level, int(level > 127)) for level in range(0, 256, 2)]  # dark is 0, and bright 1
    >>> data = [grey(level, int(level > 127 or level < 50)) for level in range(1, 256, 2)]  # and some dark ones too
    >>> def train(dataset, seed):  # of yours: it returns what gives a logit for each class
    ...     return lambda x_BCHW: torch.stack([-x_BCHW.mean((1, 2, 3)), x_BCHW.mean((1, 2, 3)) - 1], 1)
    >>> verdict = sanitize.sanitize(data, reference=clean, train=train, progress=False)
    >>> verdict.targets, [data[i][0][0, 0, 0].item() for i in verdict.suspects[:3]]
    ((1,), [1, 3, 5])
    """
    by = ("published" if reference is None else "reference") if by is None else by
    _check_arguments(purifier, reference, by, rounds, train, seed, size)
    data = inputs.read(dataset, size, image_key, label_key, "the dataset")
    known = None if reference is None else inputs.read(reference, size, image_key, label_key, "the reference")
    classes = inputs.check_labels(data, known)
    training = scoring.default_training(_device(purifier)) if train is None else train
    kept = _Kept(None if work is None else as_path(work), _fingerprint(data, known, training, seed, size))
    steps = (FOLDS if known is not None else 0) + (rounds + 1 if purifier is not None else 0)
    with random_state_kept(), tqdm(total=steps, unit="step", disable=not progress, leave=False) as bar:
        run = _Run(data, known, classes, training, seed, kept, bar)
        judged = None if known is None else run.judged(known)
        votes = None if purifier is None else run.votes(purifier, rounds)
    found = _Found(data, known, classes, judged, votes)
    return _verdict(
        found, by, partial(inputs.file_name, dataset), label_key, _how(purifier, rounds, training, seed, size)
    )


def _check_arguments(
    purifier: Any, reference: Any, by: str, rounds: int, train: Any, seed: int, size: int | None
) -> None:
    check_choice("by", by, evidence.KINDS, error=InputError)
    check_integer("rounds", rounds, 1, 1000, error=InputError)
    check_seed(seed)
    if size is not None:
        sizes.check_resize(size, size)
    if purifier is not None:
        check_applicable(purifier)
    if by != "published" and reference is None:
        raise InputError(f"of {by!r} compares with clean images. Got no reference: give one.", argument="by")
    if by != "reference" and purifier is None:
        more = " or a reference" if reference is None else ""
        raise InputError(
            f"of {by!r} looks at what purification does to labels. Got no purifier: give one{more}.", argument="by"
        )
    if train is not None and not callable(train):
        raise InputError(f"train must be a function of (training set, seed). Got {type(train).__name__}.")


def _device(purifier: Purifier | None) -> torch.device:
    return (None if purifier is None else device_of(purifier)) or torch.device("cpu")


def _fingerprint(
    data: inputs.Images, known: inputs.Images | None, train: Train, seed: int, size: int | None
) -> dict[str, Any]:
    return {
        "data": source_sha256(data.hashes),
        "reference": None if known is None else source_sha256(known.hashes),
        "train": training_settings(train),
        "torch": str(torch.__version__),
        "seed": seed,
        "size": size,
    }


class _Kept:
    """Arrays of finished steps in a folder, each a file that says of what; None keeps nothing."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def get(self, name: str, make: Callable[[], dict[str, NDArray[Any]]], **more: Any) -> dict[str, NDArray[Any]]:
        """Read the arrays of a step, or make them and write them down."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        digest = hashlib.sha256(canonical_json({**self.settings, **more}).encode()).hexdigest()
        with suppress(OSError, safetensors.SafetensorError), opened(path) as file:
            content = file.read()
            with safetensors.safe_open(path, "np") as there:
                if (there.metadata() or {}).get("of") == digest:
                    return safetensors.numpy.load(content)
        arrays = make()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(safetensors.numpy.save(arrays, {"of": digest}))
        return arrays


class _Judged(NamedTuple):
    at_least: NDArray[np.int64]  # (FOLDS, N): clean images of the label that are as unlikely
    counts: NDArray[np.int64]  # (FOLDS, classes): of all of these
    likeliest: NDArray[np.int64]  # (N,), of the classes but the label

    def scores(self, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """How unlikely each image is for its label, as a mean percentile among clean images."""
        scores: NDArray[np.float64] = (1 - self.at_least / np.maximum(self.counts[:, labels], 1)).mean(axis=0)
        return scores


class _Votes(NamedTuple):
    data: NDArray[np.int64]  # (N, rounds + 1)
    reference: NDArray[np.int64] | None


@dataclass(frozen=True)
class _Run:
    """What is looked at, how networks are trained, and where finished steps are kept."""

    data: inputs.Images
    known: inputs.Images | None
    classes: int
    train: Train
    seed: int
    kept: _Kept
    bar: tqdm[Any]

    def judged(self, known: inputs.Images) -> _Judged:
        """Let networks that learned from parts of the reference judge every image."""
        labels = self.data.labels
        folds = scoring.folds_of(known.labels, FOLDS, self.seed)
        places, counts, total = [], [], np.zeros((len(labels), self.classes))
        for fold in range(FOLDS):
            own = folds != fold
            judge = partial(self._judge, known, own, self.seed + fold)
            logs = self.kept.get(f"reference-{fold}", judge, fold=fold, folds=FOLDS)
            apart = known.labels[~own]
            unlikely = -logs["reference"][np.arange(len(apart)), apart]
            places.append(evidence.at_least(-logs["data"][np.arange(len(labels)), labels], labels, unlikely, apart))
            counts.append(np.bincount(apart, minlength=self.classes))
            total += logs["data"]
            self.bar.update()
        total[np.arange(len(total)), labels] = -np.inf
        return _Judged(np.stack(places), np.stack(counts), total.argmax(axis=1).astype(np.int64))

    def _judge(self, known: inputs.Images, own: NDArray[np.bool_], seed: int) -> dict[str, NDArray[Any]]:
        what = "three quarters of the reference"
        network = scoring.trained(self.train, known.pixels[own], known.labels[own], self.classes, seed, what)
        return {
            "data": scoring.log_probabilities(network, self.data.pixels, self.classes),
            "reference": scoring.log_probabilities(network, known.pixels[~own], self.classes),
        }

    def votes(self, purifier: Purifier, rounds: int) -> _Votes:
        """Let a network that learned from the dataset vote on every image and its purified versions."""
        height, width, channels = self.data.pixels.shape[1:]
        if (out := purifier.output_shape((channels, height, width))) != (channels, height, width):
            raise InputError(
                "must bring the images to the size that the purifier makes, for the networks see no other. Got "
                f"{(height, width)}, and {out[1:]} purified: give that size, or a purifier without a resize.",
                argument="size",
            )
        vote = partial(self._vote, purifier, rounds)
        arrays = self.kept.get("votes", vote, purifier=purifier.identity(), rounds=rounds)
        return _Votes(arrays["data"], arrays.get("reference"))

    def _vote(self, purifier: Purifier, rounds: int) -> dict[str, NDArray[Any]]:
        data = self.data
        network = scoring.trained(self.train, data.pixels.copy(), data.labels, self.classes, self.seed, "the dataset")
        self.bar.update()
        votes: dict[str, list[NDArray[np.int64]]] = {}
        pixels = {"data": data.pixels} | ({} if self.known is None else {"reference": self.known.pixels})
        for number in range(rounds + 1):
            for which in pixels:
                if number:
                    place = 2 * number + (which == "reference")
                    pixels[which] = scoring.purified(purifier, pixels[which], self.seed, place)
                called = scoring.log_probabilities(network, pixels[which], self.classes).argmax(axis=1)
                votes.setdefault(which, []).append(called.astype(np.int64))
            self.bar.update(number > 0)
        return {which: np.stack(columns, axis=1) for which, columns in votes.items()}


@dataclass(frozen=True)
class _Found:
    """All that was measured."""

    data: inputs.Images
    known: inputs.Images | None
    classes: int
    judged: _Judged | None
    votes: _Votes | None

    def rows(self) -> list[dict[str, Any]]:
        """The numbers of each class, by kind of evidence."""
        data, known, votes = self.data, self.known, self.votes
        kinds: dict[str, list[dict[str, Any]]] = {}
        if self.judged is not None:
            kinds["reference"] = evidence.reference(self.judged.at_least, data.labels, self.judged.counts)
        if votes is not None:
            if known is not None and votes.reference is not None:
                kinds["outflow"] = evidence.outflow(
                    data.labels, votes.data, known.labels, votes.reference, self.classes
                )
                kinds["inflow"] = evidence.inflow(known.labels, votes.reference, self.classes)
            kinds["published"] = evidence.published(data.labels, votes.data, self.classes)
        counts = np.bincount(data.labels, minlength=self.classes).tolist()
        names = data.names or []
        return [
            {
                "class": label,
                "name": names[label] if label < len(names) else None,
                "images": counts[label],
                **{kind: rows[label] for kind, rows in kinds.items()},
            }
            for label in range(self.classes)
        ]

    def suspects(self, targets: tuple[int, ...], by: str) -> NDArray[np.int64]:
        """Indices of the images under a target's label that are unlikely for it, or that lose it."""
        if by == "reference":
            assert self.judged is not None
            doubtful = self.judged.scores(self.data.labels) > LIKELY
        else:
            assert self.votes is not None
            doubtful = evidence.leaves(self.data.labels, self.votes.data)
        return np.flatnonzero(doubtful & np.isin(self.data.labels, targets))

    def corrected(self, suspects: NDArray[np.int64]) -> dict[int, int]:
        """A better label of each suspect; none where the votes have none."""
        if self.judged is not None:
            labels = self.judged.likeliest
        else:
            assert self.votes is not None
            labels = evidence.majority(self.votes.data[:, 1:], self.votes.data[:, 0])
        return {int(i): int(labels[i]) for i in suspects if labels[i] != self.data.labels[i]}


def _verdict(
    found: _Found, by: str, name: Callable[[int], str | None], label_key: ImageKey, how: dict[str, Any]
) -> Verdict:
    rows, unjudged = found.rows(), inputs.unjudged(found.data, found.known)
    if all(row[by]["z"] is None for row in rows):
        raise InputError(
            "There is no evidence at all, for no image lost its label. Got a purifier that is too weak to tell "
            "anything: take more noise or more rounds, or give a reference."
        )
    limit = evidence.LIMITS[by]
    targets = tuple(
        row["class"] for row in rows if row["class"] not in unjudged and (row[by]["z"] or 0.0) > limit and row["images"]
    )
    suspects = found.suspects(targets, by)
    return Verdict(
        found.data.labels,
        targets,
        suspects,
        found.corrected(suspects),
        rows,
        by,
        unjudged,
        None if found.judged is None else found.judged.scores(found.data.labels),
        None if found.votes is None else found.votes.data,
        source_sha256(found.data.hashes),
        {"method": f"sanitize by {by}", **how},
        {int(index): name(int(index)) for index in suspects},
        label_key,
        found.data.hashes[suspects, 0],
    )


def _how(purifier: Purifier | None, rounds: int, train: Train, seed: int, size: int | None) -> dict[str, Any]:
    return {
        "purifier": None if purifier is None else purifier.config(),
        "rounds": None if purifier is None else rounds,
        "train": training_settings(train),
        "seed": seed,
        "size": size,
    }
