"""The plots of a report, each as (PNG for Markdown, SVG for HTML)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mxdit.evals.pages.reading import Row
from mxdit.models import SPECS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with every kind of color vision. Marks and dashes tell the same without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
EXPERTS = {"transformer": "high-noise expert", "transformer_2": "low-noise expert"}


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKS[i % len(MARKS)], "linestyle": DASHES[i % len(DASHES)]}


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    # Not pyplot: it keeps every figure alive, and picks a backend by the machine.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Figure) -> tuple[bytes, bytes]:
    """PNG and SVG; the SVG's text stays text, and the same figure gives the same bytes."""
    import matplotlib

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mxdit"}):
        figure.savefig(png, format="png", dpi=130)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def steps(rows: Sequence[Row]) -> Figure | None:
    """Velocity error (teacher-forced) and latent error (free running) over the steps, a line a mode; None without either."""
    panels = [
        (name, title)
        for name, title in (
            ("velocity_error", "Velocity error, on BF16's latents"),
            ("latent_error", "Latent error, running free"),
        )
        if any(name in step for row in rows for step in row.mode["steps"])
    ]
    if not panels:
        return None
    figure = canvas(12, 5)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    shown = [row for row in rows if not row.reference]
    for axis, (name, title) in zip(axes, panels, strict=True):
        for i, row in enumerate(shown):
            points = [(step["step"] + 1, step[name]) for step in row.mode["steps"] if name in step]
            points = [point for point in points if point[1]["mean"] > 0]  # a log scale has no zero
            if not points:
                continue
            x = [step for step, _ in points]
            axis.plot(
                x, [value["mean"] for _, value in points], label=row.label, markersize=4, linewidth=1.6, **_style(i)
            )
            if points[0][1]["lo"] is not None:
                low, high = ([value[key] for _, value in points] for key in ("lo", "hi"))
                axis.fill_between(x, low, high, color=COLORS[i % len(COLORS)], alpha=0.15, linewidth=0)
        axis.set(yscale="log", title=title, xlabel="step", ylabel="relative L2 error (lower is better)")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _boundary(axis, rows[0].mode["steps"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _boundary(axis: Any, steps: Sequence[dict[str, Any]]) -> None:
    """Mark where the second expert takes over, and name both."""
    experts = [step["expert"] for step in steps]
    change = next((i for i in range(1, len(experts)) if experts[i] != experts[i - 1]), None)
    if change is None:
        return
    axis.axvline(change + 0.5, color="#555555", linewidth=1.2, linestyle=(0, (2, 2)))
    for text, side, offset in ((experts[change - 1], "right", -5), (experts[change], "left", 5)):
        axis.annotate(
            EXPERTS.get(text, text),
            (change + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(offset, -12),
            textcoords="offset points",
            ha=side,
            fontsize=9,
            color="#333333",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def layers(rows: Sequence[Row]) -> Figure | None:
    """SQNR of every quantized linear by its block, a panel for each mode and expert; None without layers."""
    shown = [row for row in rows if row.mode["layers"]]
    experts = list(dict.fromkeys(layer["expert"] for row in shown for layer in row.mode["layers"]))
    if not shown:
        return None
    experts.sort()
    kinds = sorted({_place(layer["path"])[1] for row in shown for layer in row.mode["layers"]}, key=_order)
    groups = sorted({_order(kind)[0] for kind in kinds})
    figure = canvas(12, 1.1 + 2.0 * len(shown))
    axes = figure.subplots(len(shown), len(experts), squeeze=False, sharex=True, sharey=True)
    for line, row in zip(axes, shown, strict=True):
        for axis, expert in zip(line, experts, strict=True):
            for kind in kinds:
                found = [
                    (_place(layer["path"])[0], layer["sqnr_db"])
                    for layer in row.mode["layers"]
                    if layer["expert"] == expert and _place(layer["path"])[1] == kind
                ]
                if found:
                    # What belongs together has one color; its members have their own marks.
                    group = _order(kind)[0]
                    alike = [name for name in kinds if _order(name)[0] == group]
                    mark = MARKS[alike.index(kind) % len(MARKS)]
                    aside = 0.6 * (
                        kinds.index(kind) / max(len(kinds) - 1, 1) - 0.5
                    )  # so that marks do not hide each other
                    x, y = np.array(sorted(found)).T
                    axis.plot(
                        x + aside,
                        y,
                        mark,
                        color=COLORS[groups.index(group) % len(COLORS)],
                        label=kind,
                        markersize=5.5,
                        alpha=0.85,
                    )
            of = f" · {EXPERTS.get(expert, expert)}" if len(experts) > 1 else ""
            axis.set_title(f"{row.label}{of}", fontsize=10)
            axis.grid(alpha=0.3, linewidth=0.5)
            axis.xaxis.get_major_locator().set_params(integer=True)
        line[0].set_ylabel("SQNR, dB ↑")
    for axis in axes[-1]:
        axis.set_xlabel("block")
    named = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _place(path: str) -> tuple[int, str]:
    """(block, kind) of a linear: "blocks.3.attn1.to_q" is (3, "attn1.to_q"); one outside the blocks is in block -1.

    Lists of blocks other than a family's first number theirs anew, so the list is in the kind.
    """
    for spec in SPECS.values():
        place = spec.place_of(path)
        if place:
            return place.index, place.inside if place.blocks == spec.blocks[0] else f"{place.blocks}.{place.inside}"
    return -1, path


def _order(kind: str) -> tuple[str, str]:
    return kind.partition(".")[0], kind


def distribution(rows: Sequence[Row], metric: str, title: str) -> Figure | None:
    """Every video's value, a row a mode, with the quartiles as a box; None where there are none."""
    shown = [row for row in rows if not row.reference and row.values(metric)]
    if not shown:
        return None
    figure = canvas(12, 1.1 + 0.55 * len(shown))
    axis = figure.subplots()
    spread = np.random.default_rng(0)
    for i, row in enumerate(shown):
        values = np.array(list(row.values(metric).values()))
        height = len(shown) - 1 - i
        axis.boxplot(
            values,
            positions=[height],
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            medianprops={"color": "black", "linewidth": 2},
        )
        color = COLORS[i % len(COLORS)]
        axis.plot(values, height + spread.uniform(-0.18, 0.18, len(values)), ".", color=color, alpha=0.6, markersize=7)
    axis.set_yticks(range(len(shown)), [row.label for row in reversed(shown)])
    axis.set_xlabel(title)
    axis.grid(alpha=0.3, axis="x", linewidth=0.5)
    return figure
