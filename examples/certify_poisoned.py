"""A poisoned run stays inside its certificate: change the training images within the radius, and see the vote hold.

    python examples/certify_poisoned.py --processes 2 --work runs/certify-poisoned

A few hundred images of the CIFAR-10 sample are noised and denoised once for each of many models, whose votes on
test images are certified (Hong, Carlini & Kurakin). Then the training images are changed by a little less than a
certified radius, in directions that somebody who knows everything but the noise might choose, and other models, with
other noise, are trained on what comes of it. Every test image whose radius is larger must be voted for as before.

    random            every value alike
    one image         all of it on one image, towards one of another class
    class means       the images of one class towards the mean of another
    steepest          where the lead of the test image that is nearest to the limit falls fastest: the gradient of
                      ridge regressions, through denoiser and noise
    worst of N        of many of all these kinds, what ridge regressions on plain noised images fear most

The last row of the table is no part of the claim: the steepest direction, several times further than the radius. A
vote that changes there shows that the directions are real ones, and that the radius says something.

Images have 8 bits, and so has what is changed: the norm of 0.3 that an l2 radius may be is one level in 5,852 of the
million values of 400 images. A perturbation is rounded to whole levels, and its norm is what is left of it then.

Votes are kept in `--work`, one file a model: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, norm
from torch import Tensor
from torch.nn import functional as F

from purifyloader import recipes
from purifyloader.certify import (
    ABSTAIN,
    Certificates,
    DenoisedSet,
    Paths,
    Predictor,
    Train,
    Training,
    best_radius,
    certify,
    counts,
    ndt_classify,
    predict,
    reasons_against,
    shared_images,
    voted_accuracy,
)
from purifyloader.datasets.splits import Data, load
from purifyloader.files.atomic import replacing, write_text
from purifyloader.files.hashes import image_hashes
from purifyloader.files.locks import Lock
from purifyloader.purifiers import DenoiseOnce

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Direction = NDArray[np.float32]

JUST_WITHIN = 0.99  # of a radius
POOL = 4  # ridge regression sees images averaged over squares of so many pixels


# -- what is done to the training images ---------------------------------------------------------------


def within(images: Images, direction: Direction, limit: float, seed: int = 0) -> tuple[Images, float]:
    """Images moved in a direction as far as whole levels allow, by less than `limit`, and by how much.

    Of all changes in whole levels that are no longer, what rounding a multiple of the direction gives is the one that
    goes furthest in it. Values at their end of the scale stay.

    Args:
        images: uint8 (N, H, W, C).
        direction: of their shape, of any length.
        limit: l2 norm over all images, in units of [0, 1] images.
        seed: of the order in which values that the direction moves alike are taken.

    Returns:
        the images, and the l2 norm of the change, in the units of `limit`.
    """
    values, slopes = images.ravel().astype(np.int64), direction.ravel().astype(np.float64)
    slopes = np.where((slopes > 0) & (values == 255) | (slopes < 0) & (values == 0), 0, slopes)
    # equal slopes would all be rounded up at once, and leave much of the limit unused
    slopes *= np.random.default_rng(seed).uniform(0.99, 1.01, len(slopes)) / (np.abs(slopes).max() or 1.0)
    most = min(len(slopes), math.ceil((255 * limit) ** 2))  # each takes a level at least, so no others are changed
    first = np.argpartition(-np.abs(slopes), most - 1)[:most]
    values, slopes = values[first], slopes[first]

    def moved(scale: float) -> NDArray[np.int64]:
        return np.clip(values + np.rint(scale * slopes), 0, 255).astype(np.int64) - values

    def length(levels: NDArray[np.int64]) -> float:
        return math.sqrt(int((levels**2).sum())) / 255

    near, far = 0.0, 1.0
    while length(moved(far)) < limit and far < 1e6:  # where all of them saturate, it ends
        near, far = far, 2 * far
    for _ in range(30):
        middle = (near + far) / 2
        near, far = (middle, far) if length(moved(middle)) < limit else (near, middle)
    out = images.flatten()
    out[first] = values + moved(near)
    return out.reshape(images.shape), length(moved(near))


def random_direction(images: Images, rng: np.random.Generator) -> Direction:
    return rng.standard_normal(images.shape, dtype=np.float32)


def one_image(images: Images, labels: Labels, rng: np.random.Generator) -> Direction:
    """One image towards one of another class, and nothing else."""
    moved = int(rng.integers(len(images)))
    other = int(rng.choice(np.flatnonzero(labels != labels[moved])))
    direction = np.zeros(images.shape, np.float32)
    direction[moved] = images[other].astype(np.float32) - images[moved]
    return direction


def class_means(images: Images, labels: Labels, source: int, target: int) -> Direction:
    """All images of a class by the difference of its mean and another's."""
    direction = np.zeros(images.shape, np.float32)
    direction[labels == source] = images[labels == target].mean(0) - images[labels == source].mean(0)
    return direction


