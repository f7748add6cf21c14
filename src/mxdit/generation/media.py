"""Frames in and out: a first frame from an image file, an MP4 from frames."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mxdit.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: Path) -> Image:
    """An RGB image, turned as its EXIF says. Raises InputError for a file that is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), hint="Name an image.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            "not a readable image", where=str(path), got=str(error), expected="PNG, JPEG, WebP, ..."
        ) from None


def fit_size(image: Image, area: int, multiple: int) -> tuple[int, int]:
    """(height, width) in multiples of `multiple`, of about `area` pixels and the image's aspect, as Wan's own I2V script."""
    aspect = image.height / image.width
    height = round(math.sqrt(area * aspect)) // multiple * multiple
    width = round(math.sqrt(area / aspect)) // multiple * multiple
    return max(multiple, height), max(multiple, width)


def cover(image: Image, height: int, width: int) -> Image:
    """The image scaled to fill height x width, what stands over cut off evenly: never stretched."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


KINDS = (".mp4", ".png")


def check_kind(path: Path, frames: int) -> None:
    """Raise InputError where so many frames cannot be a file of this name."""
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise InputError("no kind of file that is written", where=str(path), expected=" or ".join(KINDS))
    if suffix == ".png" and frames != 1:
        raise InputError("a PNG holds one frame", where=str(path), got=frames, expected="a name that ends in .mp4")


def write(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames (n, height, width, 3) uint8 as an MP4, or one frame as a PNG, by the name's ending.

    The file appears whole or not at all. Raises InputError where it cannot be written.
    """
    check_kind(path, len(frames))
    if path.suffix.lower() == ".png":
        write_png(path, frames[0])
    else:
        write_mp4(path, frames, fps)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_png(path: Path, frame: np.ndarray) -> None:
    """Write one frame (height, width, 3) uint8."""
    from PIL import Image

    try:
        with _whole(path) as partial:
            Image.fromarray(frame).save(partial, "PNG")
    except OSError as error:
        raise InputError("the image could not be written", where=str(path), got=error.strerror or error) from None


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames (n, height, width, 3) uint8 as H.264, yuv420p, near-lossless (crf 12).

    The file appears whole or not at all. Height and width must be even, which all sizes of video models are. Of one macroblock
    (16 x 16) the same frames need not give the same bytes: x264 made other levels of some, 98 times in 10,000 and on one
    thread too; of 32 x 32 and 64 x 64, never.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    options = {"movflags": "faststart"}
    try:
        with _whole(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "medium"})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            # Players take untagged video for BT.709 from 720 lines up: convert to it and say so.
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            container.mux(stream.encode())
    except (OSError, av.FFmpegError) as error:
        raise InputError("the video could not be written", where=str(path), got=error.strerror or error) from None
