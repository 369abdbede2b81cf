"""NDTClassify: train models on noised and denoised training sets, and ask each about the test inputs.

Certified Robustness to Clean-Label Poisoning Using Diffusion Denoising (Hong, Carlini & Kurakin), Algorithm 1. Model k
sees the training set D once: with one draw of N(0, sigma^2 I), denoised, rounded to the 8 bits in which images are
kept. That and everything that training does with it is post-processing of the noised set. Nothing else of D may reach
the model, which `purifyloader.certify.guards` is about.

Noise and the seeds of training come from one secret seed: the noise of image i in draw j of model k, and the seed of
model k's training. So the models are independent and alike, which is what their votes are counted for.

What a computer draws is N(0, sigma^2) but nearly. Ours are float32 of a 64-bit key, and none is beyond 6.77 sigma: of
the 150 million values of CIFAR-10 one would be with a probability of 0.002, which p_A may be off by beside alpha.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from purifyloader.certify.functions import DenoisedSet, Train, training_settings
from purifyloader.certify.noising import noised
from purifyloader.certify.votes import MOST_CLASSES, VoteFolder, new_seed
from purifyloader.core import noise
from purifyloader.core.checks import check_integer
from purifyloader.core.devices import device_of
from purifyloader.core.images import quantize
from purifyloader.datasets.arrays import as_arrays
from purifyloader.datasets.sources import random_state_kept
from purifyloader.errors import InputError
from purifyloader.files.hashes import image_hashes
from purifyloader.purifiers import Purifier
from purifyloader.results.claims import make_missing
from purifyloader.results.rows import fingerprint

__all__ = ["Voting", "fill", "ndt_classify", "voting_settings"]

_NOISE, _TRAINING = 0x6E6F6973, 0x74726E67  # "nois", "trng": purposes of the keys drawn here
_AT_ONCE = 256  # images that are purified or asked about together; decides no pixel
_SEED_MASK = 2**31 - 1  # what every library takes for a seed


@dataclass(frozen=True, eq=False)
class Voting:
    """Data, purifier and training that all models of one condition have in common."""

    images: NDArray[np.uint8]  # the training set, (N, H, W, C), un-noised
    labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]  # (T, H, W, C), as they are
    purifier: Purifier  # that noises first; it is not checked here that it does
    train: Train
    classes: int
    draws: int = 1  # of each image in one model's training set, one set of draws after another

    def __post_init__(self) -> None:
        shape = (self.images.shape[3], *self.images.shape[1:3])
        if (made := self.purifier.output_shape(shape)) != shape:
            raise InputError(
                f"Expected a purifier that leaves images at their size, for models are asked about test images of "
                f"{shape[1]} x {shape[2]}. Got one that makes {made[1]} x {made[2]} of them: resize both sets first."
            )

    def noised(self, model: int, seed: int) -> DenoisedSet:
        """Noise and purify the training set of a model."""
        return next(self.noised_sets([model], seed))

    def noised_sets(self, models: Sequence[int], seed: int) -> Iterator[DenoisedSet]:
        """Do `noised` for each model; small sets are purified together, as a batch costs much the same as an image."""
        size = len(self.images) * self.draws
        together = max(1, _AT_ONCE // size)
        for first in range(0, len(models), together):
            part = torch.tensor(models[first : first + together])
            keys_MD = noise.fold_in(noise.fold_in(_root(seed, _NOISE), part)[:, None], torch.arange(self.draws))
            purified = self._purified(keys_MD.flatten())
            for start in range(0, len(purified), size):
                yield DenoisedSet(purified[start : start + size], self.labels.tolist() * self.draws, self.classes)

    def _purified(self, keys_R: Tensor) -> NDArray[np.uint8]:
        """Purify all images once for each key, one set after another."""
        out, device, count = [], device_of(self.purifier), len(self.images)
        for rows in torch.arange(len(keys_R) * count).split(_AT_ONCE):
            x_BCHW = _as_batch(self.images[(rows % count).numpy()], device)
            keys_B = noise.fold_in(keys_R[rows // count], rows % count).to(x_BCHW.device)
            out.append(quantize(self.purifier(x_BCHW, keys_B)).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(out)

    def training_seed(self, model: int, seed: int) -> int:
        """Derive the seed of a model's training, from 0 to 2^31 - 1."""
        return int(noise.fold_in(_root(seed, _TRAINING), model)) & _SEED_MASK

    def vote(self, model: int, seed: int) -> NDArray[np.int64]:
        """Train model number `model` by the secret `seed` of all, and ask it about each test input: classes (T,)."""
        return self.train_and_ask(self.noised(model, seed), model, seed)

    def train_and_ask(self, dataset: DenoisedSet, model: int, seed: int) -> NDArray[np.int64]:
        """Do the rest of `vote`, for the training set that `noised` has made."""
        training_seed = self.training_seed(model, seed)
        with random_state_kept():  # a training function seeds what it likes
            # what one that seeds nothing draws, such as a loader's order, follows from the secret, too
            random.seed(training_seed)
            np.random.seed(training_seed)
            _seed_torch(training_seed)
            predictor = self.train(dataset, training_seed)
            if not callable(predictor):
                raise InputError(
                    "Expected a predictor of the training function, which gives class numbers or logits for images. "
                    f"Got {type(predictor).__name__}: return the trained network."
                )
            device = None
            if isinstance(predictor, nn.Module):
                predictor.eval()
                device = device_of(predictor)
            with torch.no_grad():
                votes = [_classes_of(predictor(x), len(x), self.classes) for _, x in _batches(self.test_images, device)]
        return np.concatenate(votes)


