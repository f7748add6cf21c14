"""A calibration: clips of the float model first, then each transformer linear by linear, a budget spent, and guards on the whole.

What is computed is kept in a cache, a group of linears at a time, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mxdit.backends.environment import environment
from mxdit.calibrate.experts import Experts, Group, Layers, linear_at
from mxdit.calibrate.guards import Errors, Guard, clip_guard, expert_guards, linear_guard
from mxdit.calibrate.heldout import HeldOut
from mxdit.calibrate.linears import Calibrated, Trial, calibrate
from mxdit.calibrate.observe import (
    CLIP,
    SEARCH_ROWS,
    STATES,
    Inputs,
    bytes_of_state,
    calls_in,
    choose_calls,
    inputs_of,
    record,
)
from mxdit.calibrate.page import page
from mxdit.calibrate.settings import Settings
from mxdit.checkpoint.files import StoredTensor, read_header
from mxdit.config import SCALE_RULES, MXConfig
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.evals.cache import Cache, digest_of_code, stats_of
from mxdit.evals.metrics.video_metrics import psnr_db
from mxdit.evals.run import Progress
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.numerics.formats import block_format
from mxdit.version import installed

RULES = {rule: number for number, rule in SCALE_RULES.items()}
REPORT, PAGE = "calibration.json", "calibration.html"
PARTS, TRIALS = "parts.safetensors", "trials.json"
SHOWN = 3  # held-out clips that the report shows
HOSTS = ("torch", "diffusers", "transformers")


@dataclass
class Outcome:
    """What a calibration came to.

    Attributes:
        linears: expert -> path -> how it was calibrated.
        files: expert -> name of a tensor -> where the calibrated one is stored.
        kept: expert -> linears that stay in BF16.
        steps: the policy of activations, empty for none.
        errors: "online" and "calibrated" -> expert -> errors, with linears in BF16 and steps as chosen in the latter.
        clips: "online" and "calibrated" -> PSNR in dB of each held-out clip against BF16's.
        predicted: the budget's curve: share of the parameters in BF16 -> error, as a share of that of four bits throughout.
        gains: step -> what MXFP8 activations take of the error there; empty where no steps were asked for.
        guards: the verdicts.
        shown: for some held-out clips, the prompt, and (label, clip) of the float model's, online, and calibrated.
        seconds: part of the work -> what it took, now or in the run that the cache has it from.
    """

    linears: dict[str, dict[str, Calibrated]]
    files: dict[str, dict[str, StoredTensor]]
    kept: dict[str, list[str]]
    steps: StepPolicy
    errors: dict[str, dict[str, Errors]]
    clips: dict[str, list[float]]
    predicted: list[tuple[float, float]]
    gains: dict[int, float]
    guards: list[Guard]
    shown: list[tuple[str, list[tuple[str, np.ndarray]]]]
    seconds: dict[str, float]

    @property
    def accepted(self) -> bool:
        """Whether every guard lets it pass."""
        return all(guard.passed for guard in self.guards)


class Calibration:
    """The machine that carries out a calibration, with one pipeline in memory.

    Args:
        settings: what is calibrated.
        cache: where clips and results are kept.
        progress: told about every part of the work.
    """

    def __init__(self, settings: Settings, cache: Cache, progress: Progress = lambda what, done, total: None) -> None:
        self.settings, self.cache, self.progress = settings, cache, progress
        self.session = Session.open(
            settings.model.path,
            task=settings.task,
            dtype=settings.dtype,
            device=settings.device,
            offload=settings.offload,
        )
        self._seconds: dict[str, float] = {}
        where = environment(settings.device)
        self._key = {
            "mxdit": digest_of_code(),
            "versions": {name: installed(name) for name in HOSTS},
            "device": [settings.device, where["device_name"], where["backend"], where["about"]],
            "model": stats_of([settings.model.path]),
            "dtype": str(settings.dtype),
        }

    # -- the whole -----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Calibrate. Raises InputError and ConfigError for what cannot be done."""
        settings = self.settings
        experts = self.experts = Experts(self.session, settings.recipe)
        groups = {name: experts.groups(name) for name in experts.models}
        linears: dict[str, dict[str, Calibrated]] = {}
        entries: dict[str, dict[tuple[str, ...], Path]] = {}
        before: list[str] = []
        for name in experts.models:
            # A later expert of a cascade works on what the earlier ones, quantized, have made.
            started = {other: experts.layers(other, linears[other]) for other in linears}
            with self._timed("observing"), experts.swapped(started):
                learned = [self._clip(request, before) for request in settings.fit]
                judged = [self._clip(request, before) for request in settings.held]
            with self._timed("linears"):
                entries[name] = self._expert(name, groups[name], learned, judged)
            linears[name] = {
                path: result for entry in entries[name].values() for path, result in self._read(entry).items()
            }
            before += [entry.name for entry in entries[name].values()]
        judged = [self._clip(request, []) for request in settings.held]
        online = {name: experts.online(name) for name in experts.models}
        held = HeldOut(settings, experts, [calls_in(clip) for clip in judged], self.progress)
        with self._timed("budget"):
            steps, gains = held.steps(linears)
            kept, predicted = held.kept(groups, linears, steps)
        chosen = {
            name: {path: layer for path, layer in experts.layers(name, found).items() if path not in kept[name]}
            for name, found in linears.items()
        }
        with self._timed("errors"):
            errors = {
                "online": held.errors("online", online, StepPolicy({})),
                "calibrated": held.errors("calibrated", chosen, steps),
            }
        made = {
            "online": self._made("online", online, StepPolicy({})),
            "calibrated": self._made("calibrated", chosen, steps),
        }
        floats = [np.load(clip / CLIP) for clip in judged]
        clips = {what: [psnr_db(*pair) for pair in zip(floats, frames, strict=True)] for what, frames in made.items()}
        guards = [
            linear_guard(linears),
            *(
                guard
                for name in experts.models
                for guard in expert_guards(name, errors["online"][name], errors["calibrated"][name])
            ),
            clip_guard(clips["online"], clips["calibrated"]),
        ]
        files = {
            name: {tensor: stored for entry in found.values() for tensor, stored in read_header(entry / PARTS).items()}
            for name, found in entries.items()
        }
        shown = [
            (request.prompt, [("float", floats[i]), *((what, frames[i]) for what, frames in made.items())])
            for i, request in enumerate(settings.held[:SHOWN])
        ]
        return Outcome(linears, files, kept, steps, errors, clips, predicted, gains, guards, shown, dict(self._seconds))

    def fit_into(self, seconds: float) -> int:
        """Learn from as many prompts as this time allows; returns how many.

        One held-out clip is made, and one group of linears calibrated on noise, to see how long things take here.

        Raises InputError where not even one fits.
        """
        settings, experts = self.settings, Experts(self.session, self.settings.recipe)
        groups = [group for name in experts.models for group in experts.groups(name)]
        linears = {path: linear_at(experts.models[groups[0].expert], path) for path in groups[0].paths}

        def measure() -> list[float]:
            """Seconds of a clip, and of a group of linears."""
            with self._timed("a clip"):
                self._clip(settings.held[0], [])
            width = next(iter(linears.values())).in_features
            noise = torch.randn(2 * SEARCH_ROWS, width, device=settings.device).to(settings.dtype)
            started = time.perf_counter()
            calibrate(linears, noise, noise[:SEARCH_ROWS], settings.recipe)
            return [self._seconds.pop("a clip"), time.perf_counter() - started]

        # Measured once, so that the same command goes on from an interruption with the same prompts.
        key = {**self._key, "kind": "seconds", "request": settings.held[0].to_dict(), "recipe": asdict(settings.recipe)}
        clip, group = self.cache.figures(key, measure)
        spent = group * sum(of.parameters for of in groups) / groups[0].parameters
        # Clips are made once for each transformer, and their calls walked through; held-out ones are run six times more.
        passes = len(experts.models) + 1
        left = seconds - spent - (passes + 6) * clip * len(settings.held)
        count = min(len(settings.fit), int(left / (passes * clip)))
        if count < 1:
            raise InputError(
                "not even one prompt to learn from fits into the time",
                field="minutes",
                got=f"{seconds / 60:g}",
                expected=f"at least {(seconds - left + passes * clip) / 60:.1f} here",
                hint="Use fewer prompts to judge by (--held), smaller clips, or fewer steps.",
            )
        self.settings = replace(settings, fit=settings.fit[:count])
        return count

    def written(self, report: Mapping[str, Any], outcome: Outcome) -> dict[str, Path]:
        """The report's files, by the names that they have in a checkpoint."""

        def make(directory: Path) -> None:
            (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
            (directory / PAGE).write_text(page(report, outcome.shown, self.settings.held[0].fps), encoding="utf-8")

        entry = self.cache.entry({**self._key, "kind": "report", "report": report}, make)
        return {name: entry / name for name in (REPORT, PAGE)}

    def config(self, expert: str, outcome: Outcome) -> MXConfig:
        """The config of one transformer of the checkpoint that comes of it."""
        recipe = self.settings.recipe
        return MXConfig.from_dict(
            {
                "quant_method": recipe.method,
                "activation": None if recipe.activation == "mxfp4" else recipe.activation,
                "num_bf16_fallback_layers": 0,
                "ignored_layers": outcome.kept[expert],
                "activation_steps": outcome.steps.to_dict() if outcome.steps else None,
                # The weights have scales of their own; activations go by the rule.
                "mxfp4_scale_alg": RULES[recipe.rule or block_format(recipe.method).default_rule]
                if recipe.method == "mxfp4"
                else None,
            }
        )

    # -- clips ---------------------------------------------------------------------------------------------------------

    def _clip(self, request: Request, before: Sequence[str]) -> Path:
        """The entry of a clip and its calls; of one that calibrated transformers began, `before` names what they are."""
        settings = self.settings
        total = len(settings.fit) + len(settings.held)
        number = [*settings.fit, *settings.held].index(request)
        what = "clips, begun by calibrated transformers" if before else "clips of the float model"
        self.progress(what, number, total)

        def make(directory: Path) -> None:
            record(
                self.session, request, directory, lambda done, steps: self.progress(what, number + done / steps, total)
            )

        return self.cache.entry(
            {**self._key, "kind": "calls", "request": request.to_dict(), "before": list(before)}, make
        )

    def _made(self, what: str, layers: Layers, steps: StepPolicy) -> list[np.ndarray]:
        """The held-out clips, made with these layers."""
        made, configs = list[np.ndarray](), self.session.configs
        # What a session needs to know of quantized transformers: that they are, so that a policy goes with them.
        self.session.configs = {name: MXConfig(quant_method=self.settings.recipe.method) for name in configs}
        try:
            with self._timed("clips"), self.experts.swapped(layers):
                for number, request in enumerate(self.settings.held):
                    self.progress(f"clips, {what}", number, len(self.settings.held))
                    made.append(self.session.run(replace(request, activation_steps=steps)).frames)
        finally:
            self.session.configs = configs
        return made

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Count what is done inside, and what the cache has of it from earlier."""
        started, cached = time.perf_counter(), self.cache.seconds
        try:
            yield
        finally:
            now, held = time.perf_counter() - started, self.cache.seconds - cached
            self._seconds[what] = self._seconds.get(what, 0.0) + max(now, held)

    # -- linears -------------------------------------------------------------------------------------------------------

    def _expert(
        self, expert: str, groups: Sequence[Group], learned: Sequence[Path], judged: Sequence[Path]
    ) -> dict[tuple[str, ...], Path]:
        """The entry of each group of one transformer."""
        settings, model = self.settings, self.experts.models[expert]
        keys = {
            group.paths: {
                **self._key,
                "kind": "calibrated",
                "expert": expert,
                "paths": list(group.paths),
                "recipe": asdict(settings.recipe),
                "seed": settings.seed,
                "calls": [[clip.name for clip in clips] for clips in (learned, judged)],
            }
            for group in groups
        }
        found: dict[tuple[str, ...], Path] = {}
        missing = [paths for paths, key in keys.items() if not self.cache.has(key)]
        for paths in keys.keys() - missing:
            found[paths] = self.cache.entry(keys[paths], lambda _: None)
        if missing:
            clips = [[calls_in(clip) for clip in clips] for clips in (learned, judged)]
            first = next(call for call in clips[0][0] if call["expert"] == expert)
            most = max(64, STATES // bytes_of_state(model, first))
            fit, held = (choose_calls(of, expert, most, settings.seed) for of in clips)
            what = f"{expert}: {{}}"
            done = len(found)
            last = missing[-1]
            for path, inputs in inputs_of(
                model,
                missing,
                fit,
                held,
                settings.seed,
                lambda at: self.progress(what.format("inputs"), at, len(fit) + len(held)),
            ):
                for paths in list(inputs):
                    self.progress(what.format("linears"), done, len(keys))
                    # Out of the dict, so that what is done is not held while the next block's rows are collected.
                    make = partial(self._write, model, paths, inputs.pop(paths))
                    found[paths] = self.cache.entry(keys[paths], make)
                    del make
                    done += 1
                if last[0].startswith(f"{path}."):
                    break  # the blocks behind it are done
        return {paths: found[paths] for paths in keys}

    def _write(self, model: nn.Module, paths: tuple[str, ...], rows: Inputs, entry: Path) -> None:
        linears = {path: linear_at(model, path) for path in paths}
        device = self.settings.device
        results = calibrate(linears, rows.fit.to(device), rows.held.to(device), self.settings.recipe)
        tensors = {f"{path}.{name}": part for path, result in results.items() for name, part in result.parts.items()}
        tensors |= {f"{path}.bias": result.bias for path, result in results.items() if result.bias is not None}
        save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, entry / PARTS)  # q, k, v share one
        trials = {
            path: {"error": result.error, "trials": [asdict(trial) for trial in result.trials]}
            for path, result in results.items()
        }
        (entry / TRIALS).write_text(json.dumps(trials))

    def _read(self, entry: Path) -> dict[str, Calibrated]:
        trials, stored = json.loads((entry / TRIALS).read_text()), read_header(entry / PARTS)
        found = {}
        for path, said in trials.items():
            tensors = {name.removeprefix(f"{path}."): t for name, t in stored.items() if name.startswith(f"{path}.")}
            bias = tensors.pop("bias").read() if "bias" in tensors else None
            parts = {name: tensor.read() for name, tensor in tensors.items()}
            found[path] = Calibrated(parts, said["error"], bias, [Trial(**trial) for trial in said["trials"]])
        return found
