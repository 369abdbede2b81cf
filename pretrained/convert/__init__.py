"""Convert published checkpoints into folders of this library: `purifyloader convert`, or `convert` in Python.

    openai, diffusers, score_sde, energy   pure mappings: from names and shapes to a network
    pickles                                weights out of files, without running what they hold
    choice                                 which of a file's weights, where it has raw ones and averages

What a file does not say comes from a preset, from settings, or from both, settings first. Nothing is guessed: an error
lists what is missing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from purifyloader.core.checks import as_path
from purifyloader.core.version import __version__
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from purifyloader.energy.network import EnergyNetwork
from purifyloader.errors import CheckpointError, ConfigError, InputError, PurifyError
from purifyloader.files.atomic import file_sha256
from purifyloader.files.json import read_json
from purifyloader.pretrained import checkpoint, hub
from purifyloader.pretrained.convert import diffusers, openai, score_sde
from purifyloader.pretrained.convert.choice import Taken, says_average, take
from purifyloader.pretrained.convert.energy import convert_energy
from purifyloader.pretrained.convert.pickles import INDEX, read_file, shards_of
from purifyloader.pretrained.kinds import ModelKind, kind_of
from purifyloader.pretrained.plausibility import Plausibility, dead_leaves
from purifyloader.pretrained.registry import PICKLES, listed

__all__ = ["FORMATS", "Format", "convert"]

log = logging.getLogger("purifyloader")

_MIT = "MIT, that of the code it was published with"


@dataclass(frozen=True)
class Format:
    """A layout of checkpoints that others publish.

    >>> from purifyloader.pretrained.convert import FORMATS
    >>> FORMATS["score-sde"].needs
    ['beta_min', 'beta_max', 'continuous', 'skip_rescale']
    """

    words: str  # describes it
    settings: type | None = None  # class of the settings that its files do not hold; None if they hold all
    presets: Mapping[str, Any] = field(default_factory=dict)  # such settings by the name of what was published
    preset: str | None = None  # taken where none is given
    licences: Mapping[str, str] = field(default_factory=dict)  # of each preset, where it is known

    @property
    def takes(self) -> list[str]:
        """The settings that can be given."""
        return [] if self.settings is None else [f.name for f in fields(self.settings) if f.name != "source"]

    @property
    def needs(self) -> list[str]:
        """The settings without a default."""
        return [] if self.settings is None else [f.name for f in fields(self.settings) if f.default is MISSING]


def _openai(format: str, words: str, licence: str = _MIT, preset: str | None = None) -> Format:
    presets = {name: values for name, values in openai.PRESETS.items() if values.source.lower().startswith(format)}
    return Format(words, openai.OpenAISettings, presets, preset, dict.fromkeys(presets, licence))


FORMATS: dict[str, Format] = {
    "improved-diffusion": _openai("improved-diffusion", "a state dict"),
    "guided-diffusion": _openai("guided-diffusion", "a state dict"),
    "eclipse": _openai("eclipse", "the EMA file", _MIT.replace("MIT", "MIT or Apache-2.0"), "eclipse-cifar10"),
    "diffusers": Format(
        "a folder with a UNet2DModel, or a pipeline with one",
        diffusers.DiffusersSettings,
        diffusers.PRESETS,
        licences={"ddpm-cifar10-32": "Apache-2.0"},
    ),
    "score-sde": Format("a file with EMA parameters", score_sde.ScoreSDESettings, score_sde.PRESETS),
    "puregen-energy": Format("the energy network, a state dict or a folder"),
}


@dataclass(frozen=True)
class _Source:
    """Where weights come from: a file, or the files of a folder or a repository."""

    name: str  # never a path
    weights: Path
    config: Path | None = None
    scheduler: Path | None = None
    commit: str | None = None

    def provenance(self) -> dict[str, Any]:
        used = [path for path in (self.weights, self.config, self.scheduler) if path is not None]
        if self.weights.name.endswith(INDEX):
            used += [self.weights.parent / shard for shard in shards_of(self.weights)]
        named = {"name": self.name, "files": {path.name: file_sha256(path) for path in used}}
        return named if self.commit is None else {**named, "commit": self.commit}


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    key: str | None = None,
    file: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    images: Tensor | None = None,
    images_are: str = "images",
    overwrite: bool = False,
) -> Plausibility:
    """Write the checkpoint folder of a published model, with its provenance and its card.

    Args:
        source: a file (.pt, .pth, .bin, .safetensors), a folder, or the id of a repository on the hub, which is
            downloaded where there is no folder of that name, after a warning.
        out: the folder that `pretrained.load` will read.
        format: a key of `FORMATS`.
        preset: the settings of what was published.
        settings: by name (`Format.takes`), beside a preset or in its place. `schedule` may be a `Schedule`, or its kind
            ("cosine", "linear") with `timesteps` beside it.
        key: the name below which the weights lie in the file, where that is not clear.
        file: which file of a folder or repository, where that is not clear.
        name: of the model (None: that of `out`).
        licence: of the weights, for the card.
        images: uint8 (N, C, H, W), clean, to see whether the result denoises; None takes synthetic ones.
        images_are: describes them, in words.
        overwrite: replace a checkpoint that stands in `out`.

    Returns:
        the measurements of the plausibility check. Its warnings are also logged and in the card.

    Raises:
        InputError, ConfigError: no such format, preset, setting, source or file, or settings that are missing, all
            named.
        CheckpointError: files that are damaged, refused, of another format or do not fit; a checkpoint in `out`.

    >>> from purifyloader.pretrained.convert import convert
    >>> convert("no-such-file.pt", "no-such-folder", "eclipse")
    Traceback (most recent call last):
    purifyloader.errors.InputError: SOURCE must be a file (.safetensors, .pt, .pth, .bin, .ckpt), a folder, or ...
    """
    if format not in FORMATS:
        raise InputError(f"The format must be one of {', '.join(FORMATS)}. Got {format!r}.")
    folder = as_path(out)
    checkpoint.check_folder(folder, overwrite)  # before anything is read, downloaded or measured
    preset = FORMATS[format].preset if preset is None else preset
    values = _values(format, preset, dict(settings or {}))
    located = _find(source, format, file)
    _warn_of_averages(located.weights)
    model, size, taken = _build(format, located, key, values)
    kind = kind_of(model)
    assert kind is not None
    if licence is None and preset is not None:
        licence = FORMATS[format].licences.get(preset)
    if images is None:
        count = 8 if size <= 64 else 4  # a large network takes a second or more for one
        images = dead_leaves(count, size, kind.image_channels(model))
        images_are = f"synthetic images (dead leaves, {size} px)"
    judged = kind.judge(model, images, images_are)
    details = {
        "purifyloader": __version__,
        "converted": {
            "format": format,
            "preset": preset,
            "settings": as_json(values),
            "source": located.provenance(),
            "weights": taken,
            "licence": licence,
            "plausibility": judged.to_dict(),
        },
    }
    name = name or folder.resolve().name
    card = _card(name, kind, model, details)
    checkpoint.save(model, folder, name=name, card=card, details=details, overwrite=overwrite)
    for warning in judged.warnings:
        log.warning("%s: %s", folder, warning)
    return judged


def _values(format: str, preset: str | None, chosen: dict[str, Any]) -> Any:
    """The settings object of a format; None where it has none."""
    layout = FORMATS[format]
    if preset is not None and preset not in layout.presets:
        known = ", ".join(layout.presets) or "none: its files say everything"
        raise InputError(f"The presets of {format} are: {known}. Got {preset!r}.")
    base = None if preset is None else layout.presets[preset]
    if "timesteps" not in layout.takes:
        _read_schedule(chosen, base)
    if unknown := sorted(set(chosen) - set(layout.takes)):
        known, got = (", ".join(f"--{name.replace('_', '-')}" for name in names) for names in (layout.takes, unknown))
        raise InputError(f"The settings of {format} are: {known or 'none: its files say everything'}. Got {got}.")
    if layout.settings is None:
        return None
    if base is not None:
        # one of two that exclude each other replaces the other
        for one, other in (("heads", "head_channels"), ("head_channels", "heads")):
            if chosen.get(one) is not None and other in layout.takes:
                chosen.setdefault(other, None)
        return replace(base, **chosen)
    missing = [name for name in layout.needs if name not in chosen]
    if layout.settings is openai.OpenAISettings and not {"heads", "head_channels"} & set(chosen):
        missing.append("heads")
    if missing:
        pairs = {"heads": "--heads or --head-channels", "schedule": "--schedule and --timesteps"}
        words = [pairs.get(name, f"--{name.replace('_', '-')}") for name in missing]
        raise ConfigError(
            f"A file of {format} does not say how its weights are to be read: give --preset "
            f"({', '.join(layout.presets)}), or what it was trained with. Got neither a preset nor "
            f"{', '.join(words)}."
        )
    return layout.settings(**chosen)


_SCHEDULES: dict[str, Callable[[int], Schedule]] = {"cosine": CosineSchedule, "linear": LinearSchedule}


def _read_schedule(chosen: dict[str, Any], base: Any) -> None:
    """Put a `Schedule` in the place of its kind and T. T alone keeps the kind of the preset's."""
    if "timesteps" in chosen and "schedule" not in chosen:
        if (schedule := getattr(base, "schedule", None)) is None:
            raise ConfigError(
                f"--timesteps is the T of a schedule. Got {chosen['timesteps']!r} without --schedule: give it too."
            )
        chosen["schedule"] = schedule.kind
    if not isinstance(kind := chosen.get("schedule"), str):
        return
    if kind not in _SCHEDULES:
        raise ConfigError(f"--schedule must be one of {', '.join(_SCHEDULES)}. Got {kind!r}.")
    if (timesteps := chosen.pop("timesteps", None)) is None:
        raise ConfigError(
            f"A schedule has a number of timesteps, T. Got --schedule {kind} alone: give --timesteps too."
        )
    chosen["schedule"] = _SCHEDULES[kind](timesteps)


