"""Convert a checkpoint that others published into a folder of this library: `purifyloader convert`."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from purifyloader.commands.logs import show
from purifyloader.commands.options import add_data, add_size, given
from purifyloader.core.checks import as_path
from purifyloader.errors import ConfigError

if TYPE_CHECKING:
    from purifyloader.pretrained.plausibility import Plausibility

DESCRIPTION = (
    "Convert a published checkpoint into a folder that pretrained.load reads, and try whether the "
    "result denoises. Pickles are read without running what they hold."
)
_IMAGES = 32

_switch = argparse.BooleanOptionalAction
_ORDER = "heads-first: improved-diffusion, and guided-diffusion by default; channels-first: use_new_attention_order"
_SETTINGS: dict[str, dict[str, Any]] = {
    "schedule": {"choices": ("cosine", "linear"), "help": "noise schedule of its training"},
    "timesteps": {"type": int, "metavar": "T", "help": "timesteps of the schedule"},
    "rescale_timesteps": {"action": _switch, "help": "the network was given them on the scale 0..1000"},
    "qkv_order": {"choices": ("heads-first", "channels-first"), "help": _ORDER},
    "heads": {"type": int, "metavar": "N", "help": "attention heads, the same number in each layer"},
    "head_channels": {"type": int, "metavar": "N", "help": "or the width of a head"},
    "parameterization": {"metavar": "NAME", "help": "what it predicts: epsilon, v, x0, edm (default: epsilon)"},
    "max_timestep": {"type": float, "metavar": "t", "help": "the last timestep it was trained on (default: T)"},
    "norm_groups": {"type": int, "metavar": "N", "help": "groups of its normalisations (default: 32)"},
    "dropout": {"type": float, "metavar": "p", "help": "of its training; acts only if that goes on"},
    "beta_min": {"type": float, "metavar": "b", "help": "of score_sde's VP SDE"},
    "beta_max": {"type": float, "metavar": "b", "help": "of score_sde's VP SDE"},
    "continuous": {"action": _switch, "help": "trained on continuous time (score_sde)"},
    "skip_rescale": {"action": _switch, "help": "residual sums over the square root of 2 (score_sde)"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    where = "a file (.pt, .pth, .bin, .safetensors), a folder, or owner/name on the Hugging Face hub"
    add("source", nargs="?", metavar="SOURCE", help=where)
    add("out", nargs="?", type=as_path, metavar="OUT", help="folder of the checkpoint")
    add("--format", metavar="NAME", help="how it was published: a format of --list")
    add("--preset", metavar="NAME", help="settings of what was published: a preset of --list")
    add("--list", action="store_true", help="list the formats and their presets, and stop")
    add("--key", help="the name below which the weights lie in the file, if there are several")
    add("--file", help="which file of a folder or repository, if there are several")
    add("--name", help="of the model (default: that of OUT)")
    add("--licence", "--license", help="of the weights, for the card (default: what is known of the preset)")
    add_data(parser, "clean images to try it on, by default synthetic ones", required=False)
    add_size(parser)
    add("--overwrite", action="store_true", help="replace a checkpoint in OUT")
    group = parser.add_argument_group(
        "what the file does not say", "Required where no preset says it; given beside one, they come first."
    )
    for setting, how in _SETTINGS.items():
        group.add_argument(f"--{setting.replace('_', '-')}", default=None, **how)


def run(options: argparse.Namespace) -> int:
    """Convert, and print how well the result denoises; one that does not is a warning."""
    from purifyloader.pretrained.checkpoint import read_config
    from purifyloader.pretrained.convert import FORMATS, convert

    if options.format is not None and options.format not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}. Got {options.format!r}.")
    if options.list:
        print("\n".join(_preset_lines(options.format)))
        return 0
    required = {"SOURCE": options.source, "OUT": options.out, "--format": options.format}
    if missing := [name for name, value in required.items() if value is None]:
        raise ConfigError(f"{', '.join(missing)} must be given.")
    show(logging.WARNING, "warning: %(message)s")  # those of the result among them
    same = {name: getattr(options, name) for name in ("preset", "key", "file", "name", "licence", "overwrite")}
    settings = given(options, sorted(_SETTINGS))
    judged = convert(options.source, options.out, options.format, settings=settings, **same, **_images(options))
    weights = read_config(options.out, None)["details"]["converted"]["weights"]
    lines = [f"{options.out}: converted from {options.format}", f"  weights taken: {weights}", *_judged_lines(judged)]
    print("\n".join(lines))
    return 0


def _images(options: argparse.Namespace) -> dict[str, Any]:
    if options.data is None:
        return {}
    from purifyloader.datasets.named import describe, open_dataset
    from purifyloader.datasets.select import load_images

    dataset = open_dataset(options.data, options.root, train=False)
    length = len(dataset)  # type: ignore[arg-type]
    # spread over the set, which may be sorted by class
    chosen = [i * length // _IMAGES for i in range(_IMAGES)] if length > _IMAGES else range(length)
    images = load_images(dataset, chosen, size=options.size)
    return {"images": images, "images_are": f"images of {describe(options.data)}"}


def _judged_lines(judged: Plausibility) -> list[str]:
    lines = [f"  tried on {judged.images}:"]
    lines += [f"  {r.sigma_px:5.3g} px: {r.noisy:.2f} → {r.denoised:.2f} dB ({r.gain:+.2f})" for r in judged.rows]
    if judged.energy is not None:
        lines.append(f"  noise raises the energy of {100 * judged.energy:.0f} %")
    return lines


def _preset_lines(format: str | None) -> list[str]:
    from purifyloader.pretrained.convert import FORMATS, as_json, in_words

    lines = []
    for name, layout in FORMATS.items():
        if format not in (None, name):
            continue
        lines.append(f"{name}: {layout.words}")
        if not layout.presets:
            lines.append("  no presets: its files say everything")
        for preset, settings in layout.presets.items():
            plain = as_json(settings) or {}
            where = plain.pop("source", None)
            lines.append(f"  {preset}")
            lines.append("    " + "; ".join(f"{key} {in_words(value)}" for key, value in plain.items()))
            if where is not None:
                lines.append(f"    from {where}")
    return lines
