"""How far one clip is from another. `mxdit.evals.metrics.definitions` says what each number is."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mxdit.backends.environment import one_thread
from mxdit.errors import InputError
from mxdit.evals.metrics.definitions import DISPLAY, PIXELS_PER_DEGREE, PSNR_CEILING

# What each needs beside numpy, and the extra of mxdit that brings it.
PACKAGES: Mapping[str, tuple[str, str]] = {
    "ssim": ("torchmetrics", "eval"),
    "ms_ssim": ("torchmetrics", "eval"),
    "cvvdp_jod": ("pycvvdp", "cvvdp"),
    "flip": ("flip_evaluator", "eval"),
}
VIDEO_METRICS = ("psnr_db", "ssim", "ms_ssim", "cvvdp_jod", "flip", "flicker", "flicker_ratio")
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al., 2003
WINDOW = 11  # pixels, SSIM
SMALL = 2**16  # pixels of a frame that threads are not worth
BATCH = 2**20  # pixels compared at once: small frames together, large ones one by one


@cache
def _package(name: str) -> Any:
    """The metric's package, or the reason why it cannot be imported, as text."""
    package, extra = PACKAGES[name]
    try:
        return importlib.import_module(package)
    # torchvision, which cvvdp imports, raises RuntimeError where it was built for another torch.
    except (ImportError, RuntimeError, OSError) as error:
        return f"{package} cannot be imported ({error}); it comes with `pip install mxdit[{extra}]`"


def unavailable() -> dict[str, str]:
    """The metrics that this installation cannot compute, each with the reason."""
    return {name: reason for name in PACKAGES if isinstance(reason := _package(name), str)}


def psnr_db(reference: np.ndarray, clip: np.ndarray) -> float:
    """PSNR in dB over all values of two uint8 arrays of one shape; `PSNR_CEILING` for equal ones, so that means exist."""
    # A frame at a time: a long clip's floats are gigabytes.
    squares = sum(
        float(np.square(a.astype(np.float32) - b).sum(dtype=np.float64)) for a, b in zip(reference, clip, strict=True)
    )
    return PSNR_CEILING if squares == 0 else min(PSNR_CEILING, 10 * math.log10(255**2 * reference.size / squares))


def video_metrics(
    reference: np.ndarray, clip: np.ndarray, fps: float, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Compare a clip with the reference.

    Args:
        reference, clip: (frames, height, width, 3) uint8 sRGB, height and width at least 11.
        fps: frames a second, which ColorVideoVDP's model of motion needs.
        names: of `VIDEO_METRICS`; None takes all that are available.

    Returns {name: value}, all finite. What a clip does not have is left out: flicker where there is one frame,
    flicker_ratio where the reference stands still.

    Raises InputError for arrays that are no pair of clips, an unknown name, and a named metric whose package is missing.
    """
    if reference.shape != clip.shape or reference.dtype != np.uint8 or clip.dtype != np.uint8:
        raise InputError(
            "the clips are no pair",
            got=f"{reference.shape} {reference.dtype} and {clip.shape} {clip.dtype}",
            expected="one shape, uint8",
        )
    if reference.ndim != 4 or reference.shape[3] != 3 or not len(reference) or min(reference.shape[1:3]) < WINDOW:
        raise InputError(
            "not a clip to measure",
            got=reference.shape,
            expected=f"(frames, height, width, 3), sides of {WINDOW} or more",
        )
    missing = unavailable()
    if names is None:
        names = [name for name in VIDEO_METRICS if name not in missing]
    for name in names:
        if name not in VIDEO_METRICS:
            raise InputError("no such video metric", got=name, expected=", ".join(VIDEO_METRICS))
        if name in missing:
            raise InputError(f"{name} is not available", got=missing[name])
    with one_thread() if math.prod(reference.shape[1:3]) < SMALL else nullcontext():
        return _measured(reference, clip, fps, names)


def _measured(reference: np.ndarray, clip: np.ndarray, fps: float, names: Sequence[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name in names:
        if name == "psnr_db":
            values[name] = psnr_db(reference, clip)
        elif name in ("ssim", "ms_ssim"):
            values[name] = _similarity(reference, clip, name)
        elif name == "cvvdp_jod":
            values[name] = _jod(reference, clip, fps)
        elif name == "flip":
            values[name] = _flip(reference, clip)
        elif len(clip) > 1:
            values |= _flicker(reference, clip, name)
    return values


def _similarity(reference: np.ndarray, clip: np.ndarray, name: str) -> float:
    image = importlib.import_module("torchmetrics.functional.image")
    side = min(reference.shape[1:3])
    # The window has to fit in the smallest scale; torchmetrics asks for sides of WINDOW (scales - 1)^2, too.
    scales = max(n for n in range(1, 6) if n == 1 or side >= WINDOW * max(2 ** (n - 1), (n - 1) ** 2))
    weights = tuple(weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales])
    total, batch = 0.0, max(1, BATCH // math.prod(reference.shape[1:3]))
    for first in range(0, len(clip), batch):
        a, b = (torch.from_numpy(x[first : first + batch]).permute(0, 3, 1, 2).float() for x in (reference, clip))
        if name == "ssim":
            value = image.structural_similarity_index_measure(b, a, data_range=255.0)
        else:
            value = image.multiscale_structural_similarity_index_measure(
                b, a, data_range=255.0, betas=weights, normalize="relu"
            )
        total += float(value) * len(a)
    return total / len(clip)


@cache
def _vision_model() -> Any:
    return _package("cvvdp_jod").cvvdp(display_name=DISPLAY, quiet=True)


def _jod(reference: np.ndarray, clip: np.ndarray, fps: float) -> float:
    with torch.inference_mode():
        return float(_vision_model().predict(clip, reference, dim_order="FHWC", frames_per_second=fps)[0])


def _flip(reference: np.ndarray, clip: np.ndarray) -> float:
    evaluate, options = _package("flip").evaluate, {"ppd": PIXELS_PER_DEGREE}
    frames = ((a.astype(np.float32) / 255, b.astype(np.float32) / 255) for a, b in zip(reference, clip, strict=True))
    return float(np.mean([evaluate(a, b, "LDR", applyMagma=False, parameters=options)[1] for a, b in frames]))


def _flicker(reference: np.ndarray, clip: np.ndarray, name: str) -> dict[str, float]:
    def changes(frames: np.ndarray) -> Any:
        return (after.astype(np.int16) - before for before, after in pairwise(frames))

    if name == "flicker":
        pairs = zip(changes(reference), changes(clip), strict=True)
        return {name: float(np.mean([np.abs(b - a).mean() for a, b in pairs]))}
    still, moved = (float(np.mean([np.abs(change).mean() for change in changes(x)])) for x in (reference, clip))
    return {name: moved / still} if still else {}