def as_json(values: Any) -> dict[str, Any] | None:
    """Describe a settings object as JSON, without what it leaves open; None for a format without settings."""
    if values is None:
        return None
    plain = {f.name: getattr(values, f.name) for f in fields(values)}
    return {k: v.config() if isinstance(v, Schedule) else v for k, v in plain.items() if v not in (None, "")}


def in_words(value: Any) -> str:
    """Describe a value of `as_json` for people."""
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key} {inner}" for key, inner in value.items() if key != "kind")
        return f"{value['kind']} ({rest})"
    return str(value).lower() if isinstance(value, bool) else str(value)


_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_USUAL = ("diffusion_pytorch_model", "model", "pytorch_model")
_SCHEDULER = "scheduler_config.json"


def _find(source: str | Path, format: str, file: str | None) -> _Source:
    path = as_path(source)
    if path.is_file() or (path.exists() and not path.is_dir()):
        if file is not None:
            raise InputError(f"--file names a file of a folder. Got the file {path} as SOURCE: leave --file out.")
        if format == "diffusers":  # its configuration lies beside it
            return _find(path.parent, format, path.name)
        return _Source(path.name, path)
    if path.is_dir():
        inside = (inner for pattern in ("*", "*/*") for inner in path.glob(pattern) if inner.is_file())
        names = sorted(inner.relative_to(path).as_posix() for inner in inside)
        weights, config, scheduler = _in_folder(path, _choose(names, format, file, str(path)))
        beside = path.resolve().parent / "scheduler" / _SCHEDULER
        if format == "diffusers" and scheduler is None and beside.is_file():  # the unet/ of a pipeline was given
            scheduler = beside
        return _Source(path.resolve().name, weights, config, scheduler)
    if isinstance(source, str) and path.suffix.lower() not in (*_WEIGHTS, *PICKLES) and hub.is_hub_id(source):
        repository, revision = hub.parse(source)
        hub.warn(source)
        chosen = _choose(hub.files(repository, revision), format, file, source)
        wanted = [name for name in chosen if name is not None]
        folder = hub.download(repository, revision, wanted)
        if chosen[0].endswith(INDEX):
            below = PurePosixPath(chosen[0]).parent
            parts = [str(below / part) for part in shards_of(folder / chosen[0])]
            folder = hub.download(repository, revision, [*wanted, *parts])
        return _Source(repository, *_in_folder(folder, chosen), commit=folder.name)
    raise InputError(
        f"SOURCE must be a file ({', '.join(_WEIGHTS)}), a folder, or owner/name on the hub. Got {str(source)!r}, "
        "which is none of these. Check the path."
    )


