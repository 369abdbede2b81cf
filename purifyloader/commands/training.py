"""Run a training from a folder of clean images to a checkpoint with its card, whatever kind of model is trained."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purifyloader.commands import options as shared
from purifyloader.commands.logs import show
from purifyloader.core.checks import as_path, launcher_number
from purifyloader.errors import CheckpointError, ConfigError, InputError, TrainingError
from purifyloader.files.json import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("purifyloader")

_NAMED = ("cifar10", "cifar100")  # whose --validation is their test split


def add_training_options(
    parser: argparse.ArgumentParser, *, validation: str, presets: Mapping[str, str], steps: str, batch: str
) -> tuple[argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """Add the options of every training, with these words in their help; return the groups "how" and "the run"."""
    data = parser.add_argument_group("the clean images")
    shared.add_data(data, "clean images")
    shared.add_choice(data, "all")
    shared.add_size(data)
    data.add_argument(
        "--validation",
        help=f"clean images to {validation}: like --data, where cifar10 and cifar100 mean the test split, or none "
        "(default: images of --data that are not trained on; a twentieth of them if all were chosen)",
    )
    data.add_argument("--validation-count", type=shared.positive, default=1000, help="at most (default: 1000)")

    how = parser.add_argument_group("how")
    words = "; ".join(f"{name}: {text}" for name, text in presets.items())
    how.add_argument("--preset", default="light", choices=presets, metavar="NAME", help=words)
    words = "JSON of fields that replace the preset's, or a checkpoint's config.json: all of them"
    how.add_argument("--config", type=as_path, metavar="FILE", help=words)
    how.add_argument("--start-from", metavar="MODEL", help="a model whose weights to start from, with its network")
    how.add_argument("--steps", type=shared.positive, help=steps)
    how.add_argument("--batch-size", type=shared.positive, help=batch)
    how.add_argument("--learning-rate", type=shared.above_zero, help="of the optimiser (default: of the preset)")
    shared.add_seed(how, "the weights and all noise", of_config=True)
    how.add_argument("--dtype", choices=shared.DTYPES, help="arithmetic of the network (default: of the preset)")
    words = "compile the network (default: on a GPU, where it pays)"
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help=words)

    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=as_path, help="folder for the checkpoint (and, until it is done, the run's state)")
    run.add_argument("--estimate", action="store_true", help="print what it would cost on this machine, and stop")
    shared.add_device(run)
    run.add_argument("--save-every", type=float, default=60.0, metavar="S", help="seconds between states (default: 60)")
    shared.add_quiet(run)

    about = parser.add_argument_group("the card")
    about.add_argument("--name", help="of the model (default: the folder's)")
    about.add_argument("--description", help="what the images are (default: --data)")
    about.add_argument("--validation-description", help="what the held-out images are (default: --validation)")
    about.add_argument("--licence", help="of the images and so of the weights")
    about.add_argument("--note", help="what else the card should say")
    return how, run


@dataclass(frozen=True)
class Kind:
    """A kind of training as its command runs it; the library's part of it is `train`.

    Attributes:
        configuration: makes of the options, the shape (C, H, W) of an image and the device what to train, and the model
            to start from or None.
        build, train: such as `build_denoiser` and `train_denoiser`.
        arguments: the further arguments of `train`, from the options and the held-out images or None.
        judge: measures the trained model, adds the results to its details, and returns lines to print, and the captions
            of `pictures` by name.
        card: writes the text of the card from the name, the model, its details, captions, and `_options_again`.
        unit: a step of the training, in the plural.
    """

    configuration: Callable[[argparse.Namespace, Sequence[int], torch.device], tuple[Any, dict[str, Any]]]
    build: Callable[..., Any]
    train: Callable[..., tuple[Any, dict[str, Any]]]
    arguments: Callable[[argparse.Namespace, Tensor | None], dict[str, Any]]
    judge: Callable[[argparse.Namespace, Trained], tuple[list[str], dict[str, str]]]
    card: Callable[[str, Any, Mapping[str, Any], Mapping[str, str], str], str]
    pictures: Sequence[str]
    unit: str = "steps"


@dataclass(frozen=True)
class Trained:
    """A trained model, its configuration and details, and uint8 images (N, C, H, W) that it has and has not seen."""

    model: Any
    config: Any
    details: dict[str, Any]
    images: Tensor
    held_out: Tensor | None
    device: torch.device


def run_training(options: argparse.Namespace, kind: Kind) -> int:
    """Train in this process of a launcher's while --out is this run's alone, or estimate the cost; return 0."""
    with _processes(options.device) as (rank, device):
        quiet: bool = options.quiet or rank > 0
        show(logging.WARNING)
        logging.getLogger("purifyloader").setLevel(logging.WARNING if quiet else logging.INFO)
        if not options.estimate:
            if options.out is None:
                raise InputError("Give --out, a folder for the checkpoint, or --estimate.")
            _check_out(options.out)
        with _alone(options, rank, kind.pictures):
            _train(options, kind, rank, device, quiet)
    return 0


def _train(options: argparse.Namespace, kind: Kind, rank: int, device: torch.device, quiet: bool) -> None:
    from purifyloader import pretrained
    from purifyloader.train import plan
    from purifyloader.train.state import STATE_FILE, writing

    clean = _clean_set(options, quiet)
    config, models = kind.configuration(options, clean.images.shape[1:], device)
    common = {**models, "device": device}
    if options.estimate:
        more = kind.arguments(options, None)
        measured = plan.measure(kind.build, kind.train, clean.images, config, **common, **more)
        if rank == 0:
            print(plan.report(measured, config, _machine(device), datetime.datetime.now()))
        return
    if _is_finished(options, clean, config):
        if rank == 0:
            print(f"{options.out}: finished before, with these very settings and images. Nothing was done.")
        return
    held_out, held_out_is = _held_out_images(options, clean, quiet)
    more = kind.arguments(options, held_out)
    run = {"save_every": options.save_every, "progress": not quiet}
    model, record = kind.train(clean.images, options.out, config, **common, **run, **more)
    if rank > 0:
        return
    details = _details(options, clean, held_out_is, config, record, device)
    name = options.name or options.out.resolve().name
    with writing(options.out):
        lines, captions = kind.judge(options, Trained(model, config, details, clean.images, held_out, device))
        drawn = {picture: caption for picture, caption in captions.items() if (options.out / picture).exists()}
        text = kind.card(name, model, details, drawn, _options_again(details))
        # over whatever a killed save left there
        pretrained.save(model, options.out, name=name, card=text, details=details, overwrite=True)
    (options.out / STATE_FILE).unlink(missing_ok=True)
    print("\n  ".join([f"{options.out}: {record['steps']:,} {kind.unit}, {record['seconds']:.0f} s", *lines]))


def _options_again(details: Mapping[str, Any]) -> str:
    """Return the options that the same training needs beside the configuration and the indices, each after a space."""
    size = f" --size {details['resized']}" if details.get("resized") else ""
    # of all images some would be held out
    return size + " --validation none" * (len(details["indices"]) == details["data_length"])


def _check_out(out: Path) -> None:
    """Refuse before hours of training what could not be written after them.

    Files beside the state of a run, without config.json, are of a save that was killed: written again.
    """
    from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE
    from purifyloader.train.state import STATE_FILE

    if out.exists() and not out.is_dir():
        raise InputError(f"Expected a folder as --out. Got the file {out}.")
    there = [name for name in (CONFIG_FILE, MODEL_FILE, CARD_FILE) if (out / name).exists()]
    if there and CONFIG_FILE not in there and not (out / STATE_FILE).exists():
        raise _with_checkpoint(out, ", ".join(there))


def _with_checkpoint(out: Path, what: str) -> CheckpointError:
    return CheckpointError(f"Expected a folder without a checkpoint. Got {out} with {what}: give another --out.")


def _is_finished(options: argparse.Namespace, clean: CleanSet, config: Any) -> bool:
    """Tell whether --out has the whole model of this very training; `CheckpointError` where it has another one."""
    from purifyloader import pretrained
    from purifyloader.pretrained.checkpoint import kind_of_folder, read_config
    from purifyloader.pretrained.registry import CONFIG_FILE
    from purifyloader.train.state import STATE_FILE, images_sha256

    if not (options.out / CONFIG_FILE).exists():
        return False
    details = read_config(options.out, None).get("details")
    there = details.get("train") if isinstance(details, dict) else None
    if not isinstance(details, dict) or not isinstance(there, dict):
        raise _with_checkpoint(options.out, f"{CONFIG_FILE}, of a model that was not trained by this command")
    asked = config.to_dict()
    differing = [name for name in {**there, **asked} if name != "compile" and there.get(name) != asked.get(name)]
    if details.get("images_sha256") != images_sha256(clean.images):
        differing.append("set of images")
    if differing:
        raise _with_checkpoint(options.out, f"{CONFIG_FILE}, of a training with another {', '.join(differing)}")
    pretrained.load(options.out, kind_of_folder(options.out).name)  # which is whole
    (options.out / STATE_FILE).unlink(missing_ok=True)  # of a run that was killed at its very end
    return True


@contextlib.contextmanager
def _processes(name: str | None) -> Iterator[tuple[int, torch.device]]:
    """Yield (rank, device), joined with the other processes where a launcher started several."""
    import torch

    from purifyloader.core.devices import as_device

    on_cpu = name == "cpu" or (name is None and not torch.cuda.is_available())
    if launcher_number("WORLD_SIZE", 1, 1) == 1:
        yield 0, as_device(name or ("cpu" if on_cpu else "cuda"))
        return
    from accelerate import PartialState

    if name not in (None, "cpu", "cuda"):
        raise InputError(f"With several processes --device must be cpu or cuda, one GPU for each. Got {name!r}.")
    state = PartialState(cpu=on_cpu)
    try:
        yield state.process_index, torch.device("cpu") if on_cpu else state.device
    finally:
        state.destroy_process_group()


@contextlib.contextmanager
def _alone(options: argparse.Namespace, rank: int, pictures: Sequence[str]) -> Iterator[None]:
    """Lock --out while the run lasts, and remove what killed saves of its files have left.

    Two runs that write to one folder would undo each other's work: the second one raises a `TrainingError`.
    """
    from purifyloader.files.locks import Lock, lock_path
    from purifyloader.pretrained.registry import CARD_FILE, CONFIG_FILE, MODEL_FILE
    from purifyloader.train.curves import CURVES_CSV
    from purifyloader.train.state import STATE_FILE, tidy, writing

    if options.estimate or rank > 0:
        yield
        return
    created = not options.out.exists()
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    lock = Lock(options.out, STATE_FILE)
    try:
        if not lock.acquire(wait=False):
            raise TrainingError(
                f"Expected --out to be for this run alone. Got {options.out}, into which "
                f"another process is training now: {lock.held_by()} Wait for it, stop it, or give another folder."
            )
        if lock.real:  # else another run may be writing just now
            tidy(options.out, (STATE_FILE, CURVES_CSV, CONFIG_FILE, MODEL_FILE, CARD_FILE, *pictures))
        try:
            yield
        finally:
            lock_path(options.out, STATE_FILE).unlink(missing_ok=True)
            lock.release()
    finally:
        if created:
            with contextlib.suppress(OSError):  # not empty: a state, or a checkpoint
                options.out.rmdir()


# -- the configuration ---------------------------------------------------------------------------------


def fields_of_file(
    options: argparse.Namespace, of_checkpoint: Callable[[Mapping[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """Read the fields of --config, none without it; of `of_checkpoint` see `fields_of`."""
    fields = fields_of(options.config, of_checkpoint) if options.config is not None else {}
    if not isinstance(network := fields.get("network", {}), Mapping):
        raise ConfigError(f"network must be an object of its fields. Got {network!r}.")
    return fields


def named_model(options: argparse.Namespace, fields: dict[str, Any], name: str, kind: str) -> Any:
    """Load the model of an option, such as --start-from, else the one that the field of its name has; None for none.

    It takes the field away; `kind` is of the model, as `pretrained.load` takes it.
    """
    from purifyloader import pretrained
    from purifyloader.files.weights import weights_sha256
    from purifyloader.pretrained.registry import is_local
    from purifyloader.train.fields import ANCESTORS, check_model_entry

    named = fields.pop(name, None)
    check_model_entry(name, named)
    if (given := getattr(options, name)) is not None:
        return pretrained.load(given, kind=kind)
    if named is None:
        return None
    option = f"--{name.replace('_', '-')}"
    of_weights = f"{options.config} {ANCESTORS[name].verb} the weights {named['weights_sha256'][:16]} of"
    # a name in somebody's file must not lead to a download
    if named["name"] is None or not is_local(named["name"]):
        raise ConfigError(
            f"{of_weights} {named['name'] or 'a model'}. Got no such model here: give its folder as {option}."
        )
    model = pretrained.load(named["name"], kind=kind)
    if weights_sha256(model) != named["weights_sha256"]:
        raise ConfigError(
            f"{of_weights} {named['name']!r}. Got others by that name: give the right folder as {option}."
        )
    return model


def fields_of(path: Path, of_checkpoint: Callable[[Mapping[str, Any]], Any] | None = None) -> dict[str, Any]:
    """Read fields of a configuration from JSON: the fields themselves, or a checkpoint's config.json.

    `of_checkpoint` takes them out of the latter; by default they are its "details", "train".
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"must be a JSON file of training fields. Got {path}: {error}.", argument="config") from None
    if isinstance(values, dict) and isinstance(values.get("details"), dict):
        values = values["details"].get("train") if of_checkpoint is None else of_checkpoint(values)
    if not isinstance(values, dict):
        raise InputError(
            "must be a JSON object of training fields, or the config.json of a model trained here. "
            f"Got {path}, which is neither.",
            argument="config",
        )
    return values


