"""What the results say: rows of modes, numbers as text, and the sentences at the top of a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxdit.evals.metrics.statistics import difference

HEADLINES = ("psnr_db", "ssim", "cvvdp_jod", "velocity_error", "digit")  # the columns of the first table
COMPARED = ("psnr_db", "cvvdp_jod", "digit")  # what decides whether a mode is worse than a cheaper one
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
ACTIVATION_BITS = {"mxfp4": 4, "mxfp8": 8, "bf16": 16}


@dataclass(frozen=True)
class Row:
    """Modes that compute the same, as one: `mode` is the first of them, `label` names them all."""

    mode: Mapping[str, Any]
    label: str
    reference: bool

    @property
    def cost(self) -> tuple[int, int]:
        """(bytes of the weights, bits of the activations): less of either is cheaper."""
        activations = (self.mode["activation"] or "bf16").split(", ")  # several, where linears differ
        return self.mode["weights_bytes"], max(ACTIVATION_BITS[name] for name in activations)

    def values(self, metric: str) -> dict[int, float]:
        """Sample index -> value, for the samples that have one."""
        return {sample["index"]: sample[metric] for sample in self.mode["samples"] if metric in sample}


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """One row for each set of modes that compute the same, BF16 first."""
    rows = []
    for i, mode in enumerate(results["modes"]):
        if mode.get("same_as"):
            continue
        words = mode["name"].split()
        label = mode["name"]
        for other in results["modes"]:
            if other.get("same_as") == mode["name"]:
                parts = other["name"].split()
                label += f" = {parts[-1] if parts[:-1] == words[:-1] else other['name']}"
        rows.append(Row(mode, label, i == 0))
    return rows


def number(value: float, unit: str, metric: str = "", *, sign: bool = False) -> str:
    """A value without its unit; a share as a percentage."""
    if unit == "share":
        return f"{100 * value:{'+' if sign else ''}.1f} %"
    digits = 2 if unit else 5 if metric.endswith("cosine") else 4
    return f"{value:{'+' if sign else ''}.{digits}f}"


def cell(row: Row, metric: str, unit: str) -> str:
    """Mean, and its interval, if it has one, on a second line; a dash where the mode has no mean."""
    found = row.mode["summary"].get(metric)
    if found is None:
        return "-"
    between = span(found, unit, metric)
    return number(found["mean"], unit, metric) + (f"\n{between}" if between else "")


def span(found: Mapping[str, Any], unit: str, metric: str = "", *, sign: bool = False) -> str:
    """The interval as text; empty where there is none."""
    if found["lo"] is None:
        return ""
    low, high = (number(found[key], unit, metric, sign=sign) for key in ("lo", "hi"))
    return f"{low} to {high}"


def best(rows: Sequence[Row], metric: str, about: Mapping[str, Any]) -> set[int]:
    """Indices of the quantized rows whose mean, as it is shown, is the best one; none where all are alike."""
    if about["better"] is None:
        return set()
    means = {
        i: row.mode["summary"][metric]["mean"]
        for i, row in enumerate(rows)
        if not row.reference and metric in row.mode["summary"]
    }
    if not means:
        return set()
    top = (max if about["better"] == "higher" else min)(means.values())
    found = {
        i for i, mean in means.items() if number(mean, about["unit"], metric) == number(top, about["unit"], metric)
    }
    return found if len(found) < len(means) else set()


def paired(a: Row, b: Row, metric: str) -> dict[str, Any] | None:
    """How much more `a` has of a metric than `b`, over the samples that both have; None where there are none."""
    left, right = a.values(metric), b.values(metric)
    shared = [i for i in left if i in right]
    if not shared:
        return None
    groups = {sample["index"]: sample["group"] for sample in a.mode["samples"]}
    return difference([left[i] for i in shared], [right[i] for i in shared], groups=[groups[i] for i in shared])


def _less(gap: Mapping[str, Any] | None) -> bool:
    """Whether a difference is measurably below 0."""
    return gap is not None and gap["hi"] is not None and gap["hi"] < 0


def _more(gap: Mapping[str, Any] | None) -> bool:
    return gap is not None and gap["lo"] is not None and gap["lo"] > 0


def share_of(row: Row, reference: Row) -> str:
    """Bytes of the experts against BF16's."""
    return f"{row.mode['weights_bytes'] / reference.mode['weights_bytes']:.2f}"


