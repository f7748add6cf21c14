"""`Settings`: what an evaluation compares, on which videos, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mxdit.errors import InputError
from mxdit.evals.metrics.judge import Judge
from mxdit.evals.metrics.networks import FVD_FRAMES
from mxdit.evals.modes import Mode
from mxdit.evals.samples import Video
from mxdit.generation.directory import ModelDirectory, open_model
from mxdit.generation.loading import quantization
from mxdit.models.skeleton import skeleton_of
from mxdit.quantize.plan import plan


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, on which videos, and how.

    Attributes:
        model: the unquantized model.
        task: "t2v" or "i2v".
        modes: from `modes.choose`; BF16 is the first.
        videos: from `samples.choose_videos`, all of one size.
        judge: who says what the videos show, or None.
        metrics: names of video metrics.
        networks: names of `networks.ADAPTERS` that can be computed, with the weights in `weights`.
        dtype: of everything that is not quantized.
        device: a torch device's name.
        probes: how many videos, the first ones, also serve the layer and model levels. At A14B's 480p the calls of one take
            about 0.7 GB on disk.
        rows: most rows of a linear's input that are taken from a step. At A14B 64 rows take about 5 GB on disk.

    Raises InputError, ConfigError and CheckpointError for what cannot be compared, before anything runs.
    """

    model: ModelDirectory
    task: str
    modes: Sequence[Mode]
    videos: Sequence[Video]
    metrics: Sequence[str]
    judge: Judge | None = None
    networks: Sequence[str] = ()
    weights: Path | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    probes: int = 4
    rows: int = 256

    def __post_init__(self) -> None:
        if self.model.stored:
            raise InputError(
                "the model is quantized, so there is nothing to compare it with",
                where=str(self.model.path),
                hint="Name the BF16 model, and this one as a mode of it: --mode NAME=DIR.",
            )
        for mode in self.modes:
            other = self.model if mode.directory is None else open_model(mode.directory)
            if other.components.keys() != self.model.components.keys() or self.task not in other.tasks:
                raise InputError(
                    "this is another model than the one it is compared with",
                    field="mode",
                    where=mode.name,
                    got=f"{', '.join(other.components)} for {' and '.join(other.tasks)}",
                    expected=f"{', '.join(self.model.components)} for {self.task}",
                )
        if "fvd" in self.networks and (len(self.videos) < 2 or self.videos[0].request.frames < FVD_FRAMES):
            raise InputError(
                "FVD compares sets of videos, none of them short",
                field="metrics",
                got=f"{len(self.videos)} of {self.videos[0].request.frames} frames",
                expected=f"2 or more, of {FVD_FRAMES} frames or more",
                hint="Name other metrics.",
            )
        self._check_plans()

    def _check_plans(self) -> None:
        """Plan every mode on models without weights: a component or a layer that does not exist is said before anything runs."""
        skeletons = {name: skeleton_of(config, name) for name, config in self.model.components.items()}
        for mode in (mode for mode in self.modes if mode.method is not None):
            for name, config in quantization(self.model, mode.method, mode.keys, mode.components).items():
                if config is not None:
                    plan(skeletons[name], config)

    @property
    def fps(self) -> int:
        """Frames a second of all videos, which some metrics see."""
        return self.videos[0].request.fps