def fitted(config: Any, chosen: Collection[str], device: torch.device, compiled: bool) -> Any:
    """Set what nobody has chosen as the device computes it best: `compile`, and float32 where bfloat16 is emulated."""
    from purifyloader.core.devices import computes_bfloat16

    changes: dict[str, Any] = {}
    if "compile" not in chosen:
        changes["compile"] = device.type == "cuda" and compiled
    if "dtype" not in chosen and config.dtype == "bfloat16" and not computes_bfloat16(device):
        changes["dtype"] = "float32"
        log.info("training in float32: this CPU has no instructions for bfloat16 and emulates it, many times slower")
    return dataclasses.replace(config, **changes)


def changes_of(options: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """Collect the fields of a configuration that options set."""
    names = {each.name for each in dataclasses.fields(config)} - {"start_from", "distil_from"}
    return shared.given(options, names & vars(options).keys())


# -- the images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanSet:
    """The images to train on, uint8 (N, C, H, W) at the rising `indices` of the dataset.

    Those at `held_out` are not trained on; none where another dataset is for that.
    """

    dataset: Any
    indices: list[int]
    images: Tensor
    held_out: list[int] = field(default_factory=list)


def _clean_set(options: argparse.Namespace, quiet: bool) -> CleanSet:
    from purifyloader.datasets.named import open_dataset
    from purifyloader.datasets.select import choose, hold_out, load_images, read_indices

    dataset = open_dataset(options.data, options.root)
    length = len(dataset)  # type: ignore[arg-type]
    if options.indices is not None:
        indices = read_indices(options.indices)
    else:
        indices = choose(length, length if options.count is None else options.count, options.choose_seed)
    held_out: list[int] = []
    if options.validation is None:
        indices, held_out = hold_out(length, indices, options.choose_seed, options.validation_count)
    images = load_images(dataset, indices, size=options.size, progress=not quiet)
    return CleanSet(dataset, indices, images, held_out)


def _held_out_images(options: argparse.Namespace, clean: CleanSet, quiet: bool) -> tuple[Tensor | None, str]:
    """Return the held-out images, and words on them for the card."""
    from purifyloader.datasets.named import describe, open_dataset
    from purifyloader.datasets.select import choose, load_images

    if options.validation == "none" or (options.validation is None and not clean.held_out):
        return None, ""
    chosen: Sequence[int] = clean.held_out
    if options.validation is None:
        words, source = "images of the same data that it was not trained on", clean.dataset
    else:
        source = open_dataset(options.validation, options.root, train=False)
        length = len(source)  # type: ignore[arg-type]
        count = min(options.validation_count, length)
        # a folder may be sorted by class; the named test splits are shuffled, and their first images comparable
        chosen = range(count) if options.validation in _NAMED else choose(length, count, options.choose_seed)
        words = f"images of {describe(options.validation)}" + (", test split" if options.validation in _NAMED else "")
    words = options.validation_description or words
    loaded = load_images(source, chosen, size=options.size, channels=clean.images.shape[1], progress=not quiet)
    trained = {image.numpy().tobytes() for image in clean.images}
    apart = [i for i, image in enumerate(loaded) if image.numpy().tobytes() not in trained]
    if len(apart) == len(loaded):
        return loaded, words
    if options.validation is not None:
        raise InputError(
            f"Expected validation images apart from those trained on. Got {len(loaded) - len(apart)} of {len(loaded)} "
            "that are among them: give other images as --validation, or leave it out."
        )
    log.info("%d held-out images are copies of ones trained on, and left out", len(loaded) - len(apart))
    return (loaded[apart], words) if apart else (None, "")


def _details(
    options: argparse.Namespace, clean: CleanSet, held_out: str, config: Any, record: Any, device: torch.device
) -> dict[str, Any]:
    """Collect what a checkpoint says of its training, whatever was trained; never a path, for the card travels."""
    from purifyloader.core.version import __version__
    from purifyloader.datasets.named import describe
    from purifyloader.files.hashes import hashes_as_text, image_hashes
    from purifyloader.train.state import images_sha256

    return {
        "purifyloader": __version__,
        "data": options.description or describe(options.data),
        "data_length": len(clean.dataset),
        "image_size": list(clean.images.shape[-2:]),
        "resized": options.size,
        "indices": clean.indices,
        "images_sha256": images_sha256(clean.images),
        # of each, so that a bench can tell whether a set it tests on holds one of them
        "image_hashes": hashes_as_text(image_hashes(clean.images.permute(0, 2, 3, 1).numpy())),
        "held_out": held_out,
        "train": config.to_dict(),
        "record": record,
        "machine": _machine(device),
        "licence": options.licence,
        "note": options.note,
    }


def _machine(device: torch.device) -> str:
    """Name the machine, for a card: its GPU, or its CPU's threads and kind."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)} ({platform.machine()})"
