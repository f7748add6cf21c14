"""The report of an evaluation: `report.html`, one file to hand on, and `report.md` with its pictures beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mxdit.evals.metrics.definitions import DEFINITIONS
from mxdit.evals.metrics.statistics import LEAST
from mxdit.evals.metrics.video_metrics import VIDEO_METRICS
from mxdit.evals.pages import figures, sheets
from mxdit.evals.pages.document import Picture, Section, Table, Text, html, markdown
from mxdit.evals.pages.reading import ARROWS, HEADLINES, Row, best, cell, number, reading, rows_of, share_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Clips = Callable[[str, int], np.ndarray]
LEVELS = (
    ("video", "The videos against BF16's"),
    ("meaning", "What the videos show"),
    ("model", "Inside the model"),
)
WORST_LAYERS = 10  # of each mode, in the table


def write_report(results: Mapping[str, Any], clips: Clips, out: Path) -> None:
    """Write out/report.html and out/report.md, with what the latter shows beside it.

    Args:
        results: an evaluation, schema 1, two modes or more.
        clips: (name of a mode, index of a sample) -> that video (frames, height, width, 3) uint8. A few are asked for.
        out: a directory; it is made.
    """
    rows = rows_of(results)
    out.mkdir(parents=True, exist_ok=True)
    model, settings = results["model"], results["settings"]
    title = f"What quantizing costs: {model['name']}"
    prompts, seeds = _count(settings["groups"], "prompt"), _count(len(settings["seeds"]), "seed")
    lead = (
        f"{settings['samples']} videos ({prompts}, {seeds} each), {model['task'].upper()}, "
        f"{settings['width']} x {settings['height']}, {settings['frames']} frames, {settings['steps']} steps, made in "
        f"{len(results['modes'])} modes with the same prompts, seeds and schedule, and compared with BF16. "
        "A range under a number is its 95 % bootstrap interval over the prompts; there is none where fewer than "
        f"{LEAST} prompts were measured, nor for SQNR, whose mean is over the linears."
    )
    sections = [
        Section("What the numbers say", [Text.of(*reading(results, rows)), _glance(results, rows)]),
        Section("Where the error comes in", _plots(results, rows)),
        Section("What it looks like", _pictures(results, rows, clips)),
        *_details(results, rows),
        Section("The worst linears", [_worst_layers(rows)], folded=True),
        Section("How this was measured", _method(results)),
    ]
    sections = [section for section in sections if section.blocks]
    (out / "report.html").write_text(html(title, lead, sections), encoding="utf-8")
    (out / "report.md").write_text(markdown(title, lead, sections, out), encoding="utf-8")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(results: Mapping[str, Any], rows: Sequence[Row], names: Sequence[str], sizes: bool, note: str) -> Table:
    about = results["metrics"]
    units = {name: about[name]["unit"] for name in names}
    head = ["mode", *(["weights\nMiB", "of BF16"] if sizes else [])]
    head += [
        f"{about[name]['title']}{ARROWS[about[name]['better']]}"
        + (f"\n{units[name]}" if units[name] not in ("", "share") else "")
        for name in names
    ]
    table, marked = [], set()
    for i, row in enumerate(rows):
        line = [row.label]
        if sizes:
            line += [f"{row.mode['weights_bytes'] / 2**20:.1f}", share_of(row, rows[0])]
        table.append([*line, *(cell(row, name, units[name]) for name in names)])
        for j, name in enumerate(names):
            if i in best(rows, name, about[name]):
                marked.add((i, len(line) + j))
    return Table(head, table, frozenset(marked), note)


def _glance(results: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    names = [name for name in HEADLINES if name in results["metrics"]]
    note = (
        "↑ higher is better, ↓ lower is better; bold is the best quantized mode of a column. Weights are all tensors of the "
        "experts. Modes joined by = have the same weights and schemes and so the same results, computed once."
    )
    return _table(results, rows, names, True, note)


def _details(results: Mapping[str, Any], rows: Sequence[Row]) -> list[Section]:
    """A table for each level, with the definitions under it."""
    sections = []
    for level, title in LEVELS:
        # The layers' and the trajectory's few numbers stand with the model's.
        levels = ("layer", "model", "trajectory") if level == "model" else (level,)
        names = [name for name, about in results["metrics"].items() if about["level"] in levels]
        if names:
            shown = rows if any(name in rows[0].mode["summary"] for name in names) else rows[1:]
            table = _table(results, shown, names, False, "")
            sections.append(Section(title, [table, _definitions(results, shown, names)]))
    return sections


def _definitions(results: Mapping[str, Any], rows: Sequence[Row], names: Sequence[str]) -> Table:
    lines = []
    for name in names:
        about = results["metrics"][name]
        counts = sorted({row.mode["summary"][name]["n"] for row in rows if name in row.mode["summary"]})
        n = " to ".join(str(count) for count in {counts[0]: 0, counts[-1]: 0}) if counts else "-"
        better = {"higher": "higher", "lower": "lower", None: "neither"}[about["better"]]
        lines.append([about["title"], about["definition"], about["unit"] or "ratio", better, n, about["source"]])
    return Table(["number", "is", "unit", "better", "n", "source"], lines, words=frozenset({1, 5}))


def _plots(results: Mapping[str, Any], rows: Sequence[Row]) -> list[Text | Table | Picture]:
    about = results["metrics"]
    drawn: list[tuple[str, Figure | None, str]] = [
        (
            "steps.png",
            figures.steps(rows),
            f"Error of each mode by step, on a logarithmic scale; shades are 95 % intervals, of {LEAST} prompts or more. **Velocity error:** every mode is "
            "given BF16's latents at each step, so this is what the step itself adds. **Latent error:** every mode runs on from "
            "its own latents, so errors add up. At a dotted line the low-noise expert takes over.",
        )
    ]
    for metric in ("psnr_db", "cvvdp_jod"):
        if metric in about:
            title = f"{about[metric]['title']}, {about[metric]['unit']} (higher is better)"
            caption = (
                f"{about[metric]['title']} of every video against BF16's: a dot each; the box holds the middle half, "
                "the line in it is the median. Dots far to the left are the videos that changed most."
            )
            drawn.append((f"{metric}.png", figures.distribution(rows, metric, title), caption))
    caption = (
        "Signal to noise of every quantized linear on inputs from real steps, by block. Each color is a part of the block, "
        "each mark one of its linears; low marks are the linears to keep in BF16 first. Linears outside the blocks stand at -1."
    )
    drawn.append(("layers.png", figures.layers(rows), caption))
    pictures = []
    for name, figure, caption in drawn:
        if figure is not None:
            png, svg = figures.rendered(figure)
            pictures.append(Picture(name, png, caption, svg))
    return pictures


def _pictures(results: Mapping[str, Any], rows: Sequence[Row], clips: Clips) -> list[Text | Table | Picture]:
    """The typical and the worst video in every mode, and the worst one of each mode."""
    quantized = [row for row in rows if row.values("psnr_db")]
    if not quantized:
        return []
    indices = set.intersection(*(set(row.values("psnr_db")) for row in quantized))
    means = {i: float(np.mean([row.values("psnr_db")[i] for row in quantized])) for i in indices}
    ranked = sorted(indices, key=lambda i: (means[i], i))
    typical, worst = ranked[len(ranked) // 2], ranked[0]
    chosen = {typical: "The typical video (the median of the modes' mean PSNR)", worst: "The video that changed most"}
    own = {row.label: min(row.values("psnr_db").items(), key=lambda item: (item[1], item[0]))[0] for row in quantized}
    name = rows[0].mode["name"]
    needed = [*((row, i) for row in quantized for i in chosen), *((row, own[row.label]) for row in quantized)]
    factor = sheets.amplification((clips(name, i), clips(row.mode["name"], i)) for row, i in needed)
    blocks: list[Text | Table | Picture] = [
        Text.of(
            f"Frames are evenly spaced. Difference maps show the largest difference of the three color channels, times {factor}: "
            f"black is equal, pale yellow is {255 // factor} of 255 levels and more, the same in all maps of this report."
        )
    ]
    fps = round(results["settings"]["fps"])
    for i, what in chosen.items():
        lines = [(rows[0].label, clips(name, i), None)]
        lines += [(_caption(row, i), clips(row.mode["name"], i), clips(name, i)) for row in quantized]
        about = f"**{what}:** {_about(rows[0], i)}."
        blocks.append(Picture(f"video-{i}.png", sheets.sheet(lines, factor), about))
        video = [(rows[0].label, clips(name, i)), *((row.label, clips(row.mode["name"], i)) for row in quantized)]
        blocks.append(Picture(f"video-{i}.mp4", sheets.side_by_side(video, fps), "The same video, all modes in step."))
    lines, shown = [], None
    for row in sorted(quantized, key=lambda row: own[row.label]):
        i = own[row.label]
        if i != shown:
            lines.append((f"{rows[0].label}: {_about(rows[0], i)}", clips(name, i), None))
        lines.append((_caption(row, i), clips(row.mode["name"], i), clips(name, i)))
        shown = i
    caption = "**The worst video of each mode** (lowest PSNR), under BF16's."
    blocks.append(Picture("worst.png", sheets.sheet(lines, factor), caption))
    return blocks


def _sample(row: Row, index: int) -> Mapping[str, Any]:
    return next(sample for sample in row.mode["samples"] if sample["index"] == index)


def _about(row: Row, index: int) -> str:
    sample = _sample(row, index)
    prompt = sample["prompt"] if len(sample["prompt"]) <= 90 else f"{sample['prompt'][:87]}..."
    return f"“{prompt}”, seed {sample['seed']}"


def _caption(row: Row, index: int) -> str:
    """A row's label on a sheet: PSNR, and what the judge read where that is not what was asked."""
    sample = _sample(row, index)
    text = f"{row.label}: {number(sample['psnr_db'], 'dB')} dB"
    meaning = sample.get("meaning")
    if meaning:
        wrong = [key for key, asked in meaning["asked"].items() if meaning["read"].get(key) != asked]
        text += "".join(f"; {key} {meaning['read'].get(key)}, asked {meaning['asked'][key]}" for key in wrong)
    return text


def _worst_layers(rows: Sequence[Row]) -> Table:
    lines = [
        [row.label, layer["expert"], layer["path"], " x ".join(map(str, layer["shape"])), f"{layer['sqnr_db']:.2f}"]
        for row in rows
        for layer in row.mode["layers"][:WORST_LAYERS]
    ]
    return Table(["mode", "expert", "linear", "out x in", "SQNR ↑\ndB"], lines, words=frozenset({1, 2}))


def _method(results: Mapping[str, Any]) -> list[Text | Table | Picture]:
    settings, model, environment = results["settings"], results["model"], results["environment"]
    guidance = settings["guidance"]
    if settings["guidance_2"] is not None and settings["guidance_2"] != guidance:
        guidance = f"{guidance:g} and {settings['guidance_2']:g} (high and low noise)"
    boundary = "" if model["boundary_ratio"] is None else f", boundary ratio {model['boundary_ratio']}"
    missing = [DEFINITIONS[metric].title for metric in VIDEO_METRICS if metric not in results["metrics"]]
    facts = [
        f"Model `{model['path']}` ({model['name']}){boundary}, guidance {guidance}, "
        f"{settings['fps']:g} frames a second; {results['seconds']:.0f} s in all.",
        f"Layer and model level: the first {_count(settings['probe_samples'], 'video')}; all else: all {settings['samples']}.",
        "Intervals resample whole prompts (of I2V with their images) with all their seeds, 2000 times. Differences between modes are taken video by "
        "video first. “Worse” and “better” mean that the interval of that difference leaves 0 out. A share of 100 % has an "
        "interval without width, which is not certainty.",
        "Environment: " + "; ".join(f"{key} {_plain(value)}" for key, value in environment.items()) + ".",
    ]
    if missing:
        facts.append(f"Not measured here: {', '.join(missing)}.")
    modes = Table(
        [
            "mode",
            "weights",
            "activations",
            "scale rule",
            "attention",
            "fused",
            "quantized",
            "linears quantized",
            "kept",
            "seconds",
        ],
        [
            [
                mode["name"],
                str(mode["method"] or "bf16"),
                str(mode["activation"] or "bf16") + (" but for some steps" if mode.get("activation_steps") else ""),
                str(mode["rule"] or "-"),
                str(mode.get("attention", "torch")),
                "yes" if mode.get("fused") else "no",
                "not" if mode["how"] == "float" else str(mode["how"]),
                str(mode["layers_quantized"]),
                str(mode["layers_kept"]),
                f"{mode['seconds']:.0f}",
            ]
            for mode in results["modes"]
        ],
        words=frozenset(range(1, 7)),
    )
    return [Text(tuple(facts)), modes]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    return str(value)
