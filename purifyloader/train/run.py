"""Train any kind of model: resume, save, watch, stop, and share each step of a `Task` among processes.

Everything random is a function of (seed, step, position in the batch), so a run that was stopped goes on with the step
it would have taken, to the same weights (bit for bit with the same number of threads), and several processes share the
very batches that one would take (the same weights up to the order of a sum).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from purifyloader.core.checks import as_path, check_number
from purifyloader.diffusion.psnr import check_images
from purifyloader.errors import CheckpointError, InputError, PurifyError, TrainingError
from purifyloader.pretrained.checkpoint import misfits
from purifyloader.train.curves import CURVES_CSV, Curves
from purifyloader.train.fields import TrainingFields
from purifyloader.train.ranks import Ranks
from purifyloader.train.state import STATE_FILE, Groups, check_header, identity, load_state, save_state, writing
from purifyloader.train.watch import Watch
from purifyloader.train.weights import Weights

__all__ = ["Task", "peak_memory", "seeded", "train"]

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)

_SAVING_SHARE = 0.05  # of the time, at most, goes into writing states
_LOGGED = 500  # rows of curves.csv, at most, beside those of validation


class Task(ABC, Generic[Network]):
    """One kind of training, for images of one dataset, uint8 (N, C, H, W): see the README of this folder.

    Attributes:
        warnings: sentences for the card.
        validate_every: steps between two calls of `validate`; None for no call.
        clip_norm: the largest norm of a gradient that is not scaled down.
        shown: the measured value that the progress bar shows and `on_step` is given.
        advice: a remedy for a run that has broken.
    """

    config: TrainingFields
    weights: Weights[Network]
    watch: Watch
    curves: Curves
    validate_every: int | None = None
    clip_norm: float
    shown: ClassVar[str] = "loss"
    advice: ClassVar[str] = "Lower the learning rate, or use float32"

    def __init__(self, images: Tensor, device: torch.device, held_out: Tensor | None) -> None:
        check_images(images, "Training takes")
        if held_out is not None:
            check_images(held_out, "Validation takes")
            if held_out.shape[1] != images.shape[1]:
                raise InputError(
                    f"Validation takes images with the channels of those trained on, {images.shape[1]}. "
                    f"Got {held_out.shape[1]}."
                )
        self.ranks = Ranks.here()
        self.images, self.device = images.to(device), device
        self.warnings: list[str] = []

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""

    @abstractmethod
    def gradients(self, step: int, own: slice) -> dict[str, float]:
        """Add to the gradients those of the positions `own` of the step's batch; return the values measured on them.

        It must change nothing else that a state holds, and not communicate with other processes. A `PurifyError` is a
        run that is broken, in this process at least: all of them stop.
        """

    @abstractmethod
    def row(self, measured: dict[str, float], norm: float) -> dict[str, float]:
        """Return the columns of curves.csv after an update, beside step, seconds and learning rate.

        A `PurifyError` is a run that is broken, in all processes alike.
        """

    def update(self, rate: float) -> None:
        """Take the step with the gradients there are. Here processes may communicate."""
        self.weights.update(rate)

    def validate(self, folder: Path, last: bool) -> None:
        """Measure the average so far, in the first process alone: add a row to the curves, write pictures to `folder`.

        A `PurifyError` says at the end (`last`) that the model is broken.
        """

    def groups(self) -> Groups:
        """Return the tensors of a state."""
        return self.weights.groups()

    def restore(self, step: int, groups: Groups) -> None:
        """Take over what `groups` returned after `step` steps."""
        self.weights.restore(step, groups)

    def draw(self, folder: Path) -> None:
        """Write pictures, each time that a state is saved."""

    def record(self) -> dict[str, Any]:
        """Return values for the checkpoint's card, beside length and cost of the run."""
        return {}


