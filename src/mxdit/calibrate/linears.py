"""The calibration of linears that share an input, step by step, each kept only where inputs that it has not seen agree.

Steps, in order: `smooth` their input; `search` the scales; `gptq`; `refit` the outer scales. And off by default `regress`, which
rounds another weight, and `bias`. The measure is always one: what the layer gives, by the operator that will run, against what
the float layer gives in FP32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mxdit.calibrate import scales, smooth
from mxdit.calibrate.gptq import DAMPING, gptq, inverse_factor
from mxdit.calibrate.targets import corrected_bias, regression_target
from mxdit.errors import ConfigError, InputError
from mxdit.layers import MXLinear
from mxdit.numerics.codec import Packed
from mxdit.numerics.formats import block_format, scheme_for
from mxdit.weights import quantize_weight

STEPS = ("smooth", "search", "gptq", "refit", "regress", "bias")
DEFAULT = ("smooth", "search", "gptq", "refit")
SEARCHED = 1024  # rows of input that candidates are tried on
CHUNK = 4096  # rows that a Hessian is added up from at once
FEW = 2.0  # rows a channel: what is learned from fewer is often no better on others


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear.

    Attributes:
        method, rule: of the weights, as `mxdit.quantize_weight` takes them.
        activation: what activations are quantized to.
        steps: of `STEPS`.
        damping: for `gptq`.
        lam: for `regress`.
    """

    method: str
    activation: str
    rule: str | None = None
    steps: tuple[str, ...] = DEFAULT
    damping: float = DAMPING
    lam: float = 0.1

    def __post_init__(self) -> None:
        scheme_for(self.method, self.activation)
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown:
            raise ConfigError("no such step", field="steps", got=unknown[0], expected=", ".join(STEPS))
        if not 0 < self.lam < float("inf"):
            raise ConfigError("lam is no positive number", field="lam", got=self.lam)

    def does(self, step: str) -> bool:
        """Whether a step is asked for, and this format has it."""
        row = block_format(self.method)
        possible = {"smooth": row.smooths, "refit": row.outer is not None}.get(step, True)
        return step in self.steps and possible


@dataclass(frozen=True)
class Trial:
    """One step on one linear, and whether it stayed.

    error   that it came to on held-out inputs, as a share of the output's power.
    note    what was chosen.
    """

    step: str
    error: float
    kept: bool
    note: str = ""


@dataclass
class Calibrated:
    """What became of one linear: the tensors of its record, a bias where that changed, and how it came about.

    error   of what it is, on held-out inputs.
    rows    of input that there were to learn from, for each channel.
    """

    parts: dict[str, Tensor]
    error: float
    rows: float
    bias: Tensor | None = None
    trials: list[Trial] = field(default_factory=list)

    @property
    def online(self) -> float:
        """The error of the linear as quantizing online makes it."""
        return self.trials[0].error


def calibrate(linears: Mapping[str, nn.Linear], fit: Tensor, held: Tensor, recipe: Recipe) -> dict[str, Calibrated]:
    """Calibrate linears that share their input.

    Args:
        linears: path -> float linear, (N, K) each.
        fit: (T, K) inputs to learn from, in the model's dtype, on the device to work on.
        held: (R, K) inputs to judge by.
        recipe: what is done.

    Raises InputError for inputs that are no numbers.
    """
    for name, x in (("fit", fit), ("held", held)):
        # In pieces: at once this takes thrice the memory of the inputs, more than anything after it.
        if not all(bool(torch.isfinite(rows).all()) for rows in x.split(CHUNK)):
            raise InputError(
                "the inputs of a layer hold infs or NaNs",
                where=next(iter(linears)),
                field=name,
                hint="Try BF16 or FP32 as the dtype.",
            )
    return _Group(linears, fit, held, recipe).calibrated()