def _in_folder(folder: Path, chosen: tuple[str, str | None, str | None]) -> tuple[Path, Path | None, Path | None]:
    config, scheduler = (None if name is None else folder / name for name in chosen[1:])
    return folder / chosen[0], config, scheduler


def _choose(names: Sequence[str], format: str, file: str | None, what: str) -> tuple[str, str | None, str | None]:
    """Choose the weights, the configuration and the scheduler's among the files of a folder or repository."""

    def there(name: str) -> str | None:
        return name if name in names else None

    root = "unet/" if format == "diffusers" and "unet/config.json" in names else ""
    config = there(f"{root}config.json")
    scheduler = there(f"{root}{_SCHEDULER}") or there(f"scheduler/{_SCHEDULER}") if format == "diffusers" else None
    if file is not None:
        if (own := there(f"{PurePosixPath(file).parent}/config.json")) is not None:
            config = own
        if file not in names:
            shown = listed([n for n in names if n.endswith(_WEIGHTS)]) or "no weights"
            raise InputError(f"--file must be a file of {what}. Got {file!r}; it has {shown}.")
        return file, config, scheduler
    here = [name for name in names if name.startswith(root) and "/" not in name.removeprefix(root)]
    # safetensors before any pickle
    for suffixes in ((".safetensors",), _WEIGHTS[1:]):
        weights = _without_shards([name for name in here if name.lower().removesuffix(INDEX).endswith(suffixes)], what)
        usual = [name for stem in _USUAL for name in weights if PurePosixPath(name.removesuffix(INDEX)).stem == stem]
        if len(weights) == 1 or usual:
            _check_alone((usual or weights)[0], names, format, what)
            return (usual or weights)[0], config, scheduler
        if weights:
            raise InputError(
                f"{what} must have one file of weights, or be told which. Got {listed(weights, 8)}: give "
                "one with --file."
            )
    if any(name.endswith(".pkl") for name in here):
        raise CheckpointError(
            f"{what} must have weights ({', '.join(_WEIGHTS)}). Got {listed([n for n in here if n.endswith('.pkl')])}: "
            "a .pkl of EDM or StyleGAN holds source code, and is refused."
        )
    raise InputError(
        f"{what} must have weights ({', '.join(_WEIGHTS)}). Got {listed(here or list(names)) or 'no files'}. Check the "
        "path, or give one in a folder below with --file."
    )