# -- training ------------------------------------------------------------------------------------------


def pooled(x_NCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_NCHW, POOL)


def as_floats(images: Images) -> Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


def ridge_logits(x_NCHW: Tensor, labels: Labels, tests_TCHW: Tensor, classes: int, penalty: float) -> Tensor:
    """Ridge regression of the classes on averaged pixels, mirrored images too, in closed form: logits (T, K)."""
    a = torch.cat([x_NCHW, x_NCHW.flip(3)]).flatten(1)
    y = F.one_hot(torch.from_numpy(labels), classes).to(a.dtype).repeat(2, 1)
    mean_x, mean_y = a.mean(0), y.mean(0)
    a = a - mean_x
    weights = torch.linalg.solve(a.T @ a + penalty * len(a) * torch.eye(a.shape[1], dtype=a.dtype), a.T @ (y - mean_y))
    return (tests_TCHW.flatten(1) - mean_x) @ weights + mean_y


@dataclass(frozen=True)
class Ridge:
    """A training of a hundredth of a second; with its penalty most test images of the sample are certified."""

    penalty: float = 0.03

    def __call__(self, dataset: DenoisedSet, seed: int) -> Predictor:
        x, labels = pooled(as_floats(dataset.data)), np.asarray(dataset.targets)
        return lambda tests: ridge_logits(x, labels, pooled(tests), dataset.classes, self.penalty)

    def settings(self) -> dict[str, Any]:
        return {"ridge": self.penalty, "pool": POOL}


TRAININGS: dict[str, Callable[[], Train]] = {"ridge": Ridge, "network": lambda: Training(width=8)}


# -- directions that somebody would choose -------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A test image, the class that its vote must lose, and the one that should get it."""

    test: int
    wins: int
    other: int


class Proxy:
    """Ridge regressions on plain noised images: what a candidate does, in a thousandth of the time.

    Noise on averaged pixels is noise of sigma / POOL, so no image is noised in full. Every candidate gets the same.
    """

    def __init__(self, data: Data, sigma: float, draws: int, seed: int) -> None:
        self.data, self.penalty = data, Ridge().penalty
        self.tests = pooled(as_floats(data.test))
        shape = pooled(as_floats(data.train[:1])).shape[1:]
        generator = torch.Generator().manual_seed(seed)
        self.noise = sigma / POOL * torch.randn(draws, len(data.train), *shape, generator=generator)

    def _logits(self, x_NCHW: Tensor) -> Tensor:
        classes, labels = self.data.classes, self.data.train_labels
        every = [ridge_logits(x_NCHW + z, labels, self.tests, classes, self.penalty) for z in self.noise]
        return torch.stack(every)

    def logits(self, images: Images) -> NDArray[np.float32]:
        """Of every draw, (draws, T, K)."""
        return self._logits(pooled(as_floats(images))).numpy()

    def worst_lead(self, images: Images, certificates: Certificates, covered: NDArray[np.bool_]) -> float:
        """The smallest lead of a covered test image over any other class, in standard deviations over the draws."""
        logits, rows = self.logits(images)[:, covered], np.arange(int(covered.sum()))
        predictions = certificates.predictions[covered]
        leads = logits[:, rows, predictions][:, :, None] - logits
        share = leads.mean(0) / np.maximum(leads.std(0), 1e-9)
        share[rows, predictions] = np.inf
        return float(share.min())

    def steepest(self, target: Target) -> Direction:
        """In which direction of the training images the target's lead falls fastest, over all draws."""
        x = pooled(as_floats(self.data.train)).requires_grad_()
        logits = self._logits(x)[:, target.test]
        (slope,) = torch.autograd.grad((logits[:, target.wins] - logits[:, target.other]).mean(), x)
        whole = F.interpolate(-slope, scale_factor=POOL, mode="nearest")
        return whole.permute(0, 2, 3, 1).numpy()


