"""What is measured on the calls of held-out clips: errors, which steps gain by more bits, and which linears."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mxdit.calibrate.experts import Experts, Group, Layers
from mxdit.calibrate.linears import Calibrated
from mxdit.calibrate.observe import choose_calls
from mxdit.calibrate.sensitivity import sensitivities
from mxdit.calibrate.settings import Settings
from mxdit.calibrate.spend import Spent, spend
from mxdit.calibrate.walk import Call
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.evals.run import Progress
from mxdit.evals.velocities import Errors, errors_of, guidance_of, step_lengths
from mxdit.generation.recording import repeat
from mxdit.layers import MXLinear
from mxdit.numerics.formats import SCHEMES

PROBED = 32  # calls of each transformer that sensitivities are estimated from
W4A8 = "mxfp8"  # activations of the steps and linears that a budget pays for


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

    def errors(self, what: str, layers: Layers, steps: StepPolicy) -> dict[str, Errors]:
        """Errors of each transformer with these layers, and at some steps other activations."""
        found = {}
        for name, model in self._experts.models.items():
            velocities = list[list[Tensor]]()
            with self._experts.swapped({name: layers[name]}), self._stepping(layers[name].values(), steps) as at:
                for number, calls in enumerate(self.clips):
                    self._progress(f"{name}: errors, {what}", number, len(self.clips))
                    velocities.append([])
                    for call in calls:
                        if call["expert"] == name:
                            at(call)
                            velocities[-1].append(repeat(model, call))
            found[name] = errors_of(
                zip(self.clips, velocities, strict=True),
                guidance_of(self._settings.held[0], self._experts.models),
                {name},
            )
        return found

    @contextmanager
    def _stepping(self, layers: Iterable[MXLinear], steps: StepPolicy) -> Iterator[Callable[[Call], None]]:
        """Inside, told a call, the layers have the activations of its step; behind it their own again."""
        own = [(layer, layer.activation) for layer in layers]

        def at(call: Call) -> None:
            activation = steps.activation_at(call["step"], self._settings.held[0].steps)
            for layer, its in own:
                layer.activation = activation or its

        try:
            yield at
        finally:
            for layer, its in own:
                layer.activation = its

    def steps(self, linears: Mapping[str, Mapping[str, Calibrated]]) -> tuple[StepPolicy, dict[int, float]]:
        """The steps that gain most by MXFP8 activations, and what each gains: its part in the error of a clip."""
        count = self._settings.held[0].steps
        most = round(self._settings.budget.step_share * count)
        if not most or not self._takes_eight_bits:
            return StepPolicy({}), {}
        layers = {name: self._experts.layers(name, found) for name, found in linears.items()}
        four = self.errors("four-bit activations", layers, StepPolicy({}))
        eight = self.errors("eight-bit activations", layers, StepPolicy({W4A8: tuple(range(count))}, count))
        gains = {step: error - eight[name].steps[step] for name in layers for step, error in four[name].steps.items()}
        best = sorted(gains, key=lambda step: -gains[step])[:most]
        return StepPolicy({W4A8: tuple(step for step in best if gains[step] > 0)}, count), gains

    @property
    def _takes_eight_bits(self) -> bool:
        """Whether four-bit activations can be MXFP8 ones, over the same weights."""
        recipe = self._settings.recipe
        return recipe.method in SCHEMES["w4a8"].weights and recipe.activation == "mxfp4"

    def spent(
        self,
        groups: Mapping[str, Sequence[Group]],
        linears: Mapping[str, Mapping[str, Calibrated]],
        steps: StepPolicy,
    ) -> Spent:
        """What the budget for linears is spent on."""
        budget, activation = self._settings.budget, self._settings.recipe.activation
        if not budget.buys_layers:
            return Spent({name: [] for name in groups}, {name: [] for name in groups})
        every = [group for of in groups.values() for group in of]
        ways = (activation, W4A8) if budget.max_cost is not None and self._takes_eight_bits else (activation,)
        errors = {name: self._sensitivity(name, found, steps, ways) for name, found in linears.items()}
        rows = {name: self._rows(name, found) for name, found in linears.items()}
        spent = spend(
            budget,
            every,
            [{way: sum(errors[group.expert][path][way] for path in group.paths) for way in ways} for group in every],
            activation,
            [rows[group.expert][group.paths[0]] for group in every],
        )
        for name, of in groups.items():
            if len(spent.kept[name]) == sum(len(group.paths) for group in of):
                asked = [field for field in ("target", "max_bytes", "max_cost") if getattr(budget, field) is not None]
                raise InputError(
                    "the budget leaves no linear of a transformer quantized",
                    field=asked[0] if asked else "keep",
                    where=name,
                    hint="Ask for less BF16.",
                )
        return spent

    def _rows(self, expert: str, paths: Iterable[str]) -> dict[str, int]:
        """Rows of input that each linear multiplies in the first clip."""
        model, found = self._experts.models[expert], dict[str, int]()
        calls = [call for call in self.clips[0] if call["expert"] == expert]

        def hook(path: str) -> Any:
            def called(_: nn.Module, inputs: tuple[Tensor]) -> None:
                found[path] = len(calls) * math.prod(inputs[0].shape[:-1])

            return called

        with ExitStack() as hooks:
            for path in paths:
                hooks.callback(model.get_submodule(path).register_forward_pre_hook(hook(path)).remove)
            repeat(model, calls[0])
        return found

    def _sensitivity(
        self, expert: str, found: Mapping[str, Calibrated], steps: StepPolicy, ways: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Each linear's part in the error of a clip, alone, with each of these activations and at steps as they will be."""
        model = self._experts.models[expert]
        calls = choose_calls(self.clips, expert, PROBED, self._settings.seed)
        lengths = step_lengths(self.clips[0])
        layers: dict[str, dict[str, MXLinear]] = {path: {} for path in found}
        for way in ways:
            for path, layer in self._experts.layers(expert, found).items():
                layer.activation = way
                layers[path][way] = layer
        # A step's error counts by how far the step goes; the sum over this expert's steps is what its calls stand for.
        weights = [lengths[call["step"]] ** 2 for call in calls]
        own = sum(lengths[step] ** 2 for step in {call["step"] for call in self.clips[0] if call["expert"] == expert})
        shares: dict[str, dict[str, float]] = {}
        every = [layer for of in layers.values() for layer in of.values()]
        with self._stepping(every, steps) as at:
            for number, so_far in enumerate(
                sensitivities(model, calls, layers, weights=weights, before=at, seed=self._settings.seed), start=1
            ):
                self._progress(f"{expert}: sensitivity", number, len(calls))
                shares = so_far
        return {path: {way: share * own for way, share in of.items()} for path, of in shares.items()}