_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


def _without_shards(names: Sequence[str], what: str) -> list[str]:
    """Leave out the shards of weights that have an index; refuse those that have none."""
    whole = [name for name in names if not _SHARD.search(name)]
    indexed = {name.removesuffix(INDEX) for name in whole if name.endswith(INDEX)}
    for name in names:
        if (stem := _SHARD.sub(PurePosixPath(name).suffix, name)) != name and stem not in indexed:
            raise InputError(
                f"{what} has weights in shards, such as {name}, and not {stem}{INDEX}, which says what is in which: "
                "fetch that file too."
            )
    # a file that is there both whole and in shards is taken whole
    return [name for name in whole if not (name.endswith(INDEX) and name.removesuffix(INDEX) in whole)]


def _averages(chosen: str, names: Iterable[str]) -> list[str]:
    """Name the files that say that averaged weights are in them, where the chosen one does not."""
    if says_average(chosen):
        return []
    return [name for name in names if says_average(name) and PurePosixPath(name).suffix.lower() in _WEIGHTS]


def _check_alone(chosen: str, names: Sequence[str], format: str, what: str) -> None:
    """Refuse to take raw weights from a folder that also has averaged ones."""
    # whole pipelines of other libraries lie beside the folders of one of diffusers
    near = [name for name in names if "/" in name] if format == "diffusers" and "/" in chosen else names
    if averages := _averages(chosen, near):
        raise InputError(
            f"{what} must have one file of weights, or be told which. Got {chosen}, and {listed(averages, 4)}, whose "
            "name says that averaged weights are in it, which denoise best: give one with --file."
        )


def _warn_of_averages(path: Path) -> None:
    """Say that a raw file was asked for where an average lies beside it; accelerate gives those no names."""
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return
    if averages := _averages(path.name, names):
        log.warning("%s is taken, as asked; the average beside it, %s, denoises best", path, listed(averages, 4))
    elif others := [name for name in names if re.fullmatch(r"custom_checkpoint_\d+\.pkl", name)]:
        log.warning("%s is taken; %s beside it may hold averaged weights, which denoise best", path, listed(others, 4))


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be JSON. Got {error}. Download it again.") from None


_TRIED_PX = 128  # at most: what a network does with noise shows on a part of a large image