def steepest(data: Data, purifier: DenoiseOnce, target: Target, draws: int, seed: int) -> Direction:
    """The same through the denoiser: ridge regression as it is really done, but for the 8 bits of what it is given."""
    x, tests = as_floats(data.train), pooled(as_floats(data.test[target.test : target.test + 1]))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(x)

    def denoised(part: Tensor) -> Tensor:
        return purifier.denoiser(part, torch.full((len(part),), purifier.sigma, dtype=torch.float64))

    for _ in range(draws):
        noised = (x + purifier.sigma * torch.randn(x.shape, generator=generator)).split(purifier.compute_batch)
        with torch.no_grad():
            seen = torch.cat([denoised(part) for part in noised])
        seen.requires_grad_()
        logits = ridge_logits(pooled(seen.clamp(0, 1)), data.train_labels, tests, data.classes, Ridge().penalty)[0]
        (slope,) = torch.autograd.grad(logits[target.wins] - logits[target.other], seen)
        slopes = slope.split(purifier.compute_batch)
        for part, its, into in zip(noised, slopes, total.split(purifier.compute_batch), strict=True):
            part.requires_grad_()  # a batch at a time, for the network's memory
            into -= torch.autograd.grad(denoised(part), part, its)[0]
    return total.permute(0, 2, 3, 1).numpy()


def targets(certificates: Certificates, estimation: NDArray[np.int64], logits: NDArray[np.float32]) -> list[Target]:
    """All certified test images, the smallest radius first, each with the class that is most likely to replace it."""
    found = []
    for test in np.argsort(certificates.radii, kind="stable"):
        wins = int(certificates.predictions[test])
        if certificates.radii[test] > 0:
            votes = estimation[test].astype(float)
            # where all models agree, whatever the proxy has next
            votes += 1 / (1 + np.exp(-logits[:, test].mean(0)))
            votes[wins] = -np.inf
            found.append(Target(int(test), wins, int(votes.argmax())))
    return found


def candidates(data: Data, proxy: Proxy, wanted: Sequence[Target], rng: np.random.Generator) -> Iterator[Direction]:
    """Directions of all kinds, without end."""
    while True:
        target = wanted[int(rng.integers(len(wanted)))]
        yield proxy.steepest(target)
        yield class_means(data.train, data.train_labels, target.wins, target.other)
        yield one_image(data.train, data.train_labels, rng)
        yield random_direction(data.train, rng)


def kept(path: Path, make: Callable[[], Images]) -> Images:
    """Images that the first process to ask makes, and all others read: votes on others would be refused."""
    with Lock(path.parent, path.name):
        if not path.exists():
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, make())
    made: Images = np.load(path)
    return made


