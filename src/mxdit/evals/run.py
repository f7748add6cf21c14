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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxdit.backends.environment import environment
from mxdit.checkpoint import quantize_checkpoint
from mxdit.evals import results
from mxdit.evals.cache import Cache, digest_of, digest_of_code, digest_of_experts, digest_of_files, place_of, stats_of
from mxdit.evals.metrics.networks import ADAPTERS, measure
from mxdit.evals.metrics.video_metrics import video_metrics
from mxdit.evals.modes import BF16, Mode
from mxdit.evals.probe import capture_layers, compare, embeddings_of, layer_errors, velocity_errors
from mxdit.evals.samples import Video
from mxdit.evals.settings import Settings
from mxdit.evals.velocities import guidance_of
from mxdit.generation.recording import Recorder, transformers_of
from mxdit.generation.session import Session
from mxdit.version import installed

Progress = Callable[[str, float, int], None]  # (what is being done, how much is done, of how much)
HOSTS = ("torch", "diffusers", "transformers")
UNPAIRED = ("vbench",)  # adapters that look at a clip alone, so that BF16's own figures are what to compare with
CLIP, FIGURES, LATENTS, CALLS, EMBEDDINGS = "clip.npy", "figures.json", "latents.pt", "calls.pt", "embeddings.pt"