def _seed_torch(seed: int) -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, without a note of the call stack for each kind of device that may come up later
        torch.default_generator.manual_seed(seed)


@functools.lru_cache(maxsize=8)
def _root(seed: int, purpose: int) -> Tensor:
    """Return the key of all models for a purpose, which costs as much as the key of one."""
    return noise.fold_in(noise.key_from_seed(seed), purpose)


def _batches(images: NDArray[np.uint8], device: torch.device | None) -> Iterator[tuple[int, Tensor]]:
    """Yield float32 (B, C, H, W) in [0, 1] of images (N, H, W, C), each with the position of its first."""
    for start in range(0, len(images), _AT_ONCE):
        yield start, _as_batch(images[start : start + _AT_ONCE], device)


def _as_batch(images: NDArray[np.uint8], device: torch.device | None) -> Tensor:
    return torch.from_numpy(np.array(images)).to(device or "cpu").permute(0, 3, 1, 2).float() / 255


def _classes_of(answer: Any, count: int, classes: int) -> NDArray[np.int64]:
    try:
        if isinstance(answer, Tensor):
            # numpy knows no bfloat16
            answer = (answer.float() if answer.is_floating_point() else answer).detach().cpu().numpy()
        array = np.asarray(answer)
    except (TypeError, ValueError, RuntimeError):  # a tuple or a list of several things
        array = np.empty((), object)
    if array.shape == (count, classes) and array.dtype.kind == "f" and np.isfinite(array).all():
        return array.argmax(axis=1).astype(np.int64)
    if array.shape == (count,) and array.dtype.kind in "iu" and array.min() >= 0 and array.max() < classes:
        return array.astype(np.int64)
    values = f" from {array.min()} to {array.max()}" if array.dtype.kind in "iuf" and array.size else ""
    raise InputError(
        f"Expected of a predictor, for {count} images, class numbers from 0 to {classes - 1}, integers ({count},), or "
        f"finite logits ({count}, {classes}). Got {array.dtype} {array.shape}{values}."
    )


def fill(
    cells: Iterable[tuple[VoteFolder, Voting, int]], seen: Callable[[VoteFolder, int], object] | None = None
) -> None:
    """Make the votes that are missing; returns when all are there, made here or by another process.

    Args:
        cells: (folder, its voting, a model's number), in the order in which they are made.
        seen: called with the folder and number of each model that was made here.
    """

    def make(cell: tuple[VoteFolder, Voting, int]) -> None:
        folder, voting, model = cell
        folder.write(model, voting.vote(model, folder.seed))
        if seen is not None:
            seen(folder, model)

    make_missing(cells, is_done=lambda cell: cell[0].has(cell[2]), lock=lambda cell: cell[0].lock(cell[2]), make=make)


