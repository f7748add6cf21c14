"""Does the bundled model still make what it is asked for? Its own judge reads the clips.

The judge came to be with the model (docs/mini-model.md) and is packaged with it; other models have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mxdit.backends.environment import one_thread
from mxdit.errors import InputError
from mxdit.evals.metrics.video_metrics import psnr_db
from mxdit.generation.directory import ModelDirectory

if TYPE_CHECKING:
    from PIL.Image import Image

ASKED = ("digit", "color", "direction", "background")


@dataclass(frozen=True)
class Sample:
    """One request whose result can be judged.

    Attributes:
        index: its place among the held-out captions.
        prompt: a caption that the model was not trained on.
        image: the first frame for I2V, of a scan that nothing was trained on; None for T2V.
        asked: what the prompt says: {"digit": int, "color", "direction", "background": str}.
    """

    index: int
    prompt: str
    image: Image | None
    asked: dict[str, Any]


class Judge:
    """Reads clips of moving digits. Fitting its classifier takes seconds, and is done once a process."""

    def __init__(self, task: str) -> None:
        self.task = task

    def samples(self, n: int) -> list[Sample]:
        """The first `n` held-out captions, always the same. Raises InputError where there are fewer."""
        from PIL import Image

        from mxdit_models.digits import first_frames, heldout_specs

        specs = heldout_specs()
        if not 1 <= n <= len(specs):
            raise InputError("not a number of held-out captions", got=n, expected=f"1 to {len(specs)}")
        images = [Image.fromarray(frame) for frame in first_frames()] if self.task == "i2v" else [None] * len(specs)
        return [
            Sample(i, spec.caption, images[i], {key: getattr(spec, key) for key in ASKED})
            for i, spec in enumerate(specs[:n])
        ]

    def says(self, clip: np.ndarray) -> dict[str, Any]:
        """What a clip (frames, 64, 64, 3) uint8 shows, under the names of `Sample.asked`."""
        reader = _reader()
        with one_thread():
            reading = reader.read(torch.from_numpy(clip).permute(3, 0, 1, 2) / 127.5 - 1)
        return {key: getattr(reading, key) for key in ASKED}

    def read(self, sample: Sample, clip: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
        """Scores, and what was read. A score is 1 for what is as asked and 0 for what is not; for I2V the first frame's PSNR
        against the given image, in dB, is one, too."""
        said = self.says(clip)
        scores = {key: float(said[key] == sample.asked[key]) for key in ASKED}
        if sample.image is not None:
            scores["first_frame_psnr_db"] = psnr_db(np.asarray(sample.image)[None], clip[:1])
        return scores, said


@cache
def _reader() -> Any:
    from mxdit_models.judge import Judge as Reader

    with one_thread():
        return Reader()


def judge_for(model: ModelDirectory, task: str) -> Judge | None:
    """The judge of the bundled model, also where it was converted or saved elsewhere; None for every other model.

    Raises InputError where the model is the bundled one and what its judge needs is not installed.
    """
    if not model.preset(task).name.startswith("mini-"):
        return None
    for name, how in (("mxdit_models", "pip install ./models"), ("sklearn", "pip install mxdit[eval]")):
        if find_spec(name) is None:
            raise InputError(
                "the bundled model's judge is not installed", got=f"no module {name}", hint=f"Run `{how}`."
            )
    return Judge(task)
