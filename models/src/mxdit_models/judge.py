"""Says what a clip shows: digit, colours, direction. It learns from rendered clips of scans the video model never saw.

Measurements are optical. The background is the plane that fits the border pixels; the digit is what differs from it; its
centroid gives the direction, its mean colour the colour, and a crop around the centroid goes to a support vector
machine trained on the "judge" scans. `python -m mxdit_models.judge` says how well it reads real clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from mxdit_models.digits import BACKGROUNDS, COLORS, DIRECTIONS, GLYPH, SIZE, Spec, render, sample_spec, scans

CROP = 40  # pixels around the centroid
THUMB = 14  # the classifier's input side
MARGIN = 3  # pixels of border that count as background


@dataclass(frozen=True)
class Reading:
    digit: int
    color: str
    background: str
    direction: str
    travel: float  # pixels from first to last frame along `direction`


def segment(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Split frames (n, 3, H, W) in [-1, 1] into digit opacity (n, H, W) in [0, 1] and background (n, 3, H, W)."""
    n = len(frames)
    axis = torch.linspace(-1, 1, SIZE)
    plane = torch.stack([torch.ones(SIZE, SIZE), axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)], -1)
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
    pixels = frames[:, :, border].transpose(1, 2)  # (n, border pixels, 3)
    # The digit can touch the border: fit only what is near the median.
    near = (pixels - pixels.median(1, keepdim=True).values).abs().amax(-1, keepdim=True) < 0.35
    basis = plane[border].expand(n, -1, -1) * near
    fit = torch.linalg.lstsq(basis, pixels * near).solution  # (n, 3 basis, 3 channels)
    background = (plane.view(1, -1, 3) @ fit).transpose(1, 2).unflatten(-1, (SIZE, SIZE))
    distance = (frames - background).square().sum(1).sqrt()
    peak = distance.flatten(1).quantile(0.98, dim=1).clamp(min=0.2)
    return ((distance / peak[:, None, None] - 0.25) / 0.5).clamp(0, 1), background


def centroids(opacity: Tensor) -> Tensor:
    """Centre of mass (n, 2) in pixels, x then y."""
    axis = torch.arange(SIZE) + 0.5
    mass = opacity.sum((1, 2)).clamp(min=1e-6)
    return torch.stack([(opacity.sum(1) * axis).sum(1), (opacity.sum(2) * axis).sum(1)], 1) / mass[:, None]


def thumbs(opacity: Tensor) -> np.ndarray:
    """Crops around the centroids, scaled to the classifier's input (n, THUMB * THUMB)."""
    centre = centroids(opacity) * 2 / SIZE - 1
    theta = torch.zeros(len(opacity), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = CROP / SIZE
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [len(opacity), 1, THUMB * 2, THUMB * 2], align_corners=False)
    crop = F.grid_sample(opacity[:, None], grid, align_corners=False)
    return F.avg_pool2d(crop, 2).flatten(1).numpy()


class Judge:
    def __init__(self, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        features, labels = self._frames(rng, "judge", 6000)
        self.classifier = SVC(C=10, gamma="scale").fit(features, labels)
        features, labels = self._frames(rng, "test", 1000)
        self.accuracy = float((self.classifier.predict(features) == labels).mean())  # on scans nobody trained on

    @staticmethod
    def _frames(rng: np.random.Generator, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        features, labels = [], []
        for _ in range(count // 50):
            specs = [sample_spec(rng) for _ in range(50)]
            frames = render(specs, rng, split, single=True)[:, :, 0]
            features.append(thumbs(segment(frames)[0]))
            labels += [s.digit for s in specs]
        return np.concatenate(features), np.array(labels)

    def read(self, clip: Tensor) -> Reading:
        """Read one clip (3, frames, H, W) in [-1, 1]."""
        frames = clip.transpose(0, 1)
        opacity, background = segment(frames)
        votes = self.classifier.predict(thumbs(opacity))
        core = (opacity > 0.9)[:, None].expand_as(frames)
        ink = torch.stack([frames.transpose(0, 1)[c][core[:, 0]].mean() for c in range(3)])
        moved = centroids(opacity)
        moved = moved[-1] - moved[0]
        direction = max(DIRECTIONS, key=lambda d: float(moved @ torch.tensor(DIRECTIONS[d])))
        return Reading(
            digit=int(np.bincount(votes, minlength=10).argmax()),
            color=nearest(ink, COLORS),
            background=nearest(background.mean((0, 2, 3)), BACKGROUNDS),
            direction=direction,
            travel=float(moved @ torch.tensor(DIRECTIONS[direction])),
        )


def nearest(color: Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float((color - (torch.tensor(palette[name]) / 127.5 - 1)).square().sum()))


def main() -> None:
    """Report how well the judge reads real clips of unseen scans."""
    judge = Judge()
    rng = np.random.default_rng(11)
    specs: list[Spec] = [sample_spec(rng) for _ in range(200)]
    right = {"digit": 0, "color": 0, "background": 0, "direction": 0}
    for spec, clip in zip(specs, render(specs, rng, "test"), strict=True):
        reading = judge.read(clip)
        for key in right:
            right[key] += getattr(reading, key) == getattr(spec, key)
    print(
        f"classifier on single frames of unseen scans: {judge.accuracy:.3f}; glyph {GLYPH} px; {len(scans('test')[1])} scans"
    )
    print({key: count / len(specs) for key, count in right.items()})


if __name__ == "__main__":
    main()
