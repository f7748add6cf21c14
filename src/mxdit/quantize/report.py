"""`QuantReport`: what every linear of a model is, and what quantizing saved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mxdit.config.steps import ranges
from mxdit.embedding import MXEmbedding
from mxdit.layers import MXLinear, linears_of
from mxdit.models import spec_of, uncompiled
from mxdit.quantize.plan import OUTSIDE, Decision, plan
from mxdit.quantize.recorded import recorded_config


@dataclass(frozen=True)
class LayerReport:
    """One linear.

    Attributes:
        path: its module path.
        method: format of its weight, or None where it stayed as it was.
        scheme: what it computes ("w4a4", ..., or "lookup" of a text encoder's packed table), or None.
        shape: (out_features, in_features).
        bytes_before: weight and bias in the model's float dtype.
        bytes_after: all its tensors as they are.
        reason: why it stayed, empty where it is quantized.
    """

    path: str
    method: str | None
    scheme: str | None
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    reason: str = ""


@dataclass(frozen=True)
class QuantReport:
    """Every linear of one model, in the model's order; `print(report)` shows alike layers of different blocks as one row."""

    model: str
    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that run quantized."""
        return tuple(layer for layer in self.layers if layer.scheme)

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that stayed as they were."""
        return tuple(layer for layer in self.layers if not layer.scheme)

    @property
    def methods(self) -> dict[str, int]:
        """Method -> how many layers have it, the most frequent first."""
        return dict(Counter(layer.method for layer in self.layers if layer.method).most_common())

    @property
    def bytes_before(self) -> int:
        """Bytes of all linears in the model's float dtype."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all linears as they are."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable: totals, and one entry a layer."""
        return {
            "model": self.model,
            "quantized": len(self.quantized),
            "kept": len(self.kept),
            "methods": self.methods,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[LayerReport]] = {}
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            runs = f"{layer.method} {layer.scheme}" if layer.scheme else f"kept ({layer.reason})"
            groups.setdefault((re.sub(r"\.\d+\.", ".#.", layer.path, count=1), shape, runs), []).append(layer)
        rows = [("layer", "count", "shape", "MiB before", "MiB after", "runs as")]
        for (name, shape, runs), members in groups.items():
            before, after = (sum(getattr(m, key) for m in members) for key in ("bytes_before", "bytes_after"))
            blocks = ranges(int(found.group(1)) for m in members if (found := re.search(r"\.(\d+)\.", m.path)))
            path = members[0].path if len(members) == 1 else name.replace("#", blocks)
            rows.append((path, str(len(members)), shape, _mib(before), _mib(after), runs))
        of = f" ({in_words(self.methods)})" if len(self.methods) > 1 else ""
        total = f"{len(self.quantized)} quantized{of}, {len(self.kept)} kept"
        rows.append((self.model, str(len(self.layers)), "", _mib(self.bytes_before), _mib(self.bytes_after), total))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        align = (str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
        return "\n".join(
            "  ".join([*(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=False)), row[5]])
            for row in rows
        )


def report_of(model: nn.Module, decisions: Mapping[str, Decision] | None = None) -> QuantReport:
    """What the linears of `model` are now, whichever way they came to be so.

    Args:
        model: a transformer that a ModelSpec knows.
        decisions: what `plan` said; by default the plan of the config that the model was quantized or loaded with.
    """
    model = uncompiled(model)
    spec = spec_of(model)
    recorded = recorded_config(model)
    if decisions is None:
        decisions = plan(model, recorded) if recorded else {}
    float_size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), torch.bfloat16.itemsize)
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, MXEmbedding):
            shape = (module.num_embeddings, module.embedding_dim)
            after = sum(tensor.nbytes for tensor in module.buffers())
            layers.append(LayerReport(path, module.method, "lookup", shape, shape[0] * shape[1] * float_size, after))
    for path, module in linears_of(model):
        shape = (module.out_features, module.in_features)
        after = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        if isinstance(module, MXLinear):
            size = float_size if module.bias is None else module.bias.element_size()
            before = shape[0] * shape[1] * size + (0 if module.bias is None else module.bias.nbytes)
            layers.append(LayerReport(path, module.method, module.scheme, shape, before, after))
        else:
            decision = decisions.get(path)
            reason = decision.reason if decision else "not quantized" if spec.place_of(path) else OUTSIDE
            layers.append(LayerReport(path, None, None, shape, after, after, reason))
    return QuantReport(type(model).__name__, tuple(layers))


def in_words(methods: Mapping[str, int]) -> str:
    """Counted methods as text: "150 mxfp4, 50 mxfp8"."""
    return ", ".join(f"{count} {method}" for method, count in methods.items())


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"
