"""`make demo`: the same two clips in every mode, beside BF16.

    python tools/demo.py OUT

Writes OUT/*.mp4, OUT/contact_sheet.png (rows: modes; columns: frames), OUT/table.md and OUT/results.json, and prints the
table. Each mode runs in a process of its own, so that peak memory is its own. "online" quantizes the bundled BF16 model
while it loads and saves it; "offline" loads what "online" saved, and must give the same pixels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.image import structural_similarity_index_measure

from mxdit.backends.carrier import note
from mxdit.generation import directory, loading, media
from mxdit.generation.session import Session

METHODS = ("mxfp8", "mxfp4", "mxfp4_dualscale")
MODES = ("bf16", *(f"{method} {how}" for method in METHODS for how in ("online", "offline")))
TASKS = ("t2v", "i2v")
SHOWN = (0, 4, 8, 12, 16)  # frames on the contact sheet
CELL = 112  # pixels


def work(task: str, mode: str, scratch: Path) -> None:
    """One mode of one task, in this process; leaves frames and figures in `scratch`."""
    method, _, how = mode.partition(" ")
    loading.show_loading(False)
    saved = scratch / f"{task}-{method}"
    source = saved if how == "offline" else directory.bundled(task)
    session = Session.open(source, task=task, method=method if how == "online" else None)
    image = media.read_image(directory.bundled(task).parent / "first_frame.png") if task == "i2v" else None
    started = time.perf_counter()
    session.load()
    load_seconds = time.perf_counter() - started
    result = session.run(session.request(image=image))
    np.save(scratch / f"{task}-{mode}.npy", result.frames)
    reports = session.reports()
    figures = {
        "experts": {name: loading.summary(report) for name, report in reports.items()},
        "bytes": sum(report.bytes_after for report in reports.values()),
        "file_bytes": sum(f.stat().st_size for f in source.rglob("*.safetensors") if f.parent.name.startswith("trans")),
        "peak_bytes": result.peak_bytes,
        "load_seconds": load_seconds,
        "step_seconds": float(np.median(result.step_seconds)),
        "seconds": result.seconds,
        "fps": result.request.fps,
        "prompt": result.request.prompt,
    }
    (scratch / f"{task}-{mode}.json").write_text(json.dumps(figures))
    if how == "online":
        session.load().save_pretrained(saved)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB over all pixels of two uint8 clips; inf for equal ones."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean SSIM over the frames of two uint8 clips (torchmetrics, 11x11 Gaussian window)."""
    left, right = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (a, b))
    return float(structural_similarity_index_measure(left, right, data_range=255.0))


def contact_sheet(clips: dict[tuple[str, str], np.ndarray]) -> Image.Image:
    """One row a mode: its frames of the T2V clip, then of the I2V clip."""
    margin, top = 190, 40
    width = margin + len(TASKS) * (len(SHOWN) * CELL + 16)
    sheet = Image.new("RGB", (width, top + len(MODES) * (CELL + 4)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, task in enumerate(TASKS):
        left = margin + column * (len(SHOWN) * CELL + 16)
        draw.text((left, 10), f"{task.upper()}: frames {', '.join(map(str, SHOWN))}", "black", font)
        for row, mode in enumerate(MODES):
            y = top + row * (CELL + 4)
            draw.text((8, y + CELL // 2 - 8), mode, "black", font)
            for i, frame in enumerate(SHOWN):
                cell = Image.fromarray(clips[task, mode][frame]).resize((CELL - 2, CELL - 2), Image.Resampling.NEAREST)
                sheet.paste(cell, (left + i * CELL, y))
    return sheet


def table(figures: dict[tuple[str, str], dict[str, Any]], clips: dict[tuple[str, str], np.ndarray]) -> str:
    """A Markdown table, one row a mode."""
    head = ["mode"]
    for task in TASKS:
        head += [f"{task.upper()} PSNR dB", f"{task.upper()} SSIM"]
    head += ["linears MiB", "experts' files MiB", "peak memory MiB", "load s", "ms/step", "clip s"]
    rows = [head, ["---"] * len(head)]
    for mode in MODES:
        row = [mode]
        for task in TASKS:
            clip, reference = clips[task, mode], clips[task, "bf16"]
            row += ["-", "-"] if mode == "bf16" else [f"{psnr(clip, reference):.2f}", f"{ssim(clip, reference):.4f}"]
        runs = [figures[task, mode] for task in TASKS]
        row += [f"{runs[0][key] / 2**20:.2f}" for key in ("bytes", "file_bytes")]
        peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"]]
        row.append(f"{max(peaks) / 2**20:.0f}" if peaks else "-")
        load, step, whole = (
            sum(run[key] for run in runs) / len(runs) for key in ("load_seconds", "step_seconds", "seconds")
        )
        row += [f"{load:.2f}", f"{1000 * step:.1f}", f"{whole:.2f}"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        fill = "-" if row[0] == "---" else " "
        lines.append("| " + " | ".join(cell.ljust(width, fill) for cell, width in zip(row, widths, strict=True)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--work", nargs=3, metavar=("TASK", "MODE", "SCRATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], args.work[1], Path(args.work[2]))
        return

    if why := note(torch.bfloat16, "cpu"):
        print(f"note: {why}; what is not quantized takes that long here, in all modes", flush=True)
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    clips, figures = {}, {}
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".scratch-") as folder:
        scratch = Path(folder)
        for task in TASKS:
            for mode in MODES:
                begun = time.perf_counter()
                subprocess.run([sys.executable, __file__, str(args.out), "--work", task, mode, folder], check=True)
                clips[task, mode] = np.load(scratch / f"{task}-{mode}.npy")
                figures[task, mode] = json.loads((scratch / f"{task}-{mode}.json").read_text())
                name = f"{task}-{mode.replace(' ', '-')}.mp4"
                media.write_mp4(args.out / name, clips[task, mode], figures[task, mode]["fps"])
                print(f"{name}  {time.perf_counter() - begun:.1f} s", flush=True)

    differing = [
        f"{task} {method}"
        for task in TASKS
        for method in METHODS
        if not np.array_equal(clips[task, f"{method} online"], clips[task, f"{method} offline"])
    ]
    contact_sheet(clips).save(args.out / "contact_sheet.png")
    text = table(figures, clips)
    prompts = "; ".join(f"{task.upper()} “{figures[task, 'bf16']['prompt']}”" for task in TASKS)
    equal = f"NO: {', '.join(differing)}" if differing else "yes, every frame of every method"
    text += f"\n\n{prompts}. PSNR and SSIM against BF16. Offline gives the pixels of online: {equal}.\n"
    (args.out / "table.md").write_text(text)
    results = {f"{task} {mode}": value for (task, mode), value in figures.items()}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{text}\n{args.out}/: done in {time.perf_counter() - started:.0f} s")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