# -- the run -------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; in several processes at once, each does a share of the models, and all return the same."""
    torch.set_num_threads(1)
    data = present(load("sample", options.root).some(options.train, options.test, options.seed))
    purifier = recipes.denoise_once(options.model, options.sigma, fast=True)
    assert isinstance(purifier, DenoiseOnce)
    train = TRAININGS[options.training]()
    check(options, data)
    options.work.mkdir(parents=True, exist_ok=True)

    chosen = chosen_options(options)

    def vote(images: Images, models: int, name: str) -> NDArray[np.int64]:
        # a folder of its own, and with it noise of its own, which nobody knew when the images were changed
        folder = options.work / name
        given = images, data.train_labels
        return ndt_classify(
            given, data.test, purifier, train, models, folder, classes=data.classes, settings={"options": chosen}
        )

    votes = vote(data.train, options.selection + options.models, "clean")
    selection, estimation = (counts(v, data.classes) for v in np.split(votes, [options.selection]))
    certificates = certify(selection, estimation, options.sigma, options.alpha)
    certified = certificates.radii[certificates.certified]
    found: dict[str, Any] = {
        "settings": chosen,
        "test_images": len(data.test),
        "vote_accuracy": round(100 * voted_accuracy(certificates, data.test_labels), 2),
        "certified": len(certified),
        "best_radius": best_radius(options.sigma, options.models, options.alpha),
        "median_radius": float(np.median(certified)) if len(certified) else None,
        "rows": [],
    }
    if not len(certified):
        return found
    proxy = Proxy(data, options.sigma, options.proxy_draws, options.seed)
    every = targets(certificates, estimation, proxy.logits(data.train))
    # radii that test images have, of which several agree where all models do
    reached = np.quantile(np.unique(certified), sorted(options.quantiles), method="higher")
    for number, radius in enumerate(np.unique(reached).tolist()):
        limit = JUST_WITHIN * radius
        covered = certificates.radii > limit
        wanted = [target for target in every if covered[target.test]]
        for name, images in perturbations(data, purifier, proxy, wanted, certificates, limit, options):
            folder = f"{number}-{name.replace(' ', '-')}"
            poisoned = kept(options.work / f"{folder}.npy", images)
            again = counts(vote(poisoned, options.again, folder), data.classes)
            found["rows"].append(row(name, data.train, poisoned, certificates, again))
    if options.beyond:
        far = options.beyond * float(certified.max())

        def beyond() -> Images:
            return within(data.train, steepest(data, purifier, wanted[0], options.slopes, options.seed), far)[0]

        poisoned = kept(options.work / "beyond.npy", beyond)
        again = counts(vote(poisoned, options.again, "beyond"), data.classes)
        name = f"steepest, {options.beyond:g} times as far"
        found["rows"].append(row(name, data.train, poisoned, certificates, again, wanted))
    return found


