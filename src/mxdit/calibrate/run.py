"""A calibration: clips of the float model first, then each transformer linear by linear, a budget spent, and guards on the whole.

What is computed is kept in a cache, a group of linears at a time, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mxdit.backends.environment import environment
from mxdit.calibrate.budget import Curve, Option, curve
from mxdit.calibrate.experts import Experts, Group, linear_at
from mxdit.calibrate.guards import Errors, Guard, clip_guard, errors_of, expert_guards, linear_guard, step_lengths
from mxdit.calibrate.linears import Calibrated, Trial, calibrate
from mxdit.calibrate.observe import CLIP, STATES, Inputs, bytes_of_state, calls_in, choose_calls, inputs_of, record
from mxdit.calibrate.sensitivity import sensitivities
from mxdit.calibrate.settings import Settings
from mxdit.calibrate.walk import Call
from mxdit.checkpoint.files import StoredTensor, read_header
from mxdit.config import SCALE_RULES, MXConfig
from mxdit.config.steps import StepPolicy
from mxdit.evals.cache import Cache, digest_of_code, stats_of
from mxdit.evals.metrics.video_metrics import psnr_db
from mxdit.generation.recording import repeat
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.layers import MXLinear
from mxdit.numerics.formats import SCHEMES, block_format
from mxdit.version import installed

RULES = {rule: number for number, rule in SCALE_RULES.items()}
PARTS, TRIALS = "parts.safetensors", "trials.json"
PROBED = 32  # calls of each transformer that sensitivities are estimated from
HOSTS = ("torch", "diffusers", "transformers")
W4A8 = "mxfp8"  # activations of the steps that a budget pays for

Progress = Callable[[str, float, int], None]  # (what is being done, how much is done, of how much)


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
        guards: the verdicts.
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
            settings.model.path, task=settings.task, dtype=settings.dtype, device=settings.device
        )
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
            with experts.swapped({other: experts.layers(other, linears[other]) for other in linears}):
                learned = [self._clip(request, before) for request in settings.fit]
                judged = [self._clip(request, before) for request in settings.held]
            entries[name] = self._expert(name, groups[name], learned, judged)
            linears[name] = {
                path: result for entry in entries[name].values() for path, result in self._read(entry).items()
            }
            before += [entry.name for entry in entries[name].values()]
        judged = [self._clip(request, []) for request in settings.held]
        online = {name: experts.online(name) for name in experts.models}
        calls = [calls_in(clip) for clip in judged]
        steps, gains = self._steps(linears, calls)
        kept, predicted = self._kept(groups, linears, calls)
        chosen = {
            name: {path: layer for path, layer in experts.layers(name, found).items() if path not in kept[name]}
            for name, found in linears.items()
        }
        errors = {
            "online": self._errors("online", online, calls, StepPolicy({})),
            "calibrated": self._errors("calibrated", chosen, calls, steps),
        }
        clips = {
            "online": self._psnr("online", online, judged, StepPolicy({})),
            "calibrated": self._psnr("calibrated", chosen, judged, steps),
        }
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
        return Outcome(linears, files, kept, steps, errors, clips, predicted, gains, guards)

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

    def _psnr(
        self, what: str, layers: Mapping[str, Mapping[str, MXLinear]], judged: Sequence[Path], steps: StepPolicy
    ) -> list[float]:
        """PSNR against the float model's clips of what these layers make."""
        found, configs = list[float](), self.session.configs
        # What a session needs to know of quantized transformers: that they are, so that a policy goes with them.
        self.session.configs = {name: MXConfig(quant_method=self.settings.recipe.method) for name in configs}
        try:
            with self.experts.swapped(layers):
                for number, (request, clip) in enumerate(zip(self.settings.held, judged, strict=True)):
                    self.progress(f"clips, {what}", number, len(judged))
                    made = self.session.run(replace(request, activation_steps=steps))
                    found.append(psnr_db(np.load(clip / CLIP), made.frames))
        finally:
            self.session.configs = configs
        return found

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
            width = max(linear_at(model, paths[0]).in_features for paths in keys)
            most = max(64, STATES // bytes_of_state(clips[0][0][0], width))
            fit, held = (choose_calls(of, expert, most, settings.seed) for of in clips)
            what = f"{expert}: {{}}"
            done = len(found)
            last = missing[-1]
            for path, inputs in inputs_of(
                model, missing, fit, held, lambda at: self.progress(what.format("inputs"), at, len(fit) + len(held))
            ):
                for paths, rows in inputs.items():
                    self.progress(what.format("linears"), done, len(keys))
                    found[paths] = self.cache.entry(keys[paths], partial(self._write, model, paths, rows))
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

    # -- the budget ----------------------------------------------------------------------------------------------------

    def _errors(
        self,
        what: str,
        layers: Mapping[str, Mapping[str, MXLinear]],
        clips: Sequence[Sequence[Call]],
        steps: StepPolicy,
    ) -> dict[str, Errors]:
        """Errors of each transformer with these layers, on the calls of held-out clips."""
        found = {}
        for name, model in self.experts.models.items():
            velocities = list[list[torch.Tensor]]()
            with self.experts.swapped({name: layers[name]}):
                for number, calls in enumerate(clips):
                    self.progress(f"{name}: errors, {what}", number, len(clips))
                    velocities.append([])
                    for call in calls:
                        if call["expert"] != name:
                            continue
                        at = steps.activation_at(call["step"], self.settings.held[0].steps) if steps else None
                        for layer in layers[name].values():
                            layer.activation = at or self.settings.recipe.activation
                        velocities[-1].append(repeat(model, call))
            for layer in layers[name].values():
                layer.activation = self.settings.recipe.activation
            found[name] = errors_of(
                zip(clips, velocities, strict=True), name, self.experts.guidance(name, self.settings.held[0])
            )
        return found

    def _steps(
        self, linears: Mapping[str, Mapping[str, Calibrated]], clips: Sequence[Sequence[Call]]
    ) -> tuple[StepPolicy, dict[int, float]]:
        """The steps that gain most by MXFP8 activations, and what each gains: its part in the error of a clip."""
        recipe, count = self.settings.recipe, self.settings.held[0].steps
        most = round(self.settings.budget.step_share * count)
        if not most or recipe.method not in SCHEMES["w4a8"].weights or recipe.activation != "mxfp4":
            return StepPolicy({}), {}
        layers = {name: self.experts.layers(name, found) for name, found in linears.items()}
        four = self._errors("four-bit activations", layers, clips, StepPolicy({}))
        eight = self._errors("eight-bit activations", layers, clips, StepPolicy({W4A8: tuple(range(count))}, count))
        gains = {step: error - eight[name].steps[step] for name in layers for step, error in four[name].steps.items()}
        best = sorted(gains, key=lambda step: -gains[step])[:most]
        return StepPolicy({W4A8: tuple(step for step in best if gains[step] > 0)}, count), gains

    def _kept(
        self,
        groups: Mapping[str, Sequence[Group]],
        linears: Mapping[str, Mapping[str, Calibrated]],
        clips: Sequence[Sequence[Call]],
    ) -> tuple[dict[str, list[str]], list[tuple[float, float]]]:
        """The linears of each expert that stay in BF16, and the curve that they were chosen by."""
        budget = self.settings.budget
        every = [group for of in groups.values() for group in of]
        if not budget.share and budget.max_bytes is None and budget.target is None:
            return {name: [] for name in groups}, []
        errors = {name: self._sensitivity(name, found, clips) for name, found in linears.items()}
        row, whole = block_format(self.settings.recipe.method), sum(group.parameters for group in every)
        found = curve(
            [
                [
                    Option("quantized", sum(errors[group.expert][path] for path in group.paths), 0),
                    Option("bf16", 0.0, group.parameters),
                ]
                for group in every
            ]
        )
        room = int(budget.share * whole)
        if budget.max_bytes is not None:
            four_bit = row.nbytes(1, 512) / 512  # bytes of a parameter, scales included
            room = int((budget.max_bytes - four_bit * whole) / (2 - four_bit))
        if budget.target is not None:
            room = found.least_budget(budget.target * float(found.errors[0]))
        chosen = found.choice(room)
        kept: dict[str, list[str]] = {name: [] for name in groups}
        for group, option in zip(every, chosen, strict=True):
            if option.name == "bf16":
                kept[group.expert] += group.paths
        return kept, _points(found, whole)

    def _sensitivity(
        self, expert: str, found: Mapping[str, Calibrated], clips: Sequence[Sequence[Call]]
    ) -> dict[str, float]:
        """Each linear's part in the error of a clip, alone."""
        model = self.experts.models[expert]
        calls = choose_calls(clips, expert, PROBED, self.settings.seed)
        lengths = step_lengths(clips[0])
        layers = {path: {"quantized": layer} for path, layer in self.experts.layers(expert, found).items()}
        # A step's error counts by how far the step goes; the sum over this expert's steps is what its calls stand for.
        weights = [lengths[call["step"]] ** 2 for call in calls]
        own = sum(lengths[step] ** 2 for step in {call["step"] for call in clips[0] if call["expert"] == expert})
        shares: dict[str, dict[str, float]] = {}
        for number, so_far in enumerate(
            sensitivities(model, calls, layers, weights=weights, seed=self.settings.seed), start=1
        ):
            self.progress(f"{expert}: sensitivity", number, len(calls))
            shares = so_far
        return {path: ways["quantized"] * own for path, ways in shares.items()}


def _points(found: Curve, whole: int) -> list[tuple[float, float]]:
    """The curve at every percent of the parameters."""
    ends = [round(percent / 100 * (found.errors.size - 1)) for percent in range(101)]
    return [(index * found.unit / whole, float(found.errors[index] / found.errors[0])) for index in ends]