def reading(results: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What a reader should take from the numbers, a sentence or two each."""
    about, reference, quantized = results["metrics"], rows[0], [row for row in rows if not row.reference]
    return [
        *_verdict(quantized, reference, about),
        *_costs(quantized, about),
        *_meaning(quantized, reference, about),
        *(_facts(row, reference, about) for row in quantized),
        *_layers(quantized),
    ]


def _verdict(quantized: Sequence[Row], reference: Row, about: Mapping[str, Any]) -> list[str]:
    """Which mode is closest to BF16, which is the smallest, and what lies between them."""
    measured = [row for row in quantized if "psnr_db" in row.mode["summary"]]
    if len(measured) < 2:
        return []
    closest = max(measured, key=lambda row: row.mode["summary"]["psnr_db"]["mean"])
    smallest = min(measured, key=lambda row: (row.cost, -row.mode["summary"]["psnr_db"]["mean"]))
    if closest is smallest:
        return [f"**{closest.label}** is both the closest to BF16 and the smallest."]
    gaps = {metric: paired(smallest, closest, metric) for metric in COMPARED if metric in about}
    said = "; ".join(_gap(metric, gap, about[metric]) for metric, gap in gaps.items() if gap)
    return [
        f"**Closest to BF16: {closest.label}**, with {share_of(closest, reference)} of its bytes. **Smallest: "
        f"{smallest.label}**, with {share_of(smallest, reference)}. From the first to the second: {said}."
    ]


def _facts(row: Row, reference: Row, about: Mapping[str, Any]) -> str:
    parts = []
    for metric in ("psnr_db", "cvvdp_jod", "flip"):
        if found := row.mode["summary"].get(metric):
            title, unit = about[metric]["title"], about[metric]["unit"]
            between = f" ({span(found, unit)})" if span(found, unit) else ""
            parts.append(f"{title} {number(found['mean'], unit)} {unit}{between}".replace("  ", " "))
    total = row.mode["layers_quantized"] + row.mode["layers_kept"]
    parts.append(
        f"{share_of(row, reference)} of BF16's bytes, {row.mode['layers_quantized']} of {total} linears quantized"
    )
    return f"**{row.label}**: {'; '.join(parts)}."


def _costs(quantized: Sequence[Row], about: Mapping[str, Any]) -> list[str]:
    """Modes that a cheaper one, or one of the same cost, beats or equals; nothing where the videos are too few to tell."""
    lines, told = [], False
    for row in quantized:
        for other in quantized:
            if other is row or not all(a <= b for a, b in zip(other.cost, row.cost, strict=True)):
                continue
            gaps = {metric: paired(row, other, metric) for metric in COMPARED if metric in about}
            gaps = {metric: gap for metric, gap in gaps.items() if gap and gap["lo"] is not None}
            told |= bool(gaps)
            worse = [metric for metric, gap in gaps.items() if _less(gap)]
            better = [metric for metric, gap in gaps.items() if _more(gap)]
            sizes = f"{other.cost[0] / 2**20:.1f} MiB against {row.cost[0] / 2**20:.1f}"
            if other.cost == row.cost:
                cost = "which costs the same"
            elif other.cost[0] == row.cost[0]:
                cost = f"which costs less ({other.cost[1]}-bit activations against {row.cost[1]})"
            else:
                cost = f"which costs less ({sizes})"
            if worse:
                said = "; ".join(_gap(metric, gaps[metric], about[metric]) for metric in worse)
                but = f", though better by {_titles(better, about)}" if better else ""
                lines.append(f"**{row.label} is worse than {other.label}**, {cost}: {said}{but}.")
            elif not better and other.cost != row.cost and gaps:
                said = _titles(list(gaps), about)
                lines.append(f"{row.label} is not measurably better than {other.label}, {cost}, by {said}.")
    return lines if lines or not told else ["No mode is worse than a cheaper one."]


def _gap(metric: str, gap: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    between = span(gap, about["unit"], metric, sign=True)
    unit = {"share": "points", "": ""}.get(about["unit"], about["unit"])
    text = f"{about['title']} {number(gap['mean'], about['unit'], metric, sign=True)} {unit}"
    return (text.rstrip() + (f" ({between})" if between else "")).replace(" %", "").replace("  ", " ")


def _titles(metrics: Sequence[str], about: Mapping[str, Any]) -> str:
    return ", ".join(about[metric]["title"] for metric in metrics)


def _meaning(quantized: Sequence[Row], reference: Row, about: Mapping[str, Any]) -> list[str]:
    names = [name for name, metric in about.items() if metric["level"] == "meaning" and metric["unit"] == "share"]
    changed, judged = [], False
    for row in quantized:
        for name in names:
            gap = paired(row, reference, name)
            judged |= gap is not None and gap["lo"] is not None
            if gap is not None and (_less(gap) or _more(gap)):
                changed.append(f"{row.label}: {_gap(name, gap, about[name])}")
    if not judged:
        return []
    shown = reference.mode["summary"]
    base = ", ".join(f"{about[n]['title'].lower()} {number(shown[n]['mean'], 'share')}" for n in names if n in shown)
    if changed:
        return [f"Against BF16 ({base}) what the clips show changes measurably for {'; '.join(changed)}."]
    return [f"What the clips show is as asked about as often as with BF16 ({base}): no mode differs measurably."]


def _layers(quantized: Sequence[Row]) -> list[str]:
    parts = []
    for row in quantized:
        if layers := row.mode["layers"]:
            first, middle = layers[0], statistics.median(layer["sqnr_db"] for layer in layers)
            parts.append(f"{row.label} `{first['expert']}.{first['path']}` ({first['sqnr_db']:.1f}; {middle:.1f})")
    return [f"The worst linear of each mode (its SQNR in dB; the mode's median): {', '.join(parts)}."] if parts else []