class _Group:
    def __init__(self, linears: Mapping[str, nn.Linear], fit: Tensor, held: Tensor, recipe: Recipe) -> None:
        self.recipe, self.fit, self.held, self.device = recipe, fit, held, fit.device
        self.paths = list(linears)
        self.weights = [linear.weight.detach().to(self.device) for linear in linears.values()]
        self.biases = [None if m.bias is None else m.bias.detach().to(self.device) for m in linears.values()]
        self.exact = [self._exact(i, held) for i in range(len(self.paths))]
        self.power = [float(y.double().square().sum()) for y in self.exact]

    def calibrated(self) -> dict[str, Calibrated]:
        results = self._steps(self.recipe.does("smooth"))
        if any(result.error > result.online for result in results):
            # What smoothing gains the other members, this one pays for; nothing but leaving it out helps it.
            tried = [trial for result in results for trial in result.trials if trial.step == "smooth"]
            results = self._steps(False)
            for result, trial in zip(results, tried, strict=True):
                result.trials.insert(1, replace(trial, kept=False, note=f"{trial.note}, for another's sake"))
        return dict(zip(self.paths, results, strict=True))

    def _steps(self, smooth: bool) -> list[Calibrated]:
        recipe = self.recipe
        found = [self._rounded(i, None) for i in range(len(self.paths))]
        rows = len(self.fit) / self.fit.shape[1]
        results = [Calibrated(parts, error, rows, trials=[Trial("online", error, True)]) for parts, error in found]
        mul_scale = self._smoothed(results) if smooth else None
        if any(recipe.does(step) for step in ("search", "gptq", "refit", "regress")):
            self._rounded_by_hessian(results, mul_scale)
        if recipe.does("bias"):
            for i, result in enumerate(results):
                self._bias(i, result)
        return results

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _smoothed(self, results: list[Calibrated]) -> Tensor | None:
        """Smooth the input of all members, or of none."""
        rows = self.fit[:: max(1, len(self.fit) // SEARCHED)][:SEARCHED]
        whole = torch.cat(self.weights)
        exact = rows.float() @ whole.float().mT

        def error(mul_scale: Tensor | None) -> float:
            given = self._layer(self._online(whole, mul_scale), None)(rows)
            return float((given.float() - exact).double().square().sum())

        chosen, _ = smooth.best(smooth.candidates(rows, whole), error)
        if chosen.mul_scale is None:
            for result in results:
                result.trials.append(Trial("smooth", result.error, False, chosen.name))
            return None
        tried = [self._rounded(i, chosen.mul_scale) for i in range(len(self.paths))]
        noise = [
            sum(p * e for p, e in zip(self.power, errors, strict=True))
            for errors in ([error for _, error in tried], [result.error for result in results])
        ]
        kept = noise[0] < noise[1]
        for result, (parts, error_now) in zip(results, tried, strict=True):
            result.trials.append(Trial("smooth", error_now, kept, chosen.name))
            if kept:
                result.parts, result.error = parts, error_now
        return chosen.mul_scale if kept else None

    def _rounded_by_hessian(self, results: list[Calibrated], mul_scale: Tensor | None) -> None:
        recipe, method = self.recipe, self.recipe.method
        hessian, cross = self._hessian(mul_scale, recipe.does("regress"))
        whole = _folded(torch.cat(self.weights), mul_scale)
        if recipe.does("search"):
            self._try("search", scales.search(whole, hessian.diagonal(), method), mul_scale, results)
        target, note = whole, ""
        if cross is not None:
            target, note = regression_target(whole, hessian, cross, recipe.lam), f"lam {recipe.lam:g}"
        if recipe.does("gptq"):
            factor, damping = inverse_factor(hessian, recipe.damping)
            if damping != recipe.damping:
                note = f"{note}, damping {damping:g}".lstrip(", ")
            rounded = gptq(target, hessian, factor, method)
            del factor
            self._try("gptq" if cross is None else "regress", rounded, mul_scale, results, note)
        elif cross is not None:
            rounded = scales.search(target, hessian.diagonal(), method)
            self._try("regress", rounded, mul_scale, results, note)
        else:
            rounded = scales.search(whole, hessian.diagonal(), method)
        if recipe.does("refit"):
            self._try("refit", scales.refit(rounded, target, hessian), mul_scale, results)

    def _bias(self, i: int, result: Calibrated) -> None:
        rows = self.fit[:: max(1, len(self.fit) // CHUNK)][:CHUNK]
        given = self._layer(result.parts, self.biases[i])(rows)
        bias = corrected_bias(self.biases[i], self._exact(i, rows).to(given.dtype), given)
        error = self._error(i, result.parts, bias)
        kept = error < result.error
        result.trials.append(Trial("bias", error, kept))
        if kept:
            result.bias, result.error = bias, error

    def _try(
        self, step: str, packed: Packed, mul_scale: Tensor | None, results: Sequence[Calibrated], note: str = ""
    ) -> None:
        """Take each member's rows of a rounded weight, where that lowers its error."""
        first = 0
        for i, result in enumerate(results):
            rows = slice(first, first + len(self.weights[i]))
            first = rows.stop
            outer = None if packed.outer is None else packed.outer[rows, :, None]
            parts = {"weight": packed.codes[rows], "weight_scale": packed.scale[rows]}
            parts |= {} if outer is None else {"weight_dual_scale": outer}
            parts |= {} if mul_scale is None else {"mul_scale": mul_scale}
            parts = {name: part.contiguous() for name, part in parts.items()}
            error = self._error(i, parts, self.biases[i])
            kept = error < result.error
            result.trials.append(Trial(step, error, kept, note))
            if kept:
                result.parts, result.error = parts, error

    # -- what they are made of -----------------------------------------------------------------------------------------

    def _hessian(self, mul_scale: Tensor | None, cross: bool) -> tuple[Tensor, Tensor | None]:
        """Xq^T Xq / T of the inputs as the layer multiplies them; and (X m - Xq)^T Xq / T."""
        k = self.fit.shape[1]
        hessian = torch.zeros(k, k, device=self.device)
        crossed = torch.zeros(k, k, device=self.device) if cross else None
        for rows in self.fit.split(CHUNK):
            quantized = self._quantized_input(rows, mul_scale)
            hessian.addmm_(quantized.mT, quantized)
            if crossed is not None:
                smoothed = rows if mul_scale is None else rows * mul_scale.to(rows.dtype)
                crossed.addmm_((smoothed.float() - quantized).mT, quantized)
        if crossed is not None:
            crossed /= len(self.fit)
        return hessian.div_(len(self.fit)), crossed

    def _quantized_input(self, x: Tensor, mul_scale: Tensor | None) -> Tensor:
        """What the layer multiplies its weight by, (T, K) fp32."""
        recipe, ops = self.recipe, torch.ops.mxdit
        fmt = scheme_for(recipe.method, recipe.activation).weights[recipe.method]
        if fmt == "mxfp4_dualscale":
            x = x.to(torch.bfloat16) if x.dtype is torch.float32 else x  # as the layer does
            codes, outer, scale = ops.quantize_dual(x, mul_scale, "rint")
            return ops.dequantize(codes, scale, outer, fmt, torch.float32)
        x = x if mul_scale is None else x * mul_scale.to(x.dtype)
        if fmt is None:
            return x.float()
        rule = recipe.rule or block_format(recipe.method).default_rule
        codes, scale = ops.quantize(x, fmt, rule if fmt == "mxfp4" else "ocp", "rint")
        return ops.dequantize(codes, scale, None, fmt, torch.float32)

    def _online(self, weight: Tensor, mul_scale: Tensor | None) -> dict[str, Tensor]:
        """The record of a weight as quantizing online makes it, under a `mul_scale`."""
        folded = weight if mul_scale is None else _folded(weight, mul_scale).to(weight.dtype)
        return quantize_weight(folded, self.recipe.method, rule=self.recipe.rule, mul_scale=mul_scale)

    def _rounded(self, i: int, mul_scale: Tensor | None) -> tuple[dict[str, Tensor], float]:
        parts = self._online(self.weights[i], mul_scale)
        return parts, self._error(i, parts, self.biases[i])

    def _error(self, i: int, parts: Mapping[str, Tensor], bias: Tensor | None) -> float:
        given = self._layer(parts, bias)(self.held)
        noise = float((given.float() - self.exact[i]).double().square().sum())
        return noise / self.power[i] if self.power[i] else noise

    def _exact(self, i: int, x: Tensor) -> Tensor:
        bias = self.biases[i]
        return nn.functional.linear(x.float(), self.weights[i].float(), None if bias is None else bias.float())

    def _layer(self, parts: Mapping[str, Tensor], bias: Tensor | None) -> MXLinear:
        return layer_of(parts, bias, self.recipe.method, self.recipe.activation, self.recipe.rule, self.fit.shape[1])


def layer_of(
    parts: Mapping[str, Tensor], bias: Tensor | None, method: str, activation: str, rule: str | None, k: int
) -> MXLinear:
    """The layer that the tensors of a record are."""
    layer = MXLinear(
        k, len(parts["weight"]), False, method=method, activation=activation, rule=rule, smooth="mul_scale" in parts,
        device="meta",
    )  # fmt: skip
    layer.load(parts)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _folded(weight: Tensor, mul_scale: Tensor | None) -> Tensor:
    """The weight (N, K) fp32 that inputs times `mul_scale` are multiplied by."""
    return weight.float() if mul_scale is None else weight.float() / mul_scale
