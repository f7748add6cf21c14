"""A calibration's report as one HTML file: what was accepted and why, each linear before and after, what a budget buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mxdit.evals.pages import figures, sheets
from mxdit.evals.pages.document import Picture, Section, Table, Text, html

BUDGETS = {  # factor and axis of each
    "parameters": (100, "parameters in BF16, %"),
    "bytes": (2**-20, "weights of the blocks, MiB"),
    "time": (1, "time of the blocks' linears"),
}
Shown = Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]]  # (prompt, (label, clip) of each) of some clips


def page(report: Mapping[str, Any], clips: Shown, fps: int) -> str:
    """The whole document.

    Args:
        report: from `report.report_of`.
        clips: some prompts, with the clips (frames, height, width, 3) uint8 that are compared; the first is the float model's.
        fps: frames a second.
    """
    recipe, asked = report["settings"]["recipe"], report["settings"]["prompts"]
    lead = (
        f"{recipe['method']}, steps {', '.join(recipe['steps'])}; learned from {asked['fit']} prompts and judged by "
        f"{asked['held']} others. " + ("**Accepted.**" if report["accepted"] else "**Rejected.**")
    )
    sections = [
        Section("Guards", [_guards(report)]),
        Section("Linears, step by step", [_steps(report), _before_and_after(report)]),
        Section("What more bits buy", _budget(report)),
        Section("Clips", _clips(clips, fps)),
        Section("Every linear", [_linears(report)], folded=True),
    ]
    return html("Calibration", lead, [section for section in sections if section.blocks])


def _guards(report: Mapping[str, Any]) -> Table:
    rows = [
        [guard["what"], guard["online"], guard["calibrated"], "pass" if guard["passed"] else "REJECT", guard["why"]]
        for guard in report["guards"]
    ]
    failed = frozenset((i, 3) for i, guard in enumerate(report["guards"]) if not guard["passed"])
    return Table(
        ("", "online", "calibrated", "verdict", "rule"),
        rows,
        failed,
        "Online is the same method without calibration. Errors are of velocities on the float model's latents, of prompts that "
        "nothing was learned from.",
        frozenset({0, 4}),
    )


def _steps(report: Mapping[str, Any]) -> Table:
    rows = [
        [f"{expert}: {row['step']}", f"{row['kept']} of {row['tried']}", f"{row['sqnr_db']:.2f}", row["why_not"]]
        for expert, done in report["steps"].items()
        for row in done
    ]
    return Table(
        ("after", "kept on", "mean SQNR\ndB", "why not on all"),
        rows,
        note="A step stays on a linear only where it lowers the error on held-out inputs.",
        words=frozenset({0, 3}),
    )


def _before_and_after(report: Mapping[str, Any]) -> Picture:
    figure = figures.canvas(12, 5)
    axis = figure.subplots()
    for i, (expert, found) in enumerate(report["linears"].items()):
        points = np.array([(linear["online"], linear["error"]) for linear in found.values()])
        decibels = -10 * np.log10(np.maximum(points, 1e-30))
        axis.plot(*decibels.T, figures.MARKS[i], color=figures.COLORS[i], label=expert)
    ends = axis.get_xlim()
    axis.plot(ends, ends, color="#555555", linewidth=1, linestyle=":", label="no change")
    axis.set(xlabel="SQNR online, dB", ylabel="SQNR calibrated, dB")
    axis.legend(frameon=False)
    return _picture(
        "linears.png", figure, "Each linear's error on held-out inputs, before and after; higher is better."
    )


def _budget(report: Mapping[str, Any]) -> list[Text | Table | Picture]:
    blocks: list[Text | Table | Picture] = []
    plan = report["plan"]
    lines = [
        f"{plan['parameters_in_bf16']:.1%} of the blocks' parameters in BF16, {plan['bytes'] / 2**20:.1f} MiB; predicted error "
        f"{plan['predicted_error']:.1%} of what it is without."
    ]
    for name, what in (("kept", "in BF16"), ("w4a8", "with MXFP8 activations")):
        lines += [f"**{expert}** {what}: `{', '.join(paths)}`" for expert, paths in report[name].items() if paths]
    if lines[1:]:
        blocks.append(Text(tuple(lines)))
    panels = [name for name in ("curve", "gains_by_step") if report[name]]
    if panels:
        figure = figures.canvas(12, 4.5)
        axes: Sequence[Any] = figure.subplots(1, len(panels), squeeze=False)[0]
        for name, axis in zip(panels, axes, strict=True):
            if name == "curve":
                share, error = np.array(report["curve"]).T
                factor, label = BUDGETS[report["curve_of"]]
                axis.plot(factor * share, 100 * error, color=figures.COLORS[0])
                axis.set(xlabel=label, ylabel="predicted error, % of nothing bought", ylim=(0, 103))
            else:
                chosen = [step for steps in (report["activation_steps"].get("mxfp8", ()),) for step in steps]
                gains = {int(step): gain for step, gain in report["gains_by_step"].items()}
                colors = [figures.COLORS[1 if step in chosen else 0] for step in gains]
                axis.bar(list(gains), list(gains.values()), color=colors)
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.set(xlabel="denoising step", ylabel="error that MXFP8 activations take away")
            axis.grid(alpha=0.3, linewidth=0.5)
        says = {
            "curve": "What a budget leaves of the error.",
            "gains_by_step": "What each step gains; chosen steps in orange.",
        }
        blocks.append(_picture("budget.png", figure, " ".join(says[name] for name in panels)))
    return blocks


def _clips(clips: Shown, fps: int) -> list[Text | Table | Picture]:
    blocks: list[Text | Table | Picture] = []
    for i, (prompt, labelled) in enumerate(clips):
        reference = labelled[0][1]
        factor = sheets.amplification((reference, clip) for _, clip in labelled[1:])
        rows = [(label, clip, None if clip is reference else reference) for label, clip in labelled]
        blocks.append(Picture(f"sheet{i}.png", sheets.sheet(rows, factor), prompt))
        blocks.append(Picture(f"clips{i}.mp4", sheets.side_by_side(labelled, fps), prompt))
    return blocks


def _linears(report: Mapping[str, Any]) -> Table:
    steps = list(
        dict.fromkeys(
            t["step"] for of in report["linears"].values() for linear in of.values() for t in linear["trials"]
        )
    )
    rows = []
    for expert, found in report["linears"].items():
        for path, linear in found.items():
            tried = {trial["step"]: trial for trial in linear["trials"]}
            cells = [
                f"{_decibels(tried[step]['error'])}{'' if tried[step]['kept'] else ' no'}\n{tried[step]['note']}"
                if step in tried
                else "-"
                for step in steps
            ]
            rows.append([f"{expert}: {path}", *cells, "yes" if linear["kept_in_bf16"] else ""])
    return Table(("linear", *steps, "BF16"), rows, note="SQNR in dB; 'no' where a step was not kept.")


def _decibels(error: float) -> str:
    return f"{-10 * np.log10(max(error, 1e-30)):.2f}"


def _picture(name: str, figure: Any, caption: str) -> Picture:
    png, svg = figures.rendered(figure)
    return Picture(name, png, caption, svg)
