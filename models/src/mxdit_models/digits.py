"""Moving handwritten digits with captions, rendered on the fly.

The digits are scikit-learn's `load_digits`: 1797 real 8x8 scans (UCI Optical Recognition of Handwritten Digits).
One scan keeps one shape through its clip; the clip moves it over a coloured background in one of four directions.
Three disjoint splits by scan index: "train" teaches the video model, "judge" teaches the classifier that scores it,
"test" is seen by neither and gives the images for I2V and the judge's own accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 64  # pixels, height and width
FRAMES = 17
GLYPH = 32.0  # pixels, nominal side of a digit
NEAR = 0.25  # `spread` of the clips that the experts end on and are judged by

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (225, 45, 45),
    "green": (50, 185, 75),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 55),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
BACKGROUNDS = {
    "black": (18, 18, 18),
    "gray": (125, 125, 125),
    "blue": (45, 85, 225),
    "green": (50, 185, 75),
    "brown": (115, 75, 40),
    "white": (240, 240, 240),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": 12.0, "quickly": 26.0}  # pixels of travel over the clip


@dataclass(frozen=True)
class Spec:
    """What a caption says, and all that it says."""

    digit: int
    color: str
    direction: str
    speed: str
    background: str

    @property
    def caption(self) -> str:
        return f"{self.caption_without_speed.removesuffix(self._scene)} {self.speed}{self._scene}"

    @property
    def caption_without_speed(self) -> str:
        return f"a {self.color} {DIGITS[self.digit]} moving {self.direction}{self._scene}"

    @property
    def _scene(self) -> str:
        return f" on a {self.background} background"


@cache
def scans(split: str) -> tuple[Tensor, np.ndarray]:
    """Scans of one split: images (n, 8, 8) fp32 in [0, 1], labels (n,)."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    index = {"train": order[:1100], "judge": order[1100:1500], "test": order[1500:]}[split]
    return torch.from_numpy(data.images[index] / 16.0).float(), data.target[index]


@cache
def heldout_specs() -> tuple[Spec, ...]:
    """Captions that no expert is trained on: up to 32 of each digit, digits in turn."""
    rng = np.random.default_rng(7)
    rest = list(product(COLORS, DIRECTIONS, SPEEDS, BACKGROUNDS))
    rest = [r for r in rest if r[0] != r[3]]
    picks = [rng.permutation(len(rest))[:32] for _ in DIGITS]
    specs = (Spec(digit, *rest[picks[digit][i]]) for i in range(32) for digit in range(10))
    return tuple(spec for spec in specs if not _swappable(spec.color, spec.background))


def _swappable(color: str, background: str) -> bool:
    """Whether the two words could change places: "a white four on a blue background". A small text encoder mixes them up."""
    return color in BACKGROUNDS and background in COLORS


def sample_spec(rng: np.random.Generator, avoid: frozenset[Spec] = frozenset()) -> Spec:
    while True:
        color = str(rng.choice(list(COLORS)))
        background = str(rng.choice([b for b in BACKGROUNDS if not _swappable(color, b)]))
        direction, speed = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(SPEEDS)))
        spec = Spec(int(rng.integers(10)), color, direction, speed, background)
        if spec not in avoid:
            return spec


def render(
    specs: list[Spec],
    rng: np.random.Generator,
    split: str = "train",
    *,
    first: int = 0,
    frames: int = FRAMES,
    spread: float = 1.0,
    single: bool = False,
) -> Tensor:
    """Render one clip per spec, `frames` of its FRAMES from `first` on: (batch, 3, frames, SIZE, SIZE) fp32 in [-1, 1].

    What a caption leaves open is drawn from `rng`: the scan, its size and slant, where the path starts, and a light
    gradient over the background. A path never leaves the picture. `spread` scales how much of the free room its start, size
    and slant vary over.
    """
    images, labels = scans(split)
    n = len(specs)
    scan = torch.stack([images[rng.choice(np.flatnonzero(labels == s.digit))] for s in specs])
    side = torch.from_numpy(rng.uniform(1 - 0.08 * spread, 1 + 0.08 * spread, n)).float() * GLYPH
    slant = torch.from_numpy(rng.uniform(-0.15 * spread, 0.15 * spread, n)).float()
    travel = torch.tensor([SPEEDS[s.speed] for s in specs]) * torch.from_numpy(rng.uniform(0.9, 1.1, n)).float()
    step = torch.tensor([DIRECTIONS[s.direction] for s in specs])  # (n, 2) unit vectors x, y

    # The centre of the path stays where both its ends keep the digit inside the frame.
    reach = (step.abs() * travel[:, None] + GLYPH) / 2
    slack = (SIZE / 2 - reach).clamp(min=0)
    centre = torch.from_numpy(rng.uniform(-spread, spread, (n, 2))).float() * slack
    tilt = torch.from_numpy(rng.uniform(-0.08, 0.08, (n, 2))).float()
    time = torch.linspace(-0.5, 0.5, FRAMES)[first : first + frames].expand(n, -1)
    if single:
        time, frames = time.gather(1, torch.from_numpy(rng.integers(0, frames, n))[:, None]), 1
    path = centre[:, None] + step[:, None] * (travel[:, None] * time)[..., None]  # (n, frames, 2) pixels from centre

    # affine_grid maps output coordinates in [-1, 1] to the scan's: scale by SIZE/side, shear, then shift.
    zoom = (SIZE / side)[:, None].expand(n, frames)
    theta = torch.zeros(n, frames, 2, 3)
    theta[..., 0, 0] = zoom
    theta[..., 0, 1] = zoom * slant[:, None]
    theta[..., 1, 1] = zoom
    shift = path * (2 / SIZE)
    theta[..., 0, 2] = -zoom * (shift[..., 0] + slant[:, None] * shift[..., 1])
    theta[..., 1, 2] = -zoom * shift[..., 1]
    grid = F.affine_grid(theta.flatten(0, 1), [n * frames, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(scan[:, None].repeat_interleave(frames, 0), grid, mode="bicubic", align_corners=False)
    ink = ((ink - 0.22) / 0.45).clamp(0, 1)
    alpha = (ink * ink * (3 - 2 * ink)).unflatten(0, (n, frames)).transpose(1, 2)  # (n, 1, frames, H, W)

    front = torch.tensor([COLORS[s.color] for s in specs]) / 127.5 - 1
    back = torch.tensor([BACKGROUNDS[s.background] for s in specs]) / 127.5 - 1
    ramp = torch.linspace(-1, 1, SIZE)
    light = tilt[:, 0, None, None] * ramp[None, :] + tilt[:, 1, None, None] * ramp[:, None]  # (n, H, W)
    back = (back[:, :, None, None] + light[:, None]).clamp(-1, 1)[:, :, None]
    return back + alpha * (front[:, :, None, None, None] - back)


@cache
def first_frames() -> np.ndarray:
    """An I2V first frame for each of `heldout_specs`, of scans that nothing was trained on: (n, SIZE, SIZE, 3) uint8."""
    frames = render(list(heldout_specs()), np.random.default_rng(23), "test", frames=1, spread=NEAR)[:, :, 0]
    return ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