class Run:
    """The machine that carries out an evaluation, with one pipeline in memory.

    Args:
        settings: what is compared.
        cache: where videos and figures are kept.
        progress: told about every video and part of one.
    """

    def __init__(self, settings: Settings, cache: Cache, progress: Progress = lambda what, done, total: None) -> None:
        self.settings, self.cache, self.progress = settings, cache, progress
        self._where = environment(settings.device)
        self._digests: dict[Path, str] = {}
        self._clips: dict[str, list[Path]] = {}
        self._reference: list[Path] = []  # BF16's clips, and what its layers saw
        self._captured: list[Path] = []
        self._bf16_embeddings = Path()

    def results(self) -> dict[str, Any]:
        """Everything computed, or taken from the cache, JSON-serializable, in the schema of `results`."""
        started, done, owners = time.perf_counter(), [], {}
        for mode in self.settings.modes:
            found = self._measure(mode, owners)
            done.append(found)
            owners.setdefault(found.pop("run"), mode.name)
        return results.collect(self.settings, done, self._where, time.perf_counter() - started)

    def clips(self, mode: str, index: int) -> np.ndarray:
        """The video (frames, height, width, 3) uint8 of a mode that has run."""
        return np.load(self._clips[mode][index] / CLIP)

    def _measure(self, mode: Mode, owners: dict[str, str]) -> dict[str, Any]:
        """Everything about one mode; of one that computes what an earlier one does, what it is and `same_as`."""
        self.progress(f"{mode.name}: loading", 0, 1)
        spent, settings = self.cache.seconds, self.settings
        directory = self._directory(mode)
        started = time.perf_counter()
        online = (
            {"method": mode.method, "keys": mode.keys, "components": mode.components} if mode.how == "online" else {}
        )
        session = Session.open(
            directory,
            task=settings.task,
            dtype=settings.dtype,
            device=settings.device,
            attention=mode.attention,
            fused=mode.fused,
            **online,
        )
        pipeline = session.load()
        run = self._run(session, directory)
        loading = time.perf_counter() - started
        head = {"run": run, **results.describe(mode, session), "same_as": owners.get(run)}
        if run in owners:
            self._clips[mode.name] = self._clips[owners[run]]
            return head | {"seconds": loading + self.cache.seconds - spent}

        embedded = self._embedded(session, mode, run)
        clips = [self._video(session, mode, run, video) for video in settings.videos]
        self._clips[mode.name] = clips
        if mode is BF16:
            self._reference = clips
            self._captured = [self._layers_of(pipeline, clip) for clip in clips[: settings.probes]]
            velocities, layers = [], []
        else:
            velocities = [self._velocities(session, mode, run, i) for i in range(min(settings.probes, len(clips)))]
            layers = self._layers(pipeline, mode, run)
        del session, pipeline
        gc.collect()  # before the next one is loaded; its modules and hooks refer to each other
        figures = [json.loads((clip / FIGURES).read_text()) for clip in clips]
        compared = [] if mode is BF16 else [self._compared(mode, i) for i in range(len(clips))]
        return head | {
            "figures": figures,
            "embeddings": embedded,
            "velocities": velocities,
            "layers": layers,
            "compared": compared,
            "adapted": self._adapted(mode),
            "judged": [self._judged(mode, clip, video) for clip, video in zip(clips, settings.videos, strict=True)],
            "seconds": loading + self.cache.seconds - spent,
        }

    def _directory(self, mode: Mode) -> Path:
        """Where the mode's weights lie; those of a standard offline mode are quantized into the cache first."""
        if mode.how != "offline":
            return self.settings.model.path
        if mode.directory is not None:
            return mode.directory

        def make(directory: Path) -> None:
            config = {"quant_method": mode.method, **mode.keys}
            quantize_checkpoint(source, directory / "model", config, dtype=self.settings.dtype).write()

        source = self.settings.model.path

        # What is not quantized is part of the directory that is made, too.
        key = {
            "kind": "model",
            "mxdit": digest_of_code(),
            "dtype": str(self.settings.dtype),
            "files": stats_of([source]),
        }
        return self.cache.entry(key | {"method": mode.method, "keys": dict(mode.keys)}, make) / "model"

    def _run(self, session: Session, directory: Path) -> str:
        """Hash of everything but the request that a video depends on."""
        pipeline, encoders = session.load(), session.model.encoders
        if directory not in self._digests:
            self._digests[directory] = digest_of_files(directory, {*self.settings.model.components, *encoders})
        # Classes of the parts, and the pipeline's own settings.
        config = {key: value for key, value in dict(pipeline.config).items() if not key.startswith("_")}
        return digest_of(
            {
                "versions": {"mxdit": digest_of_code(), **{name: installed(name) for name in HOSTS}},
                "device": place_of(self._where),
                "dtype": str(self.settings.dtype),
                "pipeline": [type(pipeline).__name__, config],
                "attention": {name: policy.to_dict() for name, policy in session.attention.items()},
                "fused": session.fused,
                "parts": self._digests[directory],
                "experts": digest_of_experts(
                    {**transformers_of(pipeline), **{name: getattr(pipeline, name) for name in encoders}}
                ),
            }
        )

    def _video(self, session: Session, mode: Mode, run: str, video: Video) -> Path:
        """The entry of one video: its clip, and how far its latents are from BF16's; of BF16 the latents, and calls."""
        reference = None if mode is BF16 else self._reference[video.index]
        keep_calls = mode is BF16 and video.index < self.settings.probes
        total, index = len(self.settings.videos), video.index
        self.progress(f"{mode.name}: videos", index, total)

        def make(directory: Path) -> None:
            recorder = Recorder(keep_calls)
            with session.lock, recorder.listening(session.load()):
                result = session.run(
                    video.request,
                    lambda done, steps: self.progress(f"{mode.name}: videos", index + done / steps, total),
                    on_latents=recorder.on_latents,
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

        key = {"kind": "video", "run": run, "request": video.request.to_dict(), "calls": keep_calls}
        return self.cache.entry(key | {"reference": reference and reference.name}, make)

    def _embedded(self, session: Session, mode: Mode, run: str) -> list[float]:
        """How far the embedding of each video's prompt is from BF16's; none where the text encoders are not quantized."""
        quantized = {**session.encoders, **session.model.stored_encoders}
        if not session.model.encoders or not (quantized or mode is BF16):
            return []
        prompts = list(dict.fromkeys(video.request.prompt for video in self.settings.videos))

        def make(directory: Path) -> None:
            with session.lock:
                torch.save([embeddings_of(session.load(), prompt) for prompt in prompts], directory / EMBEDDINGS)

        made = self.cache.entry({"kind": "embeddings", "run": run, "prompts": prompts}, make) / EMBEDDINGS
        if mode is BF16:
            self._bf16_embeddings = made
            return []
        both = (torch.load(path, weights_only=True) for path in (made, self._bf16_embeddings))
        flat = [[torch.cat([part.flatten() for part in parts]) for parts in found] for found in both]
        errors = {prompt: compare(*pair)[0] for prompt, *pair in zip(prompts, *flat, strict=True)}
        return [errors[video.request.prompt] for video in self.settings.videos]

    def _layers_of(self, pipeline: Any, clip: Path) -> Path:
        """The entry of what BF16's linears saw while they made a clip."""

        def make(directory: Path) -> None:
            capture_layers(
                pipeline, torch.load(clip / CALLS, weights_only=True, mmap=True), self.settings.rows, directory
            )

        return self.cache.entry({"kind": "layer inputs", "clip": clip.name, "rows": self.settings.rows}, make)

    def _velocities(self, session: Session, mode: Mode, run: str, index: int) -> dict[str, Any]:
        self.progress(f"{mode.name}: velocities", index, self.settings.probes)
        clip, pipeline = self._reference[index], session.load()
        guidance = guidance_of(self.settings.videos[index].request, transformers_of(pipeline))
        return self.cache.figures(
            {"kind": "velocities", "run": run, "reference": clip.name},
            lambda: velocity_errors(
                pipeline, torch.load(clip / CALLS, weights_only=True, mmap=True), guidance, session.attention
            ),
        )

    def _layers(self, pipeline: Any, mode: Mode, run: str) -> list[dict[str, Any]]:
        self.progress(f"{mode.name}: layers", 0, 1)
        return self.cache.figures(
            {"kind": "layers", "run": run, "captured": [path.name for path in self._captured]},
            lambda: layer_errors(pipeline, self._captured),
        )

    def _compared(self, mode: Mode, index: int) -> dict[str, float]:
        self.progress(f"{mode.name}: video metrics", index, len(self.settings.videos))
        clip, reference = self._clips[mode.name][index], self._reference[index]
        versions = {package: installed(package) for package in results.PACKAGES}
        return self.cache.figures(
            {
                "kind": "video metrics",
                "clips": [reference.name, clip.name],
                "fps": self.settings.fps,
                "metrics": list(self.settings.metrics),
                "versions": {**versions, "mxdit": digest_of_code()},
            },
            lambda: video_metrics(
                np.load(reference / CLIP), np.load(clip / CLIP), self.settings.fps, self.settings.metrics
            ),
        )

    def _adapted(self, mode: Mode) -> dict[str, list[float]]:
        """What the networks say of all videos of a mode; of BF16's own only those that need no reference."""
        settings, found = self.settings, dict[str, list[float]]()
        clips = self._clips[mode.name]
        for name in settings.networks:
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
                "weights": stats_of(
                    [settings.weights / file for file in ADAPTERS[name].files] if settings.weights else []
                ),
                "fps": self.settings.fps,
            }
            names = [[clip.name for clip in group] for group in (self._reference, clips)]
            found |= self.cache.figures(
                {**key, "clips": names},
                partial(measure, name, settings.weights, pairs, settings.fps),
            )
        return found

    def _judged(self, mode: Mode, clip: Path, video: Video) -> dict[str, Any] | None:
        judge, asked = self.settings.judge, video.asked
        if judge is None or asked is None:
            return None
        self.progress(f"{mode.name}: meaning", video.index, len(self.settings.videos))

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