def _build(
    format: str, source: _Source, key: str | None, values: Any
) -> tuple[NetworkDenoiser | EnergyNetwork, int, str]:
    """Build the model; also a size of images to try it on, and where its weights were taken from."""
    read = read_file(source.weights)
    config = _read_json(source.config) if source.config is not None else None
    try:
        if format == "puregen-energy":
            taken = take(read, source.weights, key)
            return convert_energy(taken.weights, str(source.weights), config), 32, taken.where
        if format == "score-sde":
            shadow, model_state = _shadow(read, source.weights, key)
            model, where = (
                score_sde.denoiser_from_shadow(shadow, model_state, values),
                f"{_SHADOW!r} of {source.weights.name}",
            )
        else:
            taken = take(read, source.weights, key)
            model, where = _denoiser(format, source, values, taken, config), taken.where
    except CheckpointError as error:
        if str(source.weights) in str(error):
            raise
        raise CheckpointError(f"{source.weights}: {error}") from None
    except PurifyError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source.weights} and what lies beside it must be of {format}. Got values of another kind "
            f"({type(error).__name__}: {error!s:.200}): the files are damaged or edited. Download them again."
        ) from None
    size = config.get("sample_size") if isinstance(config, Mapping) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        size = max(32, 4 * model.network.config.size_multiple)
    return model, min(size, _TRIED_PX), where


def _denoiser(format: str, source: _Source, values: Any, taken: Taken, config: Any) -> NetworkDenoiser:
    weights = taken.weights
    if format != "diffusers":
        return openai.denoiser_from_state(weights, values)
    if config is None:
        raise CheckpointError(
            f"A diffusers folder has config.json beside its weights. Got none beside {source.weights}. Download it too."
        )
    scheduler = _read_json(source.scheduler) if source.scheduler is not None else None
    if scheduler is None and values.schedule is None:
        raise ConfigError(
            f"A diffusers folder says its schedule in {_SCHEDULER}. Got none in it or beside it: give --preset "
            f"({', '.join(FORMATS[format].presets)}), or --schedule and --timesteps."
        )
    return diffusers.denoiser_from_folder_parts(config, scheduler, weights, values)


_SHADOW = "ema.shadow_params"


def _shadow(read: Any, path: Path, key: str | None) -> tuple[Sequence[Tensor], Mapping[str, Tensor] | None]:
    if key not in (None, "ema", _SHADOW):
        raise InputError(f"score-sde takes the average, {_SHADOW}. Got --key {key}: leave it out.")
    ema = read.get("ema") if isinstance(read, Mapping) else None
    if not isinstance(ema, Mapping) or "shadow_params" not in ema:
        got = listed([str(name) for name in read], 12) if isinstance(read, Mapping) else type(read).__name__
        raise CheckpointError(
            f"{path} must hold a dict with the list ['ema']['shadow_params'], as score_sde saves it. Got {got}. Give "
            "the whole checkpoint, or another --format."
        )
    model = read.get("model")
    return ema["shadow_params"], model if isinstance(model, Mapping) else None


def _card(name: str, kind: ModelKind, model: NetworkDenoiser | EnergyNetwork, details: Mapping[str, Any]) -> str:
    converted = details["converted"]
    source, judged = converted["source"], converted["plausibility"]
    origin = f"`{source['name']}`" + (f" at commit `{source['commit']}`" if "commit" in source else "")
    rows = {
        **checkpoint.model_facts(model),
        "Converted from": f"{origin}, format {converted['format']}",
        "Weights": converted["weights"],
        **{f"SHA-256 of `{file}`": f"`{sha}`" for file, sha in source["files"].items()},
    }
    if converted["preset"] is not None:
        rows["Preset"] = f"`{converted['preset']}`"
    if converted["settings"]:
        plain = {key: value for key, value in converted["settings"].items() if key != "source"}
        rows["Read with"] = "; ".join(f"{key} {in_words(value)}" for key, value in plain.items())
        if "source" in converted["settings"]:
            rows["These settings are from"] = converted["settings"]["source"]
    rows["Licence"] = converted["licence"] or "not stated: see where the file is from"
    text = [
        f"# {name}",
        "",
        f"{kind.words[0].upper()}{kind.words[1:]} that others trained, converted by `purifyloader convert` "
        f"{details['purifyloader']}. Read it with",
        f"`purifyloader.pretrained.load(path_to_this_folder{kind.load_argument})`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
    ]
    if judged["psnr"]:
        text += [f"PSNR in dB before and after one network call, on {judged['images']}:", ""]
        text += ["| noise | noisy | denoised |", "|---|---|---|"]
        text += [f"| {r['sigma_px']:.3g} px | {r['noisy']:.2f} | {r['denoised']:.2f} |" for r in judged["psnr"]]
        text += [""]
    if judged["share_with_rising_energy"] is not None:
        share = 100 * judged["share_with_rising_energy"]
        text += [f"Noise of 25 px raises the energy of {share:.0f} % of {judged['images']}.", ""]
    if judged["warnings"]:
        text += ["**This conversion is doubtful.**", "", *(f"- {warning}" for warning in judged["warnings"]), ""]
    return "\n".join(text)
