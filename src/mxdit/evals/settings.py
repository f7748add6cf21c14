"""`Settings`: what an evaluation compares, on which videos, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxdit.config import MXConfig
from mxdit.config.attention import AttentionPolicy
from mxdit.config.components import split_keys
from mxdit.errors import InputError
from mxdit.evals.metrics.judge import Judge
from mxdit.evals.metrics.networks import FVD_FRAMES
from mxdit.evals.modes import QUICK, Mode, choose, of_mode
from mxdit.evals.samples import Video, choose_videos
from mxdit.generation.directory import ModelDirectory, open_model
from mxdit.generation.loading import encoders, quantization
from mxdit.integrations.diffusers_attention import methods_of
from mxdit.models import COMPONENTS, TEXT_ENCODERS
from mxdit.models.skeleton import skeleton_of
from mxdit.quantize.plan import plan

SMALL = 1 << 30  # bytes of the transformers' files, below which more videos are looked into


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, on which videos, and how.

    Attributes:
        model: the unquantized model.
        task: what the model is asked to make, such as "t2v" or "i2v".
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
    probes: int = 6
    rows: int = 256

    @classmethod
    def choose(
        cls,
        model: ModelDirectory,
        *,
        task: str | None = None,
        modes: Sequence[str] | None = None,
        custom: Sequence[str] = (),
        prompts: Path | None = None,
        count: int | None = None,
        seeds: int | None = None,
        quick: bool = False,
        probes: int | None = None,
        request: Mapping[str, Any],
        **settings: Any,
    ) -> Settings:
        """Fill in what is not given.

        Args:
            model, task: as in `Settings`; the task is by default what the model makes.
            modes, custom: for `modes.choose`.
            prompts, count, seeds: for `samples.choose_videos`; by default 32 prompts or all of `prompts`, and 2 seeds.
            quick: by default fewer of all: 4 prompts, one seed, `modes.QUICK`.
            probes: by default 6, and 1 of a model of more than `SMALL` bytes.
            request: more fields of every request.
            settings: the other fields of `Settings`.

        Raises what `Settings` and those raise.
        """
        task = model.tasks[0] if task is None else task
        model.check_task(task)
        chosen = choose(QUICK if quick and modes is None else modes, custom)
        few = quick and count is None and prompts is None
        videos, judge = choose_videos(
            model,
            task,
            prompts=prompts,
            count=4 if few else count,
            seeds=(1 if quick else 2) if seeds is None else seeds,
            options=request,
        )
        if probes is not None and probes < 1:
            raise InputError("there must be at least one", field="probes", got=probes)
        files = [file for name in model.components for file in (model.path / name).glob("*.safetensors")]
        small = sum(file.stat().st_size for file in files) < SMALL
        return cls(
            model=model,
            task=task,
            modes=chosen,
            videos=videos,
            judge=judge,
            probes=(6 if small else 1) if probes is None else probes,
            rows=256 if small else 64,
            **settings,
        )

    def __post_init__(self) -> None:
        if self.model.stored:
            raise InputError(
                "the model is quantized, so there is nothing to compare it with",
                field="mode",
                where=str(self.model.path),
                expected="the BF16 model, and this one as a mode of it: NAME=DIR",
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
        skeletons |= {name: skeleton_of(config, name) for name, config in self.model.encoders.items()}
        for mode in self.modes:
            with of_mode(mode.name):
                for name, policy in AttentionPolicy.of_each(mode.attention, self.model.components, COMPONENTS).items():
                    policy.check(self.videos[0].request.steps)
                    methods_of(skeletons[name], policy)
            own, of_encoders = split_keys(mode.components, TEXT_ENCODERS)
            planned: dict[str, MXConfig | None] = dict(encoders(self.model, of_encoders))
            if mode.method is not None:
                planned |= quantization(self.model, mode.method, mode.keys, own)
            for name, config in planned.items():
                if config is not None:
                    plan(skeletons[name], config)

    @property
    def fps(self) -> int:
        """Frames a second of all videos, which some metrics see."""
        return self.videos[0].request.fps
