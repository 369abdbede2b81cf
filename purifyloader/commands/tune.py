"""`purifyloader tune`: how strongly to purify a dataset, and why."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import Tensor

from purifyloader.commands.dynamics import SCHEDULES, add_images, progress_bar
from purifyloader.commands.evaluate import to_json
from purifyloader.commands.inputs import Models, load_models, read_images
from purifyloader.commands.options import add_device
from purifyloader.core.devices import device_of_process
from purifyloader.datasets.named import TORCHVISION, describe, open_dataset
from purifyloader.datasets.select import choose, load
from purifyloader.dynamics.paths import DiffusionPath, LangevinPath
from purifyloader.dynamics.paths import Path as Purification
from purifyloader.dynamics.pictures import picture
from purifyloader.dynamics.tune import COMPENSATED, choose_level, tune
from purifyloader.errors import ConfigError, InputError
from purifyloader.pretrained.learned import learned_images
from purifyloader.results.folder import check_out, write_results
from purifyloader.results.table import plain

__all__ = ["DESCRIPTION", "add_options", "JSON_FILE", "PICTURE_FILE", "RECIPES", "run", "pasted", "reasons"]

JSON_FILE = "tune.json"
PICTURE_FILE = "tune.png"
_COUNT = 100

RECIPES = ("eclipse", "puregen-ddpm")
"""What a denoiser is tuned for: noise of a level and one call, or PureGen's timesteps."""

_STEPS = tuple(range(10, 301, 10))  # what is looked at on one walk is free
_TIMESTEPS = (10, 20, 30, 40, 50, 60, 75, 90, 100, 125, 150, 175, 200)
_SIGMA_PX = (2, 3, 4, 5, 6.37, 8, 10, 12.75, 16, 20, 25, 32, 40, 50, 63.75, 80, 100)