def chosen_options(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides what is found: a folder of votes is not gone on with by others."""
    return {name: value for name, value in vars(options).items() if name not in ("root", "processes", "work", "out")}


def present(data: Data) -> Data:
    """A few images may lack a class, which then nobody can be moved to: the others, numbered anew."""
    there = np.unique(data.train_labels)
    kept_tests = np.isin(data.test_labels, there)
    return Data(
        data.name,
        data.train,
        np.searchsorted(there, data.train_labels),
        data.test[kept_tests],
        np.searchsorted(there, data.test_labels[kept_tests]),
        max(2, len(there)),
    )


def check(options: argparse.Namespace, data: Data) -> None:
    """Stop where there is no certificate to be had."""
    shared = shared_images(options.model, image_hashes(data.train)) > 0
    paths = Paths(1, secret_noise=True, selected=False, warm_start=False, own_denoiser=shared, triggered=False)
    if reasons := reasons_against(paths, options.models, options.alpha):
        raise SystemExit("\n".join(reasons))


def perturbations(
    data: Data,
    purifier: DenoiseOnce,
    proxy: Proxy,
    wanted: Sequence[Target],
    certificates: Certificates,
    limit: float,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], Images]]]:
    """What is done to the training images for one limit, by name; made when asked for."""
    images, labels, first = data.train, data.train_labels, wanted[0]
    covered = certificates.radii > limit

    def rng(number: int) -> np.random.Generator:  # one each, as another process may have made some of them
        return np.random.default_rng([options.seed, number])

    def worst() -> Images:
        kinds = candidates(data, proxy, wanted, rng(2))
        made = (within(images, next(kinds), limit)[0] for _ in range(options.candidates))
        return min(made, key=lambda candidate: proxy.worst_lead(candidate, certificates, covered))

    yield "random", lambda: within(images, random_direction(images, rng(0)), limit)[0]
    yield "one image", lambda: within(images, one_image(images, labels, rng(1)), limit)[0]
    yield "class means", lambda: within(images, class_means(images, labels, first.wins, first.other), limit)[0]
    yield (
        "steepest",
        lambda: within(images, steepest(data, purifier, first, options.slopes, options.seed), limit)[0],
    )
    yield f"worst of {options.candidates}", worst


def row(
    name: str,
    images: Images,
    poisoned: Images,
    certificates: Certificates,
    again: NDArray[np.int64],
    instead: Sequence[Target] | None = None,
) -> dict[str, Any]:
    """What the votes of fresh models say of the test images that must hold.

    Args:
        again: their votes, counts (T, K).
        instead: look at these test images, where none must hold.

    Returns:
        norm: of what was really changed; values, images: how many; most: the largest change, in levels.
        covered: test images whose radius is larger.
        held: for how many of them most models vote as before.
        against: for how many another class is significantly ahead, over all of them at alpha: none, if the
            certificate is true.
        below: how many have significantly fewer votes than the certificate promises at this norm, over all of them
            at alpha: none, too.
        smallest_share: of the votes for the certified class; promised: at least, for that with the least promised.
    """
    change = poisoned.astype(np.int64) - images
    size = math.sqrt(int((change**2).sum())) / 255
    if instead is None:
        looked_at = np.flatnonzero(certificates.radii > size)
    else:
        looked_at = np.array([target.test for target in instead])
    predictions, votes = certificates.predictions[looked_at], again[looked_at]
    models, agreeing = int(votes[0].sum()), votes[np.arange(len(looked_at)), predictions]
    # every half-space through p_A keeps so much, and no other vote can fall faster (Neyman and Pearson)
    promised = norm.cdf(norm.ppf(certificates.lower_bounds[looked_at]) - size / certificates.sigma)
    said = predict(votes, certificates.alpha / len(looked_at))
    return {
        "name": name,
        "norm": size,
        "values": int((change != 0).sum()),
        "images": int((change != 0).any(axis=(1, 2, 3)).sum()),
        "most": int(np.abs(change).max()),
        "must_hold": instead is None,
        "covered": len(looked_at),
        "held": int((votes.argmax(1) == predictions).sum()),
        "against": int(((said != predictions) & (said != ABSTAIN)).sum()),
        "below": int((binom.cdf(agreeing, models, promised) <= certificates.alpha / len(looked_at)).sum()),
        "smallest_share": float(agreeing.min() / models),
        "promised": float(promised.min()),
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| training images moved | by l2 | values | images | must hold | hold | another class ahead "
        "| smallest share of votes | promised |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for its in found["rows"]:
        must, promised = ("–", "–") if not its["must_hold"] else (str(its["covered"]), f"{its['promised']:.3f}")
        lines.append(
            f"| {its['name']} | {its['norm']:.4f} | {its['values']:,} | {its['images']:,} | {must} | {its['held']} of "
            f"{its['covered']} | {its['against']} | {its['smallest_share']:.2f} | {promised} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        context = multiprocessing.get_context("spawn")
        others = [context.Process(target=measure, args=(options,)) for _ in range(options.processes - 1)]
        for process in others:
            process.start()
        try:
            found = measure(options)  # and what one that has died leaves
        finally:
            for process in others:
                process.join()
    best, median = found["best_radius"], found["median_radius"] or 0
    print(
        f"{found['certified']} of {found['test_images']} test images are certified, at most for {best:.3f}, half of "
        f"them for {median:.3f} or more; the vote is right on {found['vote_accuracy']} %"
    )
    print(table(found))
    if options.out:
        write_text(options.out, json.dumps(found, indent=1) + "\n")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, default=here / "data", help="of the sample")
    add("--train", type=int, default=400, help="training images")
    add("--test", type=int, default=200, help="test images")
    add("--model", default="cifar10-sparse-wide")
    add("--sigma", type=float, default=0.25)
    add("--training", choices=tuple(TRAININGS), default="ridge")
    add("--selection", type=int, default=10, help="models that select the class")
    add("--models", type=int, default=100, help="models that the radius is computed from")
    add("--alpha", type=float, default=0.001, help="how often the certificate of a test image may be false")
    add("--again", type=int, default=40, help="fresh models for each perturbation")
    add(
        "--quantiles",
        type=float,
        nargs="+",
        default=[0.5, 1.0],
        help="of the different radii there are: how far images are moved",
    )
    add("--candidates", type=int, default=120, help="of which the worst is taken")
    add("--proxy-draws", type=int, default=16, help="draws of noise that candidates are judged by")
    add("--slopes", type=int, default=4, help="draws of noise that the steepest direction is averaged over")
    add("--beyond", type=float, default=8.0, help="times the largest radius, for the last row; 0 leaves it out")
    add("--seed", type=int, default=0, help="of images and directions; that of the noise is nobody's to choose")
    add("--processes", type=int, default=1)
    add("--work", type=Path, help="where votes are kept (default: nowhere)")
    add("--out", type=Path, help="JSON of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
