"""A calibration: clips of the float model, then each transformer linear by linear, a budget spent, and guards on the whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxdit.backends.environment import environment
from mxdit.calibrate.experts import Experts, Group, Layers, linear_at
from mxdit.calibrate.guards import Guard, budget_guard, clip_guard, expert_guards, linear_guard
from mxdit.calibrate.heldout import W4A8, HeldOut
from mxdit.calibrate.linears import Calibrated, calibrate
from mxdit.calibrate.observe import CLIP, SEARCH_ROWS, calls_in, record
from mxdit.calibrate.page import page
from mxdit.calibrate.results import PARTS, calibrated_groups, read_group
from mxdit.calibrate.settings import Settings
from mxdit.calibrate.spend import Spent
from mxdit.checkpoint.files import StoredTensor, read_header
from mxdit.config import SCALE_RULES, MXConfig
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.evals.cache import Cache, digest_of_code, place_of, stats_of
from mxdit.evals.metrics.video_metrics import psnr_db
from mxdit.evals.run import Progress
from mxdit.evals.velocities import Errors
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.numerics.formats import block_format
from mxdit.version import installed

RULES = {rule: number for number, rule in SCALE_RULES.items()}
REPORT, PAGE = "calibration.json", "calibration.html"
SHOWN = 3  # held-out clips that the report shows
HOSTS = ("torch", "diffusers", "transformers")


@dataclass
class Outcome:
    """What a calibration came to.

    Attributes:
        linears: expert -> path -> how it was calibrated.
        groups: expert -> its linears, those together that share an input.
        files: expert -> name of a tensor -> where the calibrated one is stored.
        spent: the linears that have more bits.
        steps: the policy of activations, empty for none.
        errors: "online", "calibrated", and where linears were bought more bits "without the budget" for them -> expert -> errors.
        clips: "online" and "calibrated" -> PSNR in dB of each held-out clip against BF16's.
        gains: step -> what MXFP8 activations take of the error there; empty where no steps were asked for.
        guards: the verdicts.
        shown: for some held-out clips, the prompt, and (label, clip) of the float model's, online, and calibrated.
        seconds: part of the work -> what it took, now or in the run that the cache has it from.
    """

    linears: dict[str, dict[str, Calibrated]]
    groups: dict[str, list[Group]]
    files: dict[str, dict[str, StoredTensor]]
    spent: Spent
    steps: StepPolicy
    errors: dict[str, dict[str, Errors]]
    clips: dict[str, list[float]]
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
        self._key = {
            "mxdit": digest_of_code(),
            "versions": {name: installed(name) for name in HOSTS},
            "device": place_of(environment(settings.device)),
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
            if idle := experts.models.keys() - {call["expert"] for call in calls_in(learned[0])}:
                raise InputError(
                    "no step of a clip is this transformer's",
                    field="steps",
                    where=", ".join(idle),
                    got=settings.fit[0].steps,
                    expected="so many that each transformer has one",
                )
            with self._timed("linears"):
                entries[name] = calibrated_groups(
                    experts.models[name],
                    groups[name],
                    learned,
                    judged,
                    settings,
                    self.cache,
                    self._key,
                    self.progress,
                )
            linears[name] = {
                path: result for entry in entries[name].values() for path, result in read_group(entry).items()
            }
            before += [entry.name for entry in entries[name].values()]
        judged = [self._clip(request, []) for request in settings.held]
        online = {name: experts.online(name) for name in experts.models}
        held = HeldOut(settings, experts, [calls_in(clip) for clip in judged], self.progress)
        with self._timed("budget"):
            steps, gains = held.steps(linears)
            spent = held.spent(groups, linears, steps)
        quantized = {name: experts.layers(name, found) for name, found in linears.items()}
        chosen = {
            name: {path: layer for path, layer in layers.items() if path not in spent.kept[name]}
            for name, layers in quantized.items()
        }
        with self._timed("errors"):
            errors = {"online": held.errors("online", online, StepPolicy({}))}
            if any((*spent.kept.values(), *spent.raised.values())):
                errors["without the budget"] = held.errors("without the budget", quantized, steps)
            for name, paths in spent.raised.items():
                for path in paths:
                    chosen[name][path].activation = W4A8
            errors["calibrated"] = held.errors("calibrated", chosen, steps)
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
            *budget_guard(spent.predicted, errors),
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
        return Outcome(linears, groups, files, spent, steps, errors, clips, gains, guards, shown, dict(self._seconds))

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
                "ignored_layers": outcome.spent.kept[expert],
                "w4a8_fallback_layers": outcome.spent.raised[expert],
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