def train(
    task: Task[Network],
    out: str | os.PathLike[str],
    *,
    save_every: float = 60.0,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> tuple[Network, dict[str, Any]]:
    """Take the steps of a task, from the state in the folder `out` where there is one; see `train_denoiser`."""
    if save_every != float("inf"):
        check_number("save_every", save_every, low=0, unit="in seconds", error=InputError)
    return _Run(task, as_path(out), save_every, on_step, progress).finish()


class _Run(Generic[Network]):
    def __init__(
        self,
        task: Task[Network],
        folder: Path,
        save_every: float,
        on_step: Callable[[int, float], None] | None,
        progress: bool,
    ) -> None:
        self.task, self.weights = task, task.weights
        self.steps = task.config.steps
        self.own = task.ranks.own(task.config.batch_size)
        self.first = task.ranks.rank == 0
        self.folder, self.path = folder, folder / STATE_FILE
        self.identity = identity(task.config, task.images.cpu())
        parts = {"configuration": self.identity["config"], "set or order of images": self.identity["images_sha256"]}
        task.ranks.check_same({**parts, "length": task.config.length()}, task.device)
        self.seconds = 0.0
        if self.path.exists():
            self._resume()
        # of the steps that are done, while one is being taken: a resumed run takes that one again
        self.settled = task.watch.header()
        self.between = True  # the weights are those of whole steps
        self.unsaved_reported = False
        self.save_every, self.on_step = save_every, on_step
        self.begun = self.last = self.saved = time.monotonic()
        self.saving = 0.0
        hidden = not progress or not self.first
        self.bar = tqdm(total=self.steps, initial=self.weights.step, disable=hidden, unit="step", desc="training")

    def finish(self) -> tuple[Network, dict[str, Any]]:
        task, weights = self.task, self.weights
        try:
            while weights.step < self.steps:
                self._take_step(weights.step)
        except KeyboardInterrupt:
            if self.first and self.between and self.last > self.begun:
                self._save_if_sound()
            raise
        finally:
            self.bar.close()
        self._validate(last=True)
        if self.first and (self.last > self.begun or not self.path.exists()):
            self._save()
        record = {
            "steps": weights.step,
            "seconds": round(self.seconds, 1),
            "epochs": round(weights.step * task.config.batch_size / len(task.images), 1),
            "processes": task.ranks.world_size,
            "peak_memory": peak_memory(task.device),
            "warnings": task.warnings,
        }
        return weights.average, record | task.record()

    def _take_step(self, step: int) -> None:
        task = self.task
        if step and task.validate_every is not None and step % task.validate_every == 0:
            self._validate(last=False)
        self.weights.optimizer.zero_grad(set_to_none=True)
        measured, norm = self._gradients(step)
        if (reason := task.watch.see(step, measured, norm)) is not None:
            raise self._stopped(reason, step + 1)
        now = time.monotonic()
        self.seconds, self.last = self.seconds + now - self.last, now
        # these finite values are of the weights that are saved, so that a state is never a broken one
        due = step > 0 and now - self.saved >= max(self.save_every, self.saving / _SAVING_SHARE)
        if self.first and due and self._save_if_sound():
            self.saved = time.monotonic()
            self.saving = self.saved - now
        rate = task.learning_rate(step)
        self.between = False
        task.update(rate)
        self.between, self.settled = True, task.watch.header()
        if self.weights.step % max(1, self.steps // _LOGGED) == 0 or self.weights.step == self.steps:
            self._add_row(measured, norm, rate)
        value = measured[task.shown]
        if self.on_step is not None:
            self.on_step(self.weights.step, value)
        self.bar.update()
        self.bar.set_postfix({task.shown: f"{task.watch.values[task.shown]:.4g}"}, refresh=False)

    def _gradients(self, step: int) -> tuple[dict[str, float], float]:
        """Return the values that a step has measured, and the norm of its gradient: the same in all processes."""
        task, failure, measured = self.task, "", dict[str, float]()
        try:
            measured = task.gradients(step, self.own)
        except PurifyError as error:
            failure = str(error)
        if task.ranks.any(bool(failure), task.device):
            raise self._stopped(failure or "The run broke in another process", step + 1)
        measured = task.ranks.mean(measured, task.device)
        task.ranks.average_gradients(self.weights.parameters.values())
        return measured, self.weights.clip(task.clip_norm)

    def _add_row(self, measured: dict[str, float], norm: float, rate: float) -> None:
        task, done = self.task, self.weights.step
        try:
            row = task.row(measured, norm)
        except PurifyError as error:
            raise self._stopped(str(error), done) from None
        task.curves.add(step=done, seconds=round(self.seconds, 2), learning_rate=rate, **row)

    def _validate(self, last: bool) -> None:
        if not self.weights.finite():  # in every process alike
            raise self._stopped("The weights became infinite or NaN", self.weights.step)
        if not self.first:
            return
        try:
            with writing(self.folder):
                self.task.validate(self.folder, last)
        except TrainingError:
            raise
        except PurifyError as error:
            raise self._stopped(str(error), self.weights.step) from None

    def _resume(self) -> None:
        header, groups = load_state(self.path, self.identity)
        try:
            self._go_on(header, groups)
        except PurifyError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not a whole training state ({type(error).__name__}: {error!s:.200}). Delete it to "
                "train from the start."
            ) from None
        log.info("going on from step %d of %d in %s", self.weights.step, self.steps, self.path)

    def _go_on(self, header: dict[str, Any], groups: Groups) -> None:
        task = self.task
        check_header(header)
        if header["step"] > self.steps:
            raise TrainingError(
                f"{self.path} is of a run that has done {header['step']} steps already. Got {self.steps} as steps: "
                "give at least these, or another output folder."
            )
        self.seconds, task.warnings = header["seconds"], header["warnings"]
        task.watch.restore(header)
        task.curves.restore(header["curves"], header["step"])
        if (planned := header["plan"]) != (plan := task.config.length()):
            before, now = (", ".join(f"{k}={v}" for k, v in sorted(length.items())) for length in (planned, plan))
            task.warnings.append(f"the length was changed at step {header['step']:,}: planned {before}, now {now}")
        if wrong := misfits(_shapes(task, header["step"]), _flat(groups), torch.float32):
            raise ValueError(wrong)
        task.restore(header["step"], groups)

    def _save(self) -> None:
        task = self.task
        header = {
            "identity": self.identity,
            "plan": task.config.length(),
            "step": self.weights.step,
            "seconds": self.seconds,
            "curves": task.curves.rows,
            "warnings": task.warnings,
        }
        save_state(self.path, {**header, **self.settled}, task.groups())
        with writing(self.folder / CURVES_CSV):
            task.curves.write_csv(self.folder)
        with writing(self.folder):
            task.draw(self.folder)

    def _save_if_sound(self) -> bool:
        """Save unless the run looks broken: then the state that stands there is worth more."""
        reason = self.task.watch.suspicion()
        if reason is None:
            self._save()
        elif not self.unsaved_reported:
            self.unsaved_reported = True
            log.warning(
                "step %d is not saved, nor any later one while this looks like a run that breaks: %s (running means). "
                "A state from before, if there is one, is kept.",
                self.weights.step,
                reason,
            )
        return reason is None

    def _stopped(self, reason: str, step: int) -> TrainingError:
        kept = ""
        if self.path.exists():
            done = load_state(self.path, self.identity)[0]["step"]
            kept = f" The last good state is kept in {self.path}: training with steps={done} makes a checkpoint of it."
        return TrainingError(
            f"{reason} at step {step}.{kept} {self.task.advice}, and start again with another output folder."
        )


def _shapes(task: Task[Any], step: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a state after `step` steps."""
    wanted = {**task.groups(), **task.weights.moments(step)}
    return {name: tuple(tensor.shape) for name, tensor in _flat(wanted).items()}


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, inner in groups.items() for name, tensor in inner.items()}


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Set torch's generators of the CPU and of `device` to `seed`, and put them back; other GPUs keep theirs."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory used so far, in bytes: of the GPU, else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
