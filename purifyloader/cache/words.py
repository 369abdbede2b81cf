"""Say in words what a cache is, from what `purifyloader.cache.inspect.describe` finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from purifyloader.cache import format as fmt
from purifyloader.files.atomic import canonical_json

__all__ = ["count_in_words", "in_words", "size_in_words"]

_InWords = Callable[[Mapping[str, Any]], str]

_CHANNELS = {1: "grey", 2: "grey + alpha", 3: "RGB", 4: "RGBA"}


def size_in_words(size: int) -> str:
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB")) if size >= u), (10**3, "KB"))
    return f"{size / unit:,.1f} {name}"


def count_in_words(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_words(values: Mapping[str, Any], sanitation_in_words: _InWords) -> list[str]:
    """Write what `describe` found, as lines; `sanitation_in_words` writes one about a sanitation's JSON."""
    article = "an" if values["state"][0] in "aeiou" else "a"
    text = [f"{values['folder']}: {article} {values['state']} cache"]
    for name, lines in _sections(values, sanitation_in_words):
        text += [f"  {'' if number else name:<12} {line}" for number, line in enumerate(lines)]
    return text


def _sections(values: Mapping[str, Any], sanitation_in_words: _InWords) -> Iterator[tuple[str, list[str]]]:
    done, total = values["shards_done"], values["shards"]
    if total is not None:
        images = f"{values['images']:,} images"
        if done < total:
            images = f"{values['images_done']:,} of {images}"
        yield "images", [f"{images}, {_shape(values)}"]
        work = f", {values['shards_in_work']} in work now" if values["shards_in_work"] else ""
        yield "shards", [f"{done:,} of {total:,} there, of {values['shard_size']:,} images each{work}"]
    yield "on disk", [size_in_words(values["bytes"])]
    if total is None:
        yield "damaged", list(values["wrong"])
        return
    yield "draws", [f"{values['draws']}"]
    if values["recipe"] is None:
        yield "made by", [_value(values["config"])]
    else:
        yield "recipe", _recipe(values["recipe"])
        yield "seed", [f"{values['seed']}"]
    source = values["source"]
    length = f"{values['images']:,} samples"
    lines = [f"{source['class']}, {length}" if source["class"] else length]
    if source["sha256"] is not None:
        lines.append(f"images {source['sha256']['images'][:12]}, targets {source['sha256']['targets'][:12]}")
    yield "source", lines
    yield "samples", [f"{_sample(values['sample'])}; targets {'stored' if values['targets'] else 'not stored'}"]
    if values["classes"] is not None:
        yield "classes", [f"{values['classes']:,}"]
    yield "made with", [_made(made, len(values["made"]) > 1) for made in values["made"]]
    yield "plan", ["yes" if values["plan"] else "no", *(fmt.plan_in_words(where) for where in values["where"])]
    if values["sanitation"] is not None:
        yield "sanitation", [sanitation_in_words(values["sanitation"])]
    yield "fingerprint", [values["fingerprint"] or "none before it is finished"]
    if values["wrong"] or values["missing"]:
        bad = [*(f"{name} (damaged)" for name in values["wrong"]), *(f"{name} (missing)" for name in values["missing"])]
        yield "damaged", [*bad, "precompute into the folder again: only these are made anew"]
    elif values["state"] == "unfinished":
        yield "to do", ["precompute into the folder again with the same options: what is there is kept"]
    if values["strangers"]:
        yield "not of it", values["strangers"]


def _shape(values: Mapping[str, Any]) -> str:
    if values["image_shape"] is None:
        return "of any sizes (png)" if values["encoding"] == "png" else values["encoding"]
    height, width, channels = values["image_shape"]
    return f"{width} × {height} px, {_CHANNELS[channels]} ({values['encoding']})"


def _sample(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return "of different structures, or not noted"
    if sample["type"] == "image":
        return "bare images"
    if sample["type"] == "dict":
        return f"dicts, image under {sample['image']!r}"
    return f"{sample['type']}s of {sample['fields']}, image at {sample['image']}"


def _made(made: Mapping[str, Any], several: bool) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in sorted(made.items()) if key not in ("device", "shards"))
    shards = f" ({made['shards']:,} shards)" if several else ""
    return f"{made.get('device', 'unknown device')}: {versions or 'versions not noted'}{shards}"


def _recipe(config: Mapping[str, Any]) -> list[str]:
    """Describe a purifier, a line a stage; what a stage repeats or cuts up is indented below it."""
    values = {key: value for key, value in config.items() if value is not None}
    kind = str(values.pop("kind", "unknown"))
    stages = values.pop("stages", None)
    if kind == "chain" and isinstance(stages, list):
        return [line for stage in stages for line in _recipe(stage)]
    inner = values.pop("purifier", None)
    condition = values.pop("condition", None)
    network = values.pop("denoiser", None) or values.pop("energy", None)
    values.pop("planned", None)  # has a line of its own
    pixels = values.pop("sigma_px", None)
    if pixels is not None:  # the same, for people
        values.pop("sigma", None)
        values = {"sigma": f"{pixels:g} px", **values}
    step = values.pop("step_px", None)
    if step is not None:
        values["step_size"] = f"{step:g} px"
    lines = [f"{kind}: " + ", ".join(f"{key} {_value(value)}" for key, value in values.items()) if values else kind]
    if isinstance(network, Mapping):
        name = network.get("name") or "unnamed or not noted"
        lines.append(f"  model {name}, weights {str(network.get('weights_sha256'))[:12]}")
    for below in (condition, inner):
        if isinstance(below, Mapping):
            lines += [f"  {line}" for line in _recipe(below)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind")
        rest = ", ".join(f"{key} {_value(v)}" for key, v in value.items() if key != "kind")
        return f"{kind} ({rest})" if kind is not None and rest else str(kind or f"({rest})")
    return value if isinstance(value, str) else canonical_json(value)
