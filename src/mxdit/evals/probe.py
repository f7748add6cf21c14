"""How far a mode's velocities and layers are from BF16's, on the recorded calls of a BF16 trajectory.

Repeating those calls in another mode measures that mode alone, without what earlier steps did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.config.attention import AttentionPolicy
from mxdit.evals.velocities import errors_of
from mxdit.generation.recording import repeat, transformers_of
from mxdit.integrations.diffusers_attention import AttentionSwitch
from mxdit.layers import MXLinear
from mxdit.models import spec_of
from mxdit.quantize.recorded import recorded_config
from mxdit.quantize.steps import StepSwitch

SQNR_LIMIT = 300.0  # dB; what an exact result counts as
STEPS = 3  # of each expert, from which the inputs of its linears are taken


def compare(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """(||value - reference|| / ||reference||, cosine of the two), computed in fp64 over all elements; on any devices."""
    a, b = value.detach().cpu().double().flatten(), reference.cpu().double().flatten()
    norms = float(a.norm() * b.norm())
    return float((a - b).norm() / b.norm()), float(a @ b) / norms if norms else 0.0


def embeddings_of(pipeline: Any, prompt: str) -> list[Tensor]:
    """What the pipeline's text encoders make of a prompt: every float tensor that it gives to its transformers, on the CPU."""
    taken = signature(pipeline.encode_prompt).parameters
    # What has no default has to be given: FLUX's `prompt_2`, where none means the same prompt.
    given: dict[str, Any] = {name: None for name, of in taken.items() if of.default is Parameter.empty}
    if "do_classifier_free_guidance" in taken:
        given["do_classifier_free_guidance"] = False  # nothing for the empty prompt
    with torch.no_grad():
        made = pipeline.encode_prompt(**{**given, "prompt": prompt})
    return [part.float().cpu() for part in made if isinstance(part, Tensor) and part.is_floating_point()]


def velocity_errors(
    pipeline: Any,
    calls: Sequence[Mapping[str, Any]],
    guidance: Mapping[str, float],
    attention: Mapping[str, AttentionPolicy] | None = None,
) -> dict[str, Any]:
    """How far this pipeline's velocities are from the recorded ones, over the calls of one clip.

    Args:
        calls: in order, of all experts.
        guidance: expert -> scale with which they were made.
        attention: expert -> how it is computed here, where a policy says so.

    Returns {"steps": [{"step", "velocity_error", "velocity_cosine"}, each the mean over the step's calls], and of the whole clip
    "guided_error", "accumulated_error", "slope", "guidance_slope"}, as `DEFINITIONS` has them.
    """
    experts, steps, length = transformers_of(pipeline), {}, 1 + max((call["step"] for call in calls), default=0)
    velocities = list[Tensor]()
    with ExitStack() as switches:
        for name, model in experts.items():
            if attention and name in attention:
                by_layer = AttentionSwitch(model, attention[name], lambda: (call["step"], length))
                switches.callback(by_layer.remove)
            config = recorded_config(model)
            if config is not None and config.activation_steps:  # its layers have the activations of the call's step
                switch = StepSwitch(model, config.activation_steps, lambda: (call["step"], length))
                switches.callback(switch.remove)
        for call in calls:
            velocities.append(repeat(experts[call["expert"]], call).cpu())
            steps.setdefault(call["step"], []).append(compare(velocities[-1], call["velocity"]))
    errors = errors_of([(calls, velocities)], guidance, guidance)
    return {
        "steps": [
            {
                "step": step,
                "velocity_error": sum(error for error, _ in found) / len(found),
                "velocity_cosine": sum(cosine for _, cosine in found) / len(found),
            }
            for step, found in steps.items()
        ],
        "guided_error": math.sqrt(errors.guided),
        "accumulated_error": math.sqrt(errors.accumulated),
        "slope": errors.slope,
        "guidance_slope": errors.slope_guidance,
    }


def capture_layers(pipeline: Any, calls: Sequence[Mapping[str, Any]], rows: int, directory: Path) -> None:
    """Write the inputs of every linear inside the blocks, and the exact outputs, for a few steps of each expert.

    The steps are the first, a middle and the last conditional call of each expert. A file a step, EXPERT-STEP.pt, holds
    {path: (x (R, K) in the model's dtype, y (R, N) fp32)}; R is at most `rows`, a choice that is the same in every run. y is
    computed in fp32 from the float weight.
    """
    for name, model in transformers_of(pipeline).items():
        steps = {call["step"]: call for call in reversed(calls) if call["expert"] == name}  # a step's first call wins
        ordered = sorted(steps)
        for step in sorted(
            {ordered[round(i * (len(ordered) - 1) / (STEPS - 1))] for i in range(STEPS if ordered else 0)}
        ):
            torch.save(_capture(model, steps[step], rows), directory / f"{name}-{step}.pt")


def _capture(model: nn.Module, call: Mapping[str, Any], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    spec, found = spec_of(model), {}

    def hook(path: str) -> Any:
        def called(linear: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows].sort().values
            x = x[chosen.to(x.device)]
            bias = None if linear.bias is None else linear.bias.float()
            y = nn.functional.linear(x.float(), linear.weight.float(), bias)
            found[path] = (x.cpu(), y.cpu())

        return called

    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and spec.place_of(path)
    ]
    hooks = [module.register_forward_hook(hook(path)) for path, module in linears]
    try:
        repeat(model, call)
    finally:
        for one in hooks:
            one.remove()
    return found


def layer_errors(pipeline: Any, captured: Sequence[Path]) -> list[dict[str, Any]]:
    """The SQNR of every quantized linear on captured inputs, worst first.

    SQNR is 10 log10(sum of y^2 / sum of (y_q - y)^2) in dB over all captured rows, y exact and y_q of the quantized layer;
    `SQNR_LIMIT` for an exact result.

    Args:
        captured: directories that `capture_layers` wrote.

    Returns {"expert", "path", "shape": [N, K], "sqnr_db", "n": rows}.
    """
    found = []
    for name, model in transformers_of(pipeline).items():
        layers = {path: module for path, module in model.named_modules() if isinstance(module, MXLinear)}
        sums = {path: [0.0, 0.0, 0] for path in layers}
        for file in sorted(file for directory in captured for file in directory.glob(f"{name}-*.pt")):
            held = torch.load(file, weights_only=True, mmap=True)
            for path, layer in layers.items():
                x, y = (tensor.to(layer.weight.device) for tensor in held[path])
                with torch.no_grad():
                    error = layer(x).float() - y
                sums[path][0] += float(y.cpu().double().square().sum())
                sums[path][1] += float(error.cpu().double().square().sum())
                sums[path][2] += len(x)
        found += [
            {
                "expert": name,
                "path": path,
                "shape": [layers[path].out_features, layers[path].in_features],
                "sqnr_db": _decibels(signal, noise),
                "n": rows,
            }
            for path, (signal, noise, rows) in sums.items()
            if rows
        ]
    return sorted(found, key=lambda layer: layer["sqnr_db"])


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return SQNR_LIMIT
    return min(SQNR_LIMIT, 10 * math.log10(signal / noise)) if signal else -SQNR_LIMIT
