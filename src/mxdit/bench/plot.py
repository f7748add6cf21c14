"""The picture of ``mxdit bench gemm``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mxdit.bench.ceilings import Ceilings
from mxdit.bench.gemm import WHOLE, Row
from mxdit.bench.modes import MODES

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")


def gemm(path: Path, rows: Sequence[Row], best: Ceilings, title: str) -> None:
    """Draw, for every product, how many times as fast as torch's own each method's whole linear is, and below it the operations a
    second that it reaches, with the ceilings as lines. The file's ending says its kind: .png, .svg, .pdf.

    Of several implementations the fastest is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    products = list(dict.fromkeys(row.product for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    baseline = next(method for method in methods if method not in MODES)
    seconds = {}
    for row in rows:
        if WHOLE in row.parts:
            key = row.product, row.method
            seconds[key] = min(row.parts[WHOLE].times.median, seconds.get(key, float("inf")))
    figure = Figure(figsize=(max(7, 1.6 * len(products)), 8), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        drawn = [(i, p) for i, p in enumerate(products) if (p, method) in seconds]
        places = [i + (index - (len(methods) - 1) / 2) * width for i, _ in drawn]
        color = "#888888" if method == baseline else COLORS[(index - 1) % len(COLORS)]
        ratios = [seconds[p, baseline] / seconds[p, method] for _, p in drawn]
        upper.bar(places, ratios, width, label=method, color=color)
        lower.bar(places, [p.operations / seconds[p, method] / 1e12 for _, p in drawn], width, color=color)
    upper.axhline(1, color="black", linewidth=0.8)
    for ceiling, label, style in ((best.bf16, "BF16", "--"), (best.fp32, "FP32", ":")):
        lower.axhline(ceiling / 1e12, color="black", linewidth=0.8, linestyle=style)
        text = f"{label} matmul of {best.size}"
        lower.annotate(
            text, (1, ceiling / 1e12), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    upper.set_ylabel(f"times as fast as {baseline.upper()}, whole linear")
    lower.set_ylabel("TFLOP/s (2MNK a call), whole linear")
    lower.set_xticks(range(len(products)), [str(p).replace(" ", "\n") for p in products])
    upper.set_title(title)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), fontsize=8)
    figure.savefig(path, dpi=120)
