"""`purifyloader convert`: a checkpoint that others published, as a folder of this library."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from purifyloader.diffusion.denoiser import PARAMETERIZATIONS
from purifyloader.errors import ConfigError
from purifyloader.pretrained.convert import FORMATS, as_json, convert, in_words, option
from purifyloader.pretrained.convert.openai import QKV_ORDERS
from purifyloader.pretrained.plausibility import Plausibility

__all__ = ["DESCRIPTION", "add_options", "run"]

_IMAGES = 32


DESCRIPTION = (
    "Convert a published checkpoint into a folder that pretrained.load reads, and try whether the "
    "result denoises. Pickles are read without running what they hold."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    where = "a file (.pt, .pth, .bin, .safetensors), a folder, or owner/name on the Hugging Face hub"
    add("source", nargs="?", metavar="SOURCE", help=where)
    add("out", nargs="?", type=Path, metavar="OUT", help="folder of the checkpoint")
    add("--format", choices=list(FORMATS), help="; ".join(f"{name}: {its.words}" for name, its in FORMATS.items()))
    add("--preset", metavar="NAME", help="settings of what was published; see --list-presets")
    add("--list-presets", action="store_true", help="print them and leave")
    add("--key", help="the name below which the weights lie in the file, if there are several")
    add("--file", help="which file of a folder or repository, if there are several")
    add("--name", help="of the model (default: that of OUT)")
    add("--licence", "--license", help="of the weights, for the card (default: what is known of the preset)")
    data = "clean images to try it on: a folder, cifar10, webdataset, ... (default: synthetic ones)"
    add("--images", metavar="DATA", help=data)
    add("--root", default="data", help="where --images given by name are (default: data)")
    add("--size", type=int, help="bring --images to this size")
    add("--overwrite", action="store_true", help="replace a checkpoint in OUT")

    group = parser.add_argument_group(
        "what the file does not say", "Required where no preset says it; given beside one, they come first."
    )
    switch = argparse.BooleanOptionalAction
    order = "heads-first: improved-diffusion, and guided-diffusion by default; channels-first: use_new_attention_order"
    how: dict[str, dict[str, Any]] = {
        "schedule": {"choices": ("cosine", "linear"), "help": "noise schedule of its training"},
        "timesteps": {"type": int, "metavar": "T", "help": "timesteps of the schedule"},
        "rescale_timesteps": {"action": switch, "help": "the network was given them on the scale 0..1000"},
        "qkv_order": {"choices": QKV_ORDERS, "help": order},
        "heads": {"type": int, "metavar": "N", "help": "attention heads, the same number in each layer"},
        "head_channels": {"type": int, "metavar": "N", "help": "or the width of a head"},
        "parameterization": {"choices": sorted(PARAMETERIZATIONS), "help": "what it predicts (default: epsilon)"},
        "max_timestep": {"type": float, "metavar": "t", "help": "the last timestep it was trained on (default: T)"},
        "norm_groups": {"type": int, "metavar": "N", "help": "groups of its normalisations (default: 32)"},
        "dropout": {"type": float, "metavar": "p", "help": "of its training; acts only if that goes on"},
        "beta_min": {"type": float, "metavar": "b", "help": "of score_sde's VP SDE"},
        "beta_max": {"type": float, "metavar": "b", "help": "of score_sde's VP SDE"},
        "continuous": {"action": switch, "help": "trained on continuous time (score_sde)"},
        "skip_rescale": {"action": switch, "help": "residual sums over the square root of 2 (score_sde)"},
    }
    for setting, arguments in how.items():
        group.add_argument(option(setting), default=None, **arguments)


_SETTINGS = sorted({name for its in FORMATS.values() for name in its.takes} | {"timesteps"})


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`.

    Returns:
        0, also for a result that does not denoise, which is a warning.
    """
    if options.list_presets:
        print("\n".join(_preset_lines(options.format)))
        return 0
    required = {"SOURCE": options.source, "OUT": options.out, "--format": options.format}
    if missing := [name for name, value in required.items() if value is None]:
        raise ConfigError(f"{', '.join(missing)} must be given.")
    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    images = _images(options)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")  # those of the result among them
    judged = convert(
        options.source,
        options.out,
        options.format,
        preset=options.preset,
        settings=settings,
        key=options.key,
        file=options.file,
        name=options.name,
        licence=options.licence,
        images=images,
        images_are=_described(options.images),
        overwrite=options.overwrite,
    )
    print("\n".join([f"{options.out}: converted from {options.format}", *_judged_lines(judged)]))
    return 0


def _images(options: argparse.Namespace) -> Tensor | None:
    if options.images is None:
        return None
    from purifyloader.datasets.named import open_dataset
    from purifyloader.datasets.select import load_images

    dataset = open_dataset(options.images, options.root, train=False)
    length = len(dataset)  # type: ignore[arg-type]
    # spread over the set, which may be sorted by class
    chosen = [i * length // _IMAGES for i in range(_IMAGES)] if length > _IMAGES else range(length)
    return load_images(dataset, chosen, size=options.size)


def _described(images: str | None) -> str:
    if images is None:
        return ""
    from purifyloader.datasets.named import describe

    return f"images of {describe(images)}"


def _judged_lines(judged: Plausibility) -> list[str]:
    lines = [f"  tried on {judged.images}:"]
    lines += [f"  {r.sigma_px:5.3g} px: {r.noisy:.2f} → {r.denoised:.2f} dB ({r.gain:+.2f})" for r in judged.rows]
    if judged.energy is not None:
        lines.append(f"  noise raises the energy of {100 * judged.energy:.0f} %")
    return lines


def _preset_lines(format: str | None) -> list[str]:
    lines = []
    for name, its in FORMATS.items():
        if format not in (None, name):
            continue
        lines.append(f"{name}: {its.words}")
        if not its.presets:
            lines.append("  no presets: its files say everything")
        for preset, settings in its.presets.items():
            plain = as_json(settings) or {}
            where = plain.pop("source", None)
            lines.append(f"  {preset}")
            lines.append("    " + "; ".join(f"{key} {in_words(value)}" for key, value in plain.items()))
            if where is not None:
                lines.append(f"    from {where}")
    return lines
