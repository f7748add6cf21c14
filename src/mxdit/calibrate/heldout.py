"""What is measured on the calls of held-out clips: errors, which steps gain by more bits, and which linears."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from mxdit.calibrate.budget import Curve, Option, curve
from mxdit.calibrate.experts import Experts, Group, Layers
from mxdit.calibrate.guards import Errors, errors_of, step_lengths
from mxdit.calibrate.linears import Calibrated
from mxdit.calibrate.observe import choose_calls
from mxdit.calibrate.sensitivity import sensitivities
from mxdit.calibrate.settings import Settings
from mxdit.calibrate.walk import Call
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.evals.run import Progress
from mxdit.generation.recording import repeat
from mxdit.layers import MXLinear
from mxdit.numerics.formats import SCHEMES, block_format

PROBED = 32  # calls of each transformer that sensitivities are estimated from
W4A8 = "mxfp8"  # activations of the steps that a budget pays for


class HeldOut:
    """The calls of the float model's clips that nothing was learned from, and what is found out on them.

    Args:
        settings: of the calibration.
        experts: the transformers.
        clips: the calls of each clip.
        progress: told about every part of the work.
    """

    def __init__(
        self, settings: Settings, experts: Experts, clips: Sequence[Sequence[Call]], progress: Progress
    ) -> None:
        self.clips = clips
        self._settings, self._experts, self._progress = settings, experts, progress

    def errors(
        self,
        what: str,
        layers: Layers,
        steps: StepPolicy,
    ) -> dict[str, Errors]:
        """Errors of each transformer with these layers, on the calls of held-out clips."""
        found = {}
        for name, model in self._experts.models.items():
            velocities = list[list[torch.Tensor]]()
            with self._experts.swapped({name: layers[name]}):
                for number, calls in enumerate(self.clips):
                    self._progress(f"{name}: errors, {what}", number, len(self.clips))
                    velocities.append([])
                    for call in calls:
                        if call["expert"] != name:
                            continue
                        self._set(layers[name], steps, call)
                        velocities[-1].append(repeat(model, call))
            self._set(layers[name], StepPolicy({}), self.clips[0][0])
            found[name] = errors_of(
                zip(self.clips, velocities, strict=True), name, self._experts.guidance(name, self._settings.held[0])
            )
        return found

    def _set(self, layers: Mapping[str, MXLinear], steps: StepPolicy, call: Call) -> None:
        """Let layers have the activation that a policy gives them at a call."""
        at = steps.activation_at(call["step"], self._settings.held[0].steps) if steps else None
        for layer in layers.values():
            layer.activation = at or self._settings.recipe.activation

    def steps(self, linears: Mapping[str, Mapping[str, Calibrated]]) -> tuple[StepPolicy, dict[int, float]]:
        """The steps that gain most by MXFP8 activations, and what each gains: its part in the error of a clip."""
        recipe, count = self._settings.recipe, self._settings.held[0].steps
        most = round(self._settings.budget.step_share * count)
        if not most or recipe.method not in SCHEMES["w4a8"].weights or recipe.activation != "mxfp4":
            return StepPolicy({}), {}
        layers = {name: self._experts.layers(name, found) for name, found in linears.items()}
        four = self.errors("four-bit activations", layers, StepPolicy({}))
        eight = self.errors("eight-bit activations", layers, StepPolicy({W4A8: tuple(range(count))}, count))
        gains = {step: error - eight[name].steps[step] for name in layers for step, error in four[name].steps.items()}
        best = sorted(gains, key=lambda step: -gains[step])[:most]
        return StepPolicy({W4A8: tuple(step for step in best if gains[step] > 0)}, count), gains

    def kept(
        self,
        groups: Mapping[str, Sequence[Group]],
        linears: Mapping[str, Mapping[str, Calibrated]],
        steps: StepPolicy,
    ) -> tuple[dict[str, list[str]], list[tuple[float, float]]]:
        """The linears of each expert that stay in BF16, and the curve that they were chosen by."""
        budget = self._settings.budget
        every = [group for of in groups.values() for group in of]
        if not budget.share and budget.max_bytes is None and budget.target is None:
            return {name: [] for name in groups}, []
        errors = {name: self._sensitivity(name, found, steps) for name, found in linears.items()}
        row, whole = block_format(self._settings.recipe.method), sum(group.parameters for group in every)
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
            if room < 0:
                raise InputError(
                    "fewer bytes than the quantized weights take",
                    field="max_bytes",
                    got=budget.max_bytes,
                    expected=f"at least {math.ceil(four_bit * whole)}",
                )
        if budget.target is not None:
            room = found.least_budget(budget.target * float(found.errors[0]))
        chosen = found.choice(room)
        kept: dict[str, list[str]] = {name: [] for name in groups}
        for group, option in zip(every, chosen, strict=True):
            if option.name == "bf16":
                kept[group.expert] += group.paths
        for name, of in groups.items():
            if len(kept[name]) == sum(len(group.paths) for group in of):
                asked = {"target": budget.target, "max_bytes": budget.max_bytes, "keep": budget.share}
                raise InputError(
                    "the budget leaves no linear of a transformer quantized",
                    field=next(field for field, value in asked.items() if value is not None),
                    where=name,
                    hint="Ask for less BF16.",
                )
        return kept, _points(found, whole)

    def _sensitivity(self, expert: str, found: Mapping[str, Calibrated], steps: StepPolicy) -> dict[str, float]:
        """Each linear's part in the error of a clip, alone, at steps with the activations that they will have."""
        model = self._experts.models[expert]
        calls = choose_calls(self.clips, expert, PROBED, self._settings.seed)
        lengths = step_lengths(self.clips[0])
        layers = {path: {"quantized": layer} for path, layer in self._experts.layers(expert, found).items()}
        # A step's error counts by how far the step goes; the sum over this expert's steps is what its calls stand for.
        weights = [lengths[call["step"]] ** 2 for call in calls]
        own = sum(lengths[step] ** 2 for step in {call["step"] for call in self.clips[0] if call["expert"] == expert})

        def before(call: Call) -> None:
            self._set({path: ways["quantized"] for path, ways in layers.items()}, steps, call)

        shares: dict[str, dict[str, float]] = {}
        for number, so_far in enumerate(
            sensitivities(model, calls, layers, weights=weights, before=before, seed=self._settings.seed), start=1
        ):
            self._progress(f"{expert}: sensitivity", number, len(calls))
            shares = so_far
        return {path: ways["quantized"] * own for path, ways in shares.items()}


def _points(found: Curve, whole: int) -> list[tuple[float, float]]:
    """The curve at every percent of the parameters."""
    ends = [round(percent / 100 * (found.errors.size - 1)) for percent in range(101)]
    return [(index * found.unit / whole, float(found.errors[index] / found.errors[0])) for index in ends]
