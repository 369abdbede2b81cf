"""Report an evaluation as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from purifyloader.results.table import plain

__all__ = ["few_changed", "not_known", "table"]


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """List the lines that the command prints."""
    model, images, settings, levels = (results[key] for key in ("model", "images", "settings", "levels"))
    calls = "one network call" if settings["steps"] == 1 else f"{settings['steps']} network calls"
    size = " × ".join(str(side) for side in reversed(images["shape"][1:]))
    yield (
        f"{model['name'] or 'A denoiser'}, weights {model['weights_sha256'][:12]}: {images['count']:,} images of "
        f"{results['data']['description']}, {size} px, {calls} an image"
    )
    yield from not_known(results["data"])
    yield ""
    yield "PSNR in dB (± standard error)"
    heads = {"denoiser": "denoiser", "one_call": "one call", "noised": "as it is", "jpeg10": "JPEG-10"}
    heads = {key: head for key, head in heads.items() if key in levels[0]["psnr_db"]}
    rows = []
    for level in levels:
        cells = {key: f"{level['psnr_db'][key]['mean']:.2f}" for key in heads}
        if error := level["psnr_db"]["denoiser"]["standard_error"]:
            cells["denoiser"] += f" ± {error:.2f}"
        rows.append([f"{level['sigma_px']:.3g} px", *cells.values()])
    yield from plain(["noise", *heads.values()], rows)
    if settings["calibrate"]:
        yield ""
        yield from _calibration(levels)
    if levels[0]["poisoned"]:
        yield ""
        yield "Poisoned: RMS removed (px), share of the pattern left, and whether the removed energy tells poison (AUC)"
        yield from few_changed({name: each["images"] for name, each in levels[0]["poisoned"].items()}, images["count"])
        names = list(levels[0]["poisoned"])
        heads_ = [head for name in names for head in (f"from {_short(name)}", "left", "AUC")]
        rows = []
        for level in levels:
            row = [f"{level['removed_px']['mean']:.2f}"]
            for name in names:
                attack = level["poisoned"][name]
                row.append(f"{attack['removed_px']['mean']:.2f}")
                row += [f"{attack['remaining']['mean']:.3f}", f"{attack['auc']:.3f}"]
            rows.append([f"{level['sigma_px']:.3g} px", *row])
        yield from plain(["noise", "from clean", *heads_], rows)


def not_known(data: Mapping[str, Any]) -> Iterator[str]:
    """Say that a model does not tell what it was trained on: no image was left out for that."""
    if not data.get("trained_on_known", True):
        yield "Whether it was trained on some of these images is not known."


def _short(name: str) -> str:
    """Cut an attack with options to its name, and what else is long to its end, which says most of a path."""
    first, options, _ = name.partition(" ")
    return first[:9] if options else name[-9:]


def few_changed(changed: Mapping[str, int], count: int) -> Iterator[str]:
    """Say which attacks changed some of the images only: what is measured of poisoned images is of these."""
    for name, number in changed.items():
        if number < count:
            yield f"{name} has changed {number:,} of the {count:,} images, and these alone are measured as poisoned."


def _calibration(levels: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Calibration: RMS error of one call and the one it claims (px); a ratio above 1 is too sure of itself"
    rows = []
    for level in levels:
        values = level["calibration"]
        claimed, ratio = values["claimed_px"], values["error_over_claimed"]["mean"]
        cells = ["-" if claimed is None else f"{claimed:.2f}", "-" if ratio is None else f"{ratio:.3f}"]
        rows.append([f"{level['sigma_px']:.3g} px", f"{values['error_px']:.2f}", *cells])
    yield from plain(["noise", "error", "claimed", "ratio"], rows)