DESCRIPTION = (
    "Propose how strongly to purify: the smallest level at which poisoned images, purified, have come "
    "closer to the clean image than to the poisoned one. Attacks are made on clean images here, for nobody knows "
    "the attack on a dataset; with --data, that is compared with the clean images before and after."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--clean",
        required=True,
        help="clean images: cifar10, cifar100 (their test split), imagefolder, webdataset, a folder of images, .tar "
        "files, or package.module:function",
    )
    add_images(parser, "--clean", _COUNT)
    add = parser.add_argument
    add("--data", help="the dataset to be purified, given like --clean (cifar10 and cifar100: --data-split)")
    add("--data-root", help="where a dataset given by name is (default: --root)")
    add("--data-split", choices=("train", "test"), default="train", help="(default: train)")
    add("--energy", metavar="MODEL", help="an energy model: Langevin steps, or only energies where there is a --model")
    add("--model", metavar="DENOISER", help="a denoiser: diffusion")
    add(
        "--recipe", choices=RECIPES, help="of a denoiser: noise and one call, or PureGen's timesteps (default: eclipse)"
    )
    add("--steps", type=int, nargs="+", metavar="N", help="Langevin steps or, with puregen-ddpm, timesteps to try")
    add("--sigma-px", type=float, nargs="+", metavar="PX", help="noise levels to try with eclipse, on the 0-255 scale")
    add("--calls", type=int, metavar="N", help="at most N network calls of diffusion (default: one; puregen-ddpm: all)")
    add(
        "--share",
        type=float,
        default=0.5,
        help="of the images of every attack that must have come closer to clean (default: 0.5)",
    )
    add("--seed", type=int, default=0, help="of the noise and the attacks (default: 0)")
    add("--batch-size", type=int, default=32, metavar="N", help="images of a network call; decides the last bit")
    add_device(parser)
    add("--out", type=Path, metavar="FOLDER", help=f"write {JSON_FILE} and {PICTURE_FILE}, the curves, there")
    add("--overwrite", action="store_true", help="replace these files")
    add("--json", action="store_true", help="print JSON instead of the proposal")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`. Returns 0, also without a proposal."""
    device = device_of_process(options.device, 0)
    check_out(options.out, (JSON_FILE, PICTURE_FILE), options.overwrite, "a proposal")
    choose_level({"": [0.0]}, options.share)
    models = load_models(options.energy, options.model, device)
    path = _path(models, options)  # before images are read
    bars = not options.quiet and sys.stderr.isatty()
    images = read_images(
        models, options.clean, options, root=options.root, default=_COUNT, what="--clean", progress=bars
    )
    data, said = _data(options, models, len(images.clean), bars)
    with progress_bar(bars) as progress:
        results = tune(
            path,
            images.clean,
            images.poisoned,
            share=options.share,
            data_NCHW=data,
            energy=models.energy,
            seed=options.seed,
            progress=progress,
        )
    results["curves"] = {**results["curves"], "device": device.type, "data": images.data}
    results = {**results, "data": said, "reasons": list(reasons(results))}
    # a path stays out of what may travel; the printed proposal names it
    names = {"energy": _shown(options.energy), "model": _shown(options.model)}
    for key, level in (("pasted", "proposal"), ("pasted_with_compensation", "with_compensation")):
        results[key] = None if results[level] is None else pasted(results[level], options, names)[0]
    text = to_json(results)
    written: list[str] = []
    if options.out is not None:  # before anything is printed, to a pipe that may be closed
        write_results(options.out, {JSON_FILE: text}, PICTURE_FILE, lambda file: picture(results, file), written.append)
    print(text if options.json else "\n".join([*_printed(results, options), ""]), end="")
    if written:
        print("\n".join(written), file=sys.stderr if options.json else sys.stdout)
    return 0


def _shown(spec: str | None) -> str | None:
    return None if spec is None else Path(spec).name if Path(spec).is_dir() else spec


def _path(models: Models, options: argparse.Namespace) -> Purification:
    if models.denoiser is None:
        if given := [flag for flag in ("sigma_px", "calls", "recipe") if getattr(options, flag) is not None]:
            raise ConfigError(
                f"Langevin steps take --steps. Got --{given[0].replace('_', '-')}, which is about diffusion: leave it "
                "out, or give a denoiser as --model."
            )
        assert models.energy is not None
        return LangevinPath(models.energy, sorted(set(options.steps or _STEPS)), compute_batch=options.batch_size)
    low, high = models.denoiser.sigma_range
    if options.recipe == "puregen-ddpm":
        if options.sigma_px is not None:
            raise ConfigError("puregen-ddpm takes --steps, timesteps of its schedule. Got --sigma-px: leave it out.")
        schedule = SCHEDULES["linear"]
        steps = sorted(set(options.steps or [t for t in _TIMESTEPS if float(schedule.sigma(t)) <= high]))
        return DiffusionPath(
            models.denoiser, t=steps, schedule=schedule, calls=options.calls, compute_batch=options.batch_size
        )
    if options.steps is not None:
        raise ConfigError(
            "eclipse takes --sigma-px, noise levels. Got --steps: leave it out, or give --recipe puregen-ddpm."
        )
    px = options.sigma_px or [px for px in _SIGMA_PX if 255 * low <= px <= 255 * high]
    # four digits, for what is pasted is what was measured
    sigmas = sorted({float(f"{level / 255:.4g}") for level in px})
    return DiffusionPath(models.denoiser, sigmas=sigmas, calls=options.calls, compute_batch=options.batch_size)


def _data(
    options: argparse.Namespace, models: Models, count: int, progress: bool
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """As many images of the dataset as there are clean ones, at random."""
    if options.data is None:
        return None, None
    root = options.root if options.data_root is None else options.data_root
    dataset = open_dataset(options.data, root, train=options.data_split == "train")
    length = len(dataset)  # type: ignore[arg-type]
    if not length:
        raise InputError("Expected images in --data. Got an empty dataset.")
    indices = choose(length, min(count, length), options.choose_seed)
    images = load(dataset, indices, models.channels, options.size, progress, "--data").images
    learned = learned_images(models.specs, dataset, options.data, models.channels, progress)
    if trained_on := sum(learned.has(dataset[index], options.size) for index in indices):
        print(
            f"purifyloader: note: the model was trained on {trained_on:,} of the {len(indices):,} images chosen from "
            "--data, which it purifies better than others.",
            file=sys.stderr,
        )
    split = f" ({options.data_split} split)" if options.data in TORCHVISION else ""
    return images, {
        "description": describe(options.data) + split,
        "length": length,
        "indices": indices,
        "trained_on": trained_on,
    }


# -- the proposal ------------------------------------------------------------------------------------


def pasted(level: Mapping[str, Any], options: argparse.Namespace, names: Mapping[str, str | None]) -> tuple[str, str]:
    """The proposal as a line of Python, and as a command that precomputes the dataset with it.

    Args:
        names: the model under "model" or "energy", as it is to be written.
    """
    size = "" if options.size is None else f", resize={options.size}, crop={options.size}"
    if options.model is None:
        recipe, steps = "puregen-ebm", int(level["level"])
        python = f"recipes.puregen_ebm(steps={steps}, energy={names['energy']!r}{size})"
        arguments = ["--energy", names["energy"], "--steps", str(steps)]
    elif options.recipe == "puregen-ddpm":
        recipe, steps = "puregen-ddpm", int(level["level"])
        fewer = level["calls"] < steps
        calls = f", calls={level['calls']}" if fewer else ""
        python = f"recipes.puregen_ddpm(steps={steps}, model={names['model']!r}{calls}{size})"
        arguments = ["--model", names["model"], "--steps", str(steps)]
        arguments += ["--calls", str(level["calls"])] if fewer else []
    else:
        recipe, several = "eclipse", level["calls"] > 1
        calls = f", steps={level['calls']}" if several else ""
        python = f"recipes.eclipse({names['model']!r}, sigma={level['level']:.4g}{calls}{size})"
        arguments = ["--model", names["model"], "--sigma", f"{level['level']:.4g}"]
        arguments += ["--steps", str(level["calls"])] if several else []
    if options.size is not None:
        arguments += ["--resize", str(options.size), "--crop", str(options.size)]
    data = ["--dataset", options.data or "YOUR_DATA"]
    if options.data in (*TORCHVISION, "imagefolder", "webdataset"):
        data += ["--root", options.root if options.data_root is None else options.data_root]
    if options.data in TORCHVISION and options.data_split != "train":
        data += ["--split", options.data_split]
    command = ["purifyloader", "precompute", *data, "--recipe", recipe, *arguments, "--out", "cache/purified"]
    return python.replace("'", '"'), shlex.join(str(word) for word in command)


def _level(record: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    unit = results["curves"]["purification"]["unit"]
    if unit == "Langevin steps":
        return f"{record['level']:g} Langevin steps"
    if unit == "timestep t":
        return f"t = {record['level']:g} ({record['sigma_px']:.3g} px of noise)"
    return f"{record['sigma_px']:.3g} px of noise"


def _closer(record: Mapping[str, Any], but: Sequence[str] = ()) -> str:
    return ", ".join(
        f"{100 * its['closer_to_clean']:.0f} % of {name}" for name, its in record["attacks"].items() if name not in but
    )


def reasons(results: Mapping[str, Any]) -> Iterator[str]:
    """Why this level, in a few sentences with numbers."""
    best, share = results["best"], f"{100 * results['share']:g} %"
    if results["proposal"] is None:
        yield (
            f"No level tried does it: {share} of the images of every attack should come closer to the clean image than "
            f"to the poisoned one. Nearest comes {_level(best, results)}, where {_closer(best)} do, at a cost to clean "
            f"images of {best['cost_px']:.3g} px (RMS)."
        )
        if best["level"] == results["curves"]["levels"][-1]["level"]:
            yield "That is the last level tried: try higher ones, if the model takes them."
    else:
        before = results["before"]
        than = f"; at {_level(before, results)}, {_closer(before)}" if before else ", the lowest level tried"
        yield (
            f"At {_level(best, results)}, {_closer(best)} images have come closer to the clean image than to the "
            f"poisoned one ({share} of every attack was asked for){than}."
        )
        yield (
            f"It moves clean images by {best['cost_px']:.3g} px (RMS), and takes {best['seconds_per_image']:.2g} s an "
            "image on this machine."
        )
    less = {name: its for name, its in results["alone"].items() if its is not None and its["level"] < best["level"]}
    if less and len(less) < len(results["alone"]):
        worst = " and ".join(name for name in results["alone"] if name not in less)
        enough = " and ".join(f"{_level(its, results)} for {name}" for name, its in less.items())
        yield f"It is {worst} that asks for so much: alone, {enough} would do."
    compensated = results["with_compensation"]
    if compensated is not None:
        yield (
            "Compensation, a transform in training (`Compensate()`), removes what purification leaves of smooth "
            f"patches such as LSP's: with it {_level(compensated, results)} may do, where "
            f"{_closer(compensated, COMPENSATED)} images have come closer. In the README's table (CIFAR-10, diffusion "
            "in one call) training on LSP reaches 66 to 67 % with compensation at 6 to 25 px of noise, and 44 to 62 % "
            "without. Nothing was trained here."
        )
    further = {n: its for n, its in best["attacks"].items() if its["to_clean_px"] > its["to_clean_before_px"]}
    if further:
        name, its = max(further.items(), key=lambda pair: pair[1]["to_clean_px"] - pair[1]["to_clean_before_px"])
        yield (
            f"Closer is relative: {name} images are {its['to_clean_px']:.3g} px from the clean ones once purified, and "
            f"{its['to_clean_before_px']:.3g} px before, for clean detail goes with the poison. The criterion measures "
            "distances, not training"
            + ("." if compensated is not None else ": with compensation (compensate=Compensate()) less may do.")
        )
    if results["unpaired"] is not None:
        yield from _unpaired(results["unpaired"])


def _unpaired(found: Mapping[str, Any]) -> Iterator[str]:
    kind = "removed_px" if found["energy"] is None else "energy"
    before, after = found[kind]["before"], found[kind]["after"]
    above = "an energy above that of" if kind == "energy" else "more removed by the lowest level than"
    unusual = _unusual(before)
    head = (
        "Before"
        if unusual is None
        else f"Your data and the clean images are {'' if unusual else 'not told '}apart before"
    )
    yield (
        f"{head}: an image of yours has {above} a clean one in {100 * before['auc']:.0f} % of pairs"
        f"{_range('of halves of the clean images', before['clean_auc'])}, and {100 * before['share_above']:.0f} % of "
        f"yours are above the clean ones' 99th percentile{_range('of halves', before['clean_share_above'])}. After "
        f"purification these are {100 * after['auc']:.0f} and {100 * after['share_above']:.0f} %."
    )
    if unusual == ["share_above"]:
        yield "The data as a whole is as usual, but a part of it is not: that part may be poisoned."


def _unusual(before: Mapping[str, Any]) -> list[str] | None:
    """The measures that are not as between halves of the clean images; None of one clean image, which has no halves."""
    if before["clean_auc"] is None:
        return None
    low, high = before["clean_auc"]
    unusual = [] if low <= before["auc"] <= high else ["auc"]
    # fewer images above than usual are no sign of a poison
    return unusual + (["share_above"] if before["share_above"] > before["clean_share_above"][1] else [])


def _range(what: str, among: Sequence[float] | None) -> str:
    return "" if among is None else f" ({what}, {100 * among[0]:.0f} to {100 * among[1]:.0f} %)"


def _printed(results: Mapping[str, Any], options: argparse.Namespace) -> Iterator[str]:
    curves = results["curves"]
    yield (
        f"{curves['purification']['model']['name'] or 'A model'}: {curves['images']['count']:,} clean images of "
        f"{curves['data']['description']}, attacked by "
        + ", ".join(f"{name} ({its['size']['rms_px']:.3g} px RMS)" for name, its in curves["poisons"].items())
    )
    yield ""
    names = list(curves["poisons"])
    heads = ["noise"] if "sigma_px" in results["best"] else []
    marks = {
        results[key]["level"]: f"<-{what}"
        for key, what in (("with_compensation", " with compensation"), ("proposal", ""))
        if results[key] is not None
    }
    rows = []
    for level in curves["levels"][1:]:
        cells = [f"{level['level']:.4g}", *([f"{level['sigma_px']:.3g} px"] if heads else [])]
        cells += [f"{level['clean_to_purified_clean']['rms_px']:.2f}", f"{level['seconds_per_image']:.3g}"]
        cells += [f"{100 * level['poisoned'][name]['closer_to_clean']:.0f} %" for name in names]
        rows.append([*cells, marks.get(level["level"], "")])
    head = ["level", *heads, "cost, px", "seconds", *(f"{name[:9]} closer" for name in names), ""]
    yield from plain(head, rows, text_last=True)
    yield ""
    if results["proposal"] is None:
        yield "No proposal."
    else:
        yield f"Proposal: {_level(results['proposal'], results)}"
        yield from _pasted_lines(results["proposal"], options)
    if (compensated := results["with_compensation"]) is not None:
        yield (
            f"Or, with compensation in training (PurifiedDataset(..., compensate=Compensate())): "
            f"{_level(compensated, results)}"
        )
        yield from _pasted_lines(compensated, options)
    yield ""
    for sentence in results["reasons"]:
        yield from wrap(sentence, 118)


def _pasted_lines(level: Mapping[str, Any], options: argparse.Namespace) -> Iterator[str]:
    for line in pasted(level, options, {"energy": options.energy, "model": options.model}):
        yield f"    {line}"
