"""Report curves and a proposed level, as tables and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from purifyloader.dynamics.tuning import COMPENSATED
from purifyloader.evaluation.report import few_changed, not_known
from purifyloader.results.table import plain

__all__ = ["proposal_table", "reasons", "table"]


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """List the lines that `purifyloader dynamics` prints."""
    purification, images, levels = results["purification"], results["images"], results["levels"]
    size = " × ".join(str(side) for side in reversed(images["shape"][1:]))
    yield (
        f"{purification['model']['name'] or 'A model'}, weights {purification['model']['weights_sha256'][:12]}: "
        f"{images['count']:,} images of {results['data']['description']}, {size} px"
    )
    yield from not_known(results["data"])
    unit = results["energy"]
    yield "Distances are means over images: l2 of images in [0, 1], and root mean square in px of 255."
    if unit is not None:
        yield f"Energies are medians of U = E / {unit['temperature']:g}: no unit and no zero, only differences count."
    by_t = purification["unit"] == "timestep t"
    first = "steps" if purification["kind"] == "langevin" else "t" if by_t else "noise"
    at = [f"{level['level']:g}" if first != "noise" else f"{level.get('sigma_px', 0):.3g} px" for level in levels]
    energies = [] if unit is None else ["energy"]
    yield ""
    yield "Clean images: how far they are moved, and the seconds that an image takes on this machine"
    rows = []
    for where, level in zip(at, levels, strict=True):
        cells = [where, *([f"{level.get('sigma_px', 0):.3g} px"] if by_t else [])]
        cells += [f"{level['calls']}", f"{level['seconds_per_image']:.3g}"]
        rows.append([*cells, *_both(level["clean_to_purified_clean"]), *_median(level["energy"])])
    yield from plain([first, *(["noise"] if by_t else []), "calls", "seconds", "l2 moved", "px moved", *energies], rows)
    for name, poison in results["poisons"].items():
        yield ""
        yield (
            f"{name}, {poison['size']['rms_px']:.3g} px RMS, at most {poison['largest_px']:.3g} px, in "
            f"{poison['images']:,} images:"
        )
        yield from few_changed({name: poison["images"]}, images["count"])
        yield "distance of the purified image from the clean and from the poisoned one; share of images closer to clean"
        rows = []
        for where, level in zip(at, levels, strict=True):
            measured = level["poisoned"][name]
            cells = [*_both(measured["clean_to_purified_poisoned"]), *_both(measured["poisoned_to_purified_poisoned"])]
            rows.append([where, *cells, f"{100 * measured['closer_to_clean']:.0f} %", *_median(measured["energy"])])
        yield from plain([first, "l2 to clean", "px to clean", "l2 to pois.", "px to pois.", "closer", *energies], rows)
        yield _crossing(poison["crossing"], first)


def _crossing(level: float | None, first: str) -> str:
    if level is None:
        return "On average it stays closer to the poisoned than to the clean image up to the last level."
    where = {"steps": f"{level:.0f} steps", "t": f"t = {level:.0f}", "noise": f"{255 * level:.1f} px"}[first]
    return f"On average it has come closer to the clean than to the poisoned image at {where}."


def _both(distance: Mapping[str, Any]) -> list[str]:
    return [f"{distance['l2']:.3f}", f"{distance['rms_px']:.2f}"]


def _median(energy: Mapping[str, Any] | None) -> list[str]:
    return [] if energy is None else [f"{energy['quantiles']['0.5']:,.5g}"]


def _level(record: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    unit = results["curves"]["purification"]["unit"]
    if unit == "Langevin steps":
        return f"{record['level']:g} Langevin steps"
    noise = f"{record['sigma_px']:.3g} px of noise"
    return f"t = {record['level']:g} ({noise})" if unit == "timestep t" else noise


def _closer(record: Mapping[str, Any], but: Sequence[str] = ()) -> str:
    shares = {name: attack["closer_to_clean"] for name, attack in record["attacks"].items() if name not in but}
    return ", ".join(f"{100 * share:.0f} % of {name}" for name, share in shares.items())


def reasons(results: Mapping[str, Any]) -> Iterator[str]:
    """Say in a few sentences with numbers why `tune` proposes its level."""
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
    alone = results["alone"]
    less = {name: level for name, level in alone.items() if level is not None and level["level"] < best["level"]}
    if less and len(less) < len(alone):
        worst = " and ".join(name for name in alone if name not in less)
        enough = " and ".join(f"{_level(level, results)} for {name}" for name, level in less.items())
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
    moved = {name: (attack["to_clean_px"], attack["to_clean_before_px"]) for name, attack in best["attacks"].items()}
    name, (after, before) = max(moved.items(), key=lambda pair: pair[1][0] - pair[1][1])
    if after > before:
        yield (
            f"Closer is relative: {name} images are {after:.3g} px from the clean ones once purified, and {before:.3g} "
            "px before, for clean detail goes with the poison. The criterion measures distances, not training"
            + ("." if compensated is not None else ": with compensation (compensate=Compensate()) less may do.")
        )
    if results["unpaired"] is not None:
        yield from _unpaired(results["unpaired"])


def _unpaired(compared: Mapping[str, Any]) -> Iterator[str]:
    kind = "removed_px" if compared["energy"] is None else "energy"
    before, after = compared[kind]["before"], compared[kind]["after"]
    above = "an energy above that of" if kind == "energy" else "more removed by the lowest level than"
    unusual = _unusual(before)
    head = "Before"
    if unusual is not None:
        head = f"Your data and the clean images are {'' if unusual else 'not told '}apart before"
    yield (
        f"{head}: an image of yours has {above} a clean one in {100 * before['auc']:.0f} % of pairs"
        f"{_range('of halves of the clean images', before['clean_auc'])}, and {100 * before['share_above']:.0f} % of "
        f"yours are above the clean ones' 99th percentile{_range('of halves', before['clean_share_above'])}. After "
        f"purification these are {100 * after['auc']:.0f} and {100 * after['share_above']:.0f} %."
    )
    if unusual == ["share_above"]:
        yield "The data as a whole is as usual, but a part of it is not: that part may be poisoned."


def _unusual(before: Mapping[str, Any]) -> list[str] | None:
    """List measures that are not as between halves of the clean images; None for one image, which has no halves."""
    if before["clean_auc"] is None:
        return None
    low, high = before["clean_auc"]
    unusual = [] if low <= before["auc"] <= high else ["auc"]
    # fewer images above than usual are no sign of a poison
    return unusual + (["share_above"] if before["share_above"] > before["clean_share_above"][1] else [])


def _range(what: str, among: Sequence[float] | None) -> str:
    return "" if among is None else f" ({what}, {100 * among[0]:.0f} to {100 * among[1]:.0f} %)"


def proposal_table(results: Mapping[str, Any], pasted: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """List the lines that `purifyloader tune` prints; `pasted` are lines for "proposal" and "with_compensation"."""
    curves = results["curves"]
    yield (
        f"{curves['purification']['model']['name'] or 'A model'}: {curves['images']['count']:,} clean images of "
        f"{curves['data']['description']}, attacked by "
        + ", ".join(f"{name} ({attack['size']['rms_px']:.3g} px RMS)" for name, attack in curves["poisons"].items())
    )
    yield from not_known(curves["data"])
    yield from few_changed(
        {name: each["images"] for name, each in curves["poisons"].items()}, curves["images"]["count"]
    )
    yield ""
    names, heads = list(curves["poisons"]), ["noise"] if "sigma_px" in results["best"] else []
    marks = {}
    for key, mark in (("with_compensation", "<- with compensation"), ("proposal", "<-")):
        if results[key] is not None:
            marks[results[key]["level"]] = mark
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
        yield from (f"    {line}" for line in pasted["proposal"])
    if (compensated := results["with_compensation"]) is not None:
        yield (
            f"Or, with compensation in training (PurifiedDataset(..., compensate=Compensate())): "
            f"{_level(compensated, results)}"
        )
        yield from (f"    {line}" for line in pasted["with_compensation"])
    yield ""
    for sentence in results["reasons"]:
        yield from wrap(sentence, 118)
