"""Pictures of the videos: contact sheets with difference maps, and clips side by side."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mxdit.generation.media import write_mp4

FRAMES = 5  # of a clip on a sheet
TILE = 112  # pixels, least width of a frame on a sheet; larger clips are shown up to twice as wide
CLIP = 240  # pixels, width of one clip in a side-by-side video
LABEL = 22  # pixels of text over a row
CONTROLS = 48  # pixels under a clip, which a player's buttons cover
FACTORS = (1, 2, 4, 8, 16)


def amplification(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """The largest of 1, 2, 4, 8, 16 that leaves 99 % of the (reference, clip) differences within the map's range."""
    worst = max((float(np.percentile(_difference(a, b), 99)) for a, b in pairs), default=0.0)
    return max(factor for factor in FACTORS if factor == 1 or factor * worst <= 255)


def _difference(reference: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Largest absolute difference of the three channels, in levels."""
    return np.abs(clip.astype(np.int16) - reference).max(-1)


def difference_map(reference: np.ndarray, frame: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) uint8: black where equal, over purple and orange to pale yellow at 255 / `factor` levels and more."""
    import matplotlib

    amount = np.clip(_difference(reference, frame) * factor, 0, 255).astype(np.uint8)
    return (matplotlib.colormaps["inferno"](amount)[..., :3] * 255).round().astype(np.uint8)


def resized(frame: np.ndarray, width: int) -> Image.Image:
    """A frame in this width, or a little more: by whole pixels where it grows, averaged where it shrinks."""
    image = Image.fromarray(frame)
    if width >= image.width:
        factor = math.ceil(width / image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def sheet(rows: Sequence[tuple[str, np.ndarray, np.ndarray | None]], factor: int) -> bytes:
    """A PNG: one line a row of (label, clip, reference): five frames, and their difference maps where there is a reference."""
    clip = rows[0][1]
    picks = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int))
    width = min(2 * TILE, max(TILE, clip.shape[2]))
    tile = resized(clip[0], width)
    step, gap = tile.width + 3, 14
    canvas = Image.new("RGB", (2 * len(picks) * step + gap, len(rows) * (tile.height + LABEL + 4)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for i, (label, frames, reference) in enumerate(rows):
        top = i * (tile.height + LABEL + 4)
        draw.text((0, top + 2), label, "black", font)
        if i == 0:
            draw.text((len(picks) * step + gap, top + 2), f"difference from BF16, x {factor}", "black", font)
        for j, pick in enumerate(picks):
            canvas.paste(resized(frames[pick], width), (j * step, top + LABEL))
            if reference is not None:
                amount = difference_map(reference[pick], frames[pick], factor)
                canvas.paste(resized(amount, width), ((len(picks) + j) * step + gap, top + LABEL))
    stream = io.BytesIO()
    canvas.save(stream, "png", optimize=True)
    return stream.getvalue()


def side_by_side(clips: Sequence[tuple[str, np.ndarray]], fps: int) -> bytes:
    """An MP4 of labelled clips, up to four in a line, that run in step."""
    font = ImageFont.load_default(13)
    sample = resized(clips[0][1][0], CLIP)
    lines = math.ceil(len(clips) / 4)
    columns = math.ceil(len(clips) / lines)
    width, height = (sample.width + 8) * columns, (sample.height + LABEL) * lines + CONTROLS
    frames = []
    for i in range(len(clips[0][1])):
        canvas = Image.new("RGB", (width + width % 2, height + height % 2), "white")  # H.264 needs even sides
        draw = ImageDraw.Draw(canvas)
        for place, (label, clip) in enumerate(clips):
            left, top = place % columns * (sample.width + 8), place // columns * (sample.height + LABEL)
            draw.text((left, top + 3), label, "black", font)
            canvas.paste(resized(clip[i], CLIP), (left, top + LABEL))
        frames.append(np.asarray(canvas))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.mp4"
        write_mp4(path, np.stack(frames), fps)
        return path.read_bytes()
