"""An evaluation: BF16 first, with everything of it recorded, then each mode against the record. One pipeline in memory.

For every mode: load it and hash what it computes; make its videos, comparing latents step by step; repeat the recorded calls
of the transformers; run every quantized linear on recorded inputs; then, without the model, compare and judge the videos. Each
video and each of its comparisons is an entry of the cache. A mode whose weights and schemes are those of an earlier one (an
offline mode, bit for bit) takes that one's results.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxdit.backends.environment import environment
from mxdit.checkpoint import quantize_checkpoint
from mxdit.config import MXConfig
from mxdit.errors import InputError
from mxdit.evals import results
from mxdit.evals.cache import Cache, digest_of, digest_of_code, digest_of_experts, digest_of_files, stats_of
from mxdit.evals.metrics.judge import Judge
from mxdit.evals.metrics.networks import ADAPTERS, FVD_FRAMES, measure
from mxdit.evals.metrics.video_metrics import video_metrics
from mxdit.evals.modes import BF16, Mode
from mxdit.evals.probe import capture_layers, compare, layer_errors, velocity_errors
from mxdit.evals.samples import Video
from mxdit.generation.directory import ModelDirectory, open_model
from mxdit.generation.loading import experts_of, load, quantization
from mxdit.generation.recording import Recorder, experts_in
from mxdit.generation.run import generate
from mxdit.models.skeleton import skeleton_of
from mxdit.quantize.plan import plan
from mxdit.version import installed

Progress = Callable[[str, float, int], None]  # (what is being done, how much is done, of how much)
HOSTS = ("torch", "diffusers", "transformers")
UNPAIRED = ("vbench",)  # adapters that look at a clip alone, so that BF16's own figures are what to compare with
CLIP, FIGURES, LATENTS, CALLS = "clip.npy", "figures.json", "latents.pt", "calls.pt"


@dataclass
class Evaluation:
    """What to compare, on which videos, and how.

    Attributes:
        model: the unquantized model.
        task: "t2v" or "i2v".
        modes: from `modes.choose`; BF16 is the first.
        videos: from `samples.choose_videos`, all of one size.
        cache: where videos and figures are kept.
        judge: who says what the videos show, or None.
        metrics: names of video metrics.
        adapters: names of `adapters.ADAPTERS` that can be computed, with the weights in `weights`.
        fps: frames a second, which some metrics see.
        dtype: of everything that is not quantized.
        device: a torch device's name.
        probes: how many videos, the first ones, also serve the layer and model levels. At A14B's 480p the calls of one take
            about 0.7 GB on disk.
        rows: most rows of a linear's input that are taken from a step. At A14B 64 rows take about 5 GB on disk.
        progress: told about every video and part of one.
    """

    model: ModelDirectory
    task: str
    modes: Sequence[Mode]
    videos: Sequence[Video]
    cache: Cache
    judge: Judge | None
    metrics: Sequence[str]
    fps: int
    adapters: Sequence[str] = ()
    weights: Path | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    probes: int = 4
    rows: int = 256
    progress: Progress = lambda what, done, total: None
    _digests: dict[Path, str] = field(default_factory=dict, init=False)
    _clips: dict[str, list[Path]] = field(default_factory=dict, init=False)
    _reference: list[Path] = field(default_factory=list, init=False)  # BF16's clips, and what its layers saw
    _captured: list[Path] = field(default_factory=list, init=False)

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
                    where=f"--mode {mode.name}",
                    got=f"{', '.join(other.components)} for {' and '.join(other.tasks)}",
                    expected=f"{', '.join(self.model.components)} for {self.task}",
                )
        if "fvd" in self.adapters and (len(self.videos) < 2 or self.videos[0].request.frames < FVD_FRAMES):
            raise InputError(
                "FVD compares sets of videos, none of them short",
                where="--metrics",
                got=f"{len(self.videos)} of {self.videos[0].request.frames} frames",
                expected=f"2 or more, of {FVD_FRAMES} frames or more",
                hint="Name other metrics.",
            )
        self._check_plans()
        self._where = environment(self.device)

    def _check_plans(self) -> None:
        """Plan every mode on models without weights: an expert or a layer that does not exist is said before anything runs."""
        skeletons = {name: skeleton_of(config, name) for name, config in self.model.components.items()}
        for mode in (mode for mode in self.modes if mode.method is not None):
            quantization(self.model, mode.method, mode.common, mode.components)
            for name, skeleton in skeletons.items():
                own = mode.components.get(name, {})
                if own is not None:
                    plan(skeleton, MXConfig.of({"quant_method": mode.method, **mode.common, **own}))

    def run(self) -> dict[str, Any]:
        """All results, JSON-serializable, in the schema of `results`."""
        started, done, owners = time.perf_counter(), [], {}
        for mode in self.modes:
            found = self._measure(mode, owners)
            done.append(found)
            owners.setdefault(found.pop("run"), mode.name)
        return results.collect(self, done, self._where, time.perf_counter() - started)

    def clips(self, mode: str, index: int) -> np.ndarray:
        """The video (frames, height, width, 3) uint8 of a mode that has run."""
        return np.load(self._clips[mode][index] / CLIP)

    def _measure(self, mode: Mode, owners: dict[str, str]) -> dict[str, Any]:
        """Everything about one mode; of one that computes what an earlier one does, what it is and `same_as`."""
        self.progress(f"{mode.name}: loading", 0, 1)
        spent = self.cache.seconds
        directory = self._directory(mode)
        started = time.perf_counter()
        pipeline = self._load(mode, directory)
        run = self._run(pipeline, directory)
        loading = time.perf_counter() - started
        head = {"run": run, **results.describe(mode, pipeline, experts_of(pipeline)), "same_as": owners.get(run)}
        if run in owners:
            self._clips[mode.name] = self._clips[owners[run]]
            return head | {"seconds": loading + self.cache.seconds - spent}

        clips = [self._video(pipeline, mode, run, video) for video in self.videos]
        self._clips[mode.name] = clips
        if mode is BF16:
            self._reference = clips
            self._captured = [self._layers_of(pipeline, clip) for clip in clips[: self.probes]]
            velocities, layers = [], []
        else:
            velocities = [self._velocities(pipeline, mode, run, i) for i in range(min(self.probes, len(clips)))]
            layers = self._layers(pipeline, mode, run)
        del pipeline
        gc.collect()  # before the next one is loaded; its modules and hooks refer to each other
        figures = [json.loads((clip / FIGURES).read_text()) for clip in clips]
        compared = [] if mode is BF16 else [self._compared(mode, i) for i in range(len(clips))]
        return head | {
            "figures": figures,
            "velocities": velocities,
            "layers": layers,
            "compared": compared,
            "adapted": self._adapted(mode),
            "judged": [self._judged(mode, clip, video) for clip, video in zip(clips, self.videos, strict=True)],
            "seconds": loading + self.cache.seconds - spent,
        }

    def _directory(self, mode: Mode) -> Path:
        """Where the mode's weights lie; those of a standard offline mode are quantized into the cache first."""
        if mode.how != "offline":
            return self.model.path
        if mode.directory is not None:
            return mode.directory

        def make(directory: Path) -> None:
            config = {"quant_method": mode.method, **mode.keys}
            quantize_checkpoint(self.model.path, directory / "model", config, dtype=self.dtype).write()

        # What is not quantized is part of the directory that is made, too.
        key = {
            "kind": "model",
            "mxdit": digest_of_code(),
            "dtype": str(self.dtype),
            "files": stats_of([self.model.path]),
        }
        return self.cache.entry(key | {"method": mode.method, "keys": dict(mode.keys)}, make) / "model"

    def _load(self, mode: Mode, directory: Path) -> Any:
        model = self.model if mode.how != "offline" else open_model(directory)
        config = quantization(model, mode.method, mode.common, mode.components) if mode.how == "online" else None
        return load(model, self.task, config, dtype=self.dtype, device=self.device)

    def _run(self, pipeline: Any, directory: Path) -> str:
        """Hash of everything but the request that a video depends on."""
        if directory not in self._digests:
            self._digests[directory] = digest_of_files(directory, self.model.components)
        # Classes of the parts, and the pipeline's own settings.
        config = {key: value for key, value in dict(pipeline.config).items() if not key.startswith("_")}
        return digest_of(
            {
                "versions": {"mxdit": digest_of_code(), **{name: installed(name) for name in HOSTS}},
                "device": [self.device, self._where["device_name"], self._where["backend"], self._where["about"]],
                "dtype": str(self.dtype),
                "pipeline": [type(pipeline).__name__, config],
                "parts": self._digests[directory],
                "experts": digest_of_experts(experts_in(pipeline)),
            }
        )

    def _video(self, pipeline: Any, mode: Mode, run: str, video: Video) -> Path:
        """The entry of one video: its clip, and how far its latents are from BF16's; of BF16 the latents, and calls."""
        reference = None if mode is BF16 else self._reference[video.index]
        keep_calls = mode is BF16 and video.index < self.probes
        total, index = len(self.videos), video.index
        self.progress(f"{mode.name}: videos", index, total)

        def make(directory: Path) -> None:
            recorder = Recorder(keep_calls)
            with recorder.listening(pipeline):
                result = generate(
                    pipeline,
                    video.request,
                    lambda done, steps: self.progress(f"{mode.name}: videos", index + done / steps, total),
                    recorder.on_latents,
                )
            if reference is None:
                torch.save(recorder.latents, directory / LATENTS)
            else:
                expected = torch.load(reference / LATENTS, weights_only=True)
                for step, ours, theirs in zip(recorder.steps, recorder.latents, expected, strict=True):
                    step["latent_error"], step["latent_cosine"] = compare(ours, theirs)
            if keep_calls:
                torch.save(recorder.calls, directory / CALLS)
            np.save(directory / CLIP, result.frames)
            (directory / FIGURES).write_text(json.dumps({"steps": recorder.steps}))

        key = {"kind": "video", "run": run, "request": video.key, "calls": keep_calls}
        return self.cache.entry(key | {"reference": reference and reference.name}, make)

    def _layers_of(self, pipeline: Any, clip: Path) -> Path:
        """The entry of what BF16's linears saw while they made a clip."""

        def make(directory: Path) -> None:
            capture_layers(pipeline, torch.load(clip / CALLS, weights_only=True, mmap=True), self.rows, directory)

        return self.cache.entry({"kind": "layer inputs", "clip": clip.name, "rows": self.rows}, make)

    def _velocities(self, pipeline: Any, mode: Mode, run: str, index: int) -> list[dict[str, Any]]:
        self.progress(f"{mode.name}: velocities", index, self.probes)
        clip = self._reference[index]
        return self.cache.figures(
            {"kind": "velocities", "run": run, "reference": clip.name},
            lambda: velocity_errors(pipeline, torch.load(clip / CALLS, weights_only=True, mmap=True)),
        )

    def _layers(self, pipeline: Any, mode: Mode, run: str) -> list[dict[str, Any]]:
        self.progress(f"{mode.name}: layers", 0, 1)
        return self.cache.figures(
            {"kind": "layers", "run": run, "captured": [path.name for path in self._captured]},
            lambda: layer_errors(pipeline, self._captured),
        )

    def _compared(self, mode: Mode, index: int) -> dict[str, float]:
        self.progress(f"{mode.name}: video metrics", index, len(self.videos))
        clip, reference = self._clips[mode.name][index], self._reference[index]
        versions = {package: installed(package) for package in results.PACKAGES}
        return self.cache.figures(
            {
                "kind": "video metrics",
                "clips": [reference.name, clip.name],
                "fps": self.fps,
                "metrics": list(self.metrics),
                "versions": {**versions, "mxdit": digest_of_code()},
            },
            lambda: video_metrics(np.load(reference / CLIP), np.load(clip / CLIP), self.fps, self.metrics),
        )

    def _adapted(self, mode: Mode) -> dict[str, list[float]]:
        """What the adapters say of all videos of a mode; of BF16's own only those that need no reference."""
        found: dict[str, list[float]] = {}
        clips = self._clips[mode.name]
        for name in self.adapters:
            if mode is BF16 and name not in UNPAIRED:
                continue
            self.progress(f"{mode.name}: {name}", 0, 1)
            pairs = (
                (np.load(theirs / CLIP), np.load(ours / CLIP))
                for theirs, ours in zip(self._reference, clips, strict=True)
            )
            key = {
                "kind": name,
                "mxdit": digest_of_code(),
                "packages": [installed(package) for package in (ADAPTERS[name].package, "torchmetrics")],
                "weights": stats_of([self.weights / file for file in ADAPTERS[name].files] if self.weights else []),
                "fps": self.fps,
            }
            names = [[clip.name for clip in group] for group in (self._reference, clips)]
            found |= self.cache.figures(
                {**key, "clips": names},
                partial(measure, name, self.weights, pairs, self.fps),
            )
        return found

    def _judged(self, mode: Mode, clip: Path, video: Video) -> dict[str, Any] | None:
        judge, asked = self.judge, video.asked
        if judge is None or asked is None:
            return None
        self.progress(f"{mode.name}: meaning", video.index, len(self.videos))

        def make() -> dict[str, Any]:
            scores, read = judge.read(asked, np.load(clip / CLIP))
            return {"scores": scores, "read": read, "asked": asked.asked}

        key = {
            "kind": "meaning",
            "mxdit": digest_of_code(),
            "packages": [installed(package) for package in ("mxdit-models", "scikit-learn")],
            "clip": clip.name,
            "asked": asked.asked,
            "image": asked.image is not None,
        }
        return self.cache.figures(key, make)