def ndt_classify(
    data: Any,
    test_images: NDArray[np.uint8],
    purifier: Purifier,
    train: Train,
    models: int,
    folder: str | Path | None = None,
    *,
    classes: int | None = None,
    draws: int = 1,
    settings: Mapping[str, Any] | None = None,
    empirical: bool = False,
) -> NDArray[np.int64]:
    """Train `models` models, each on its own noised and denoised training set, and ask them (Algorithm 1).

    Split the votes by model for `certify`: some rows select, all others estimate. Votes alone do not show whether there
    is a certificate to be had; ask `reasons_against` first.

    Args:
        data: the training set: a map-style dataset of (image, class), or (images uint8 (N, H, W, C), labels).
        test_images: uint8 (T, H, W, C).
        train: see `Train`. It must look at nothing else that was made from `data`.
        folder: where votes are kept, one file a model: the same call goes on after a stop, and any number of processes
            may make it at once. None keeps them in memory.
        classes: K; one more than the highest label by default.
        draws: fixed draws of each image that a model sees; certify with `fixed_draws(sigma, draws)`.
        settings: JSON of what else decides the votes, such as what `train` reads: a folder takes votes of one alone.
            Data, purifier and the function's own file are looked at in any case; versions are not.
        empirical: take a purifier that does not noise first, whose votes no radius may be computed from.

    Returns:
        int64 (models, T): the class that each model says of each test input.

    >>> import numpy as np
    >>> from purifyloader.certify import ndt_classify
    >>> from purifyloader.purifiers import Compensation
    >>> images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    >>> def train(dataset, seed):  # your own training; this one always answers class 1
    ...     return lambda x: np.ones(len(x), int)
    >>> votes = ndt_classify((images, labels), images[:2], Compensation(p=0.0, sigma=0.25), train, models=3)
    >>> votes.tolist()
    [[1, 1], [1, 1], [1, 1]]
    """
    images, labels = as_arrays(data)
    tests = np.asarray(test_images)
    if tests.dtype != np.uint8 or tests.ndim != 4 or not len(tests) or tests.shape[1:] != images.shape[1:]:
        raise InputError(
            f"Expected test images uint8 (T, {', '.join(map(str, images.shape[1:]))}), as the training images. Got "
            f"{tests.dtype} {tests.shape}."
        )
    if not isinstance(purifier, Purifier):
        raise InputError(f"Expected a purifier, such as `recipes.denoise_once(...)`. Got {type(purifier).__name__}.")
    check_integer("models", models, 1, error=InputError)
    check_integer("draws", draws, 1, error=InputError)
    if (why := noised(purifier).reasons) and not empirical:
        raise InputError(f"{why[0]} Or say empirical=True: then there are votes, and no certificate.")
    fewest = max(2, int(labels.max()) + 1)
    classes = fewest if classes is None else classes
    if type(classes) is not int or not fewest <= classes <= MOST_CLASSES:
        raise InputError(f"Expected from {fewest} to {MOST_CLASSES:,} classes, as labels say. Got {classes!r}.")
    voting = Voting(images, labels, tests, purifier, train, classes, draws)
    if folder is None:
        seed = new_seed()
        sets = voting.noised_sets(range(models), seed)
        return np.stack([voting.train_and_ask(dataset, model, seed) for model, dataset in enumerate(sets)])
    own = voting_settings(voting)
    if clash := sorted({*own, "models", "inputs", "classes", "schema"} & {*(settings or {})}):
        raise InputError(f"Expected settings beside those that are looked at in any case. Got {clash[0]!r} again.")
    votes = VoteFolder(folder, {**own, **(settings or {})}, models=models, inputs=len(tests), classes=classes)
    fill((votes, voting, model) for model in range(models))
    votes.tidy()
    return votes.all()


def voting_settings(voting: Voting) -> dict[str, Any]:
    """Collect what decides the votes beside the secret, as JSON."""
    data = {
        "hashes": image_hashes(voting.images).tolist(),
        "labels": voting.labels.tolist(),
        "test_hashes": image_hashes(voting.test_images).tolist(),
    }
    return {
        "data": fingerprint(data),
        "purifier": voting.purifier.identity(),
        "training": training_settings(voting.train),
        "draws": voting.draws,
        "device": (device_of(voting.purifier) or torch.device("cpu")).type,
    }
