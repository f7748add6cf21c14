"""The transformers of a pipeline with other layers in place of their linears, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from mxdit.calibrate.linears import Calibrated, Recipe, layer_of
from mxdit.config import MXConfig
from mxdit.generation.recording import transformers_of
from mxdit.generation.session import Session
from mxdit.layers import MXLinear
from mxdit.models import spec_of
from mxdit.numerics.formats import block_format
from mxdit.quantize.apply import swap
from mxdit.quantize.plan import plan
from mxdit.weights import quantize_weight

Layers = Mapping[str, Mapping[str, MXLinear]]  # expert -> path -> layer


@dataclass(frozen=True)
class Group:
    """Linears that share an input: what is smoothed together, and kept in BF16 together.

    parameters  of their weights.
    nbytes      of their weights, quantized.
    """

    expert: str
    paths: tuple[str, ...]
    parameters: int
    nbytes: int


class Experts:
    """The float transformers of a session, and the quantized layers that take the place of their linears for a while.

    Attributes:
        models: name -> transformer, in the order in which they run.
    """

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self.models = transformers_of(session.load())
        self._recipe, self._device = recipe, session.device
        self._home = "cpu" if session.offload else session.device  # where layers lie while they do not run

    def groups(self, expert: str) -> list[Group]:
        """The linears that are calibrated, in the order of their blocks."""
        model = self.models[expert]
        decisions = plan(model, MXConfig(quant_method=self._recipe.method, num_bf16_fallback_layers=0))
        paths = [path for path, decision in decisions.items() if decision.scheme]
        shared = {path: tuple(members) for members in spec_of(model).sharing(paths) for path in members}
        grouped = dict.fromkeys(shared.get(path, (path,)) for path in paths)
        row = block_format(self._recipe.method)
        found = []
        for of in grouped:
            shapes = [tuple(linear_at(model, path).weight.shape) for path in of]
            found.append(Group(expert, of, sum(n * k for n, k in shapes), sum(row.nbytes(n, k) for n, k in shapes)))
        return found

    def layers(self, expert: str, found: Mapping[str, Calibrated]) -> dict[str, MXLinear]:
        """The layers that calibrated linears are."""
        return {path: self._layer(expert, path, result.parts, result.bias) for path, result in found.items()}

    def online(self, expert: str) -> dict[str, MXLinear]:
        """The layers of the same linears as quantizing online makes them."""
        recipe, model = self._recipe, self.models[expert]
        paths = [path for group in self.groups(expert) for path in group.paths]
        weights = {path: linear_at(model, path).weight for path in paths}
        return {
            path: self._layer(
                expert, path, quantize_weight(weight.to(self._device), recipe.method, rule=recipe.rule), None
            )
            for path, weight in weights.items()
        }

    def _layer(self, expert: str, path: str, parts: Mapping[str, Tensor], bias: Tensor | None) -> MXLinear:
        recipe, linear = self._recipe, linear_at(self.models[expert], path)
        bias = linear.bias if bias is None else bias
        return layer_of(
            {name: part.to(self._home) for name, part in parts.items()},
            None if bias is None else bias.detach().to(self._home),
            recipe.method,
            recipe.activation,
            recipe.rule,
            linear.in_features,
        )

    @contextmanager
    def swapped(self, layers: Layers) -> Iterator[None]:
        """Inside, the transformers have these layers."""
        floats = {
            name: {path: self.models[name].get_submodule(path) for path in found} for name, found in layers.items()
        }
        try:
            for name, found in layers.items():
                for path, layer in found.items():
                    swap(self.models[name], path, layer)
            yield
        finally:
            for name, found in floats.items():
                for path, linear in found.items():
                    swap(self.models[name], path, linear)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear at a path of a float model."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear
