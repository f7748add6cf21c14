"""Which linear of a stored component is what, and whether its config says the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mxdit.checkpoint.component import Fault, Stored
from mxdit.checkpoint.files import StoredTensor
from mxdit.checkpoint.layout import CONFIG
from mxdit.checkpoint.layouts import LAYOUTS
from mxdit.config import MXConfig
from mxdit.errors import ConfigError
from mxdit.models import ModelSpec
from mxdit.numerics.formats import FLOATS, FORMATS, PARTS, block_format
from mxdit.quantize.plan import plan


@dataclass
class Reading:
    """A component that is being read.

    fallback  whether linears of another method than most, and smoothed float ones, are taken from `base`.
    tensors   those of `stored` that count.
    faults    found so far.
    """

    stored: Stored
    base: Stored | None
    spec: ModelSpec
    fallback: bool
    tensors: dict[str, StoredTensor]
    faults: list[Fault] = field(default_factory=list)

    def find(self, where: str, what: str, got: object = None, expected: object = None, hint: str | None = None) -> None:
        """Note a fault."""
        self.faults.append(Fault(where, what, got, expected, hint))

    @property
    def config_file(self) -> str:
        """Its config.json, for messages."""
        return f"{self.stored.folder}/{CONFIG}"


def methods_of(reading: Reading, linears: Iterable[str]) -> dict[str, str | None]:
    """How each of these linears is stored, None where it is float; what the layout filled in is dropped from the tensors.

    A description beside the weights counts first, then the config, then what the tensors look like, which is a fault.
    """
    unsaid: list[str] = []
    methods = {path: _method(reading, path, unsaid) for path in linears}
    if unsaid:
        reading.find(
            f"{unsaid[0]}.weight",
            f"nothing says how this and {len(unsaid) - 1} other layers are quantized",
            "scales",
            "a quantization_config in config.json, or a quant_model_description*.json",
            "Restore that file: MXFP8 codes and FP4 values look alike.",
        )
    _settle(reading, methods)
    filler, stated = LAYOUTS[reading.stored.layout].filler, reading.stored.quantization
    if filler and not (stated and stated.require_smooth_scale):
        for path, method in methods.items():
            for name in [f"{path}.{leaf}" for leaf in PARTS if method]:
                tensor = reading.tensors.get(name)
                if method and tensor is not None and filler(block_format(method), name.rpartition(".")[2], tensor):
                    del reading.tensors[name]
    return methods


def _method(reading: Reading, path: str, unsaid: list[str]) -> str | None:
    stored, find = reading.stored, reading.find
    weight = reading.tensors.get(f"{path}.weight")
    scale = reading.tensors.get(f"{path}.weight_scale")
    said = None if stored.methods is None else stored.methods.get(path, "")
    stated = said or (str(stored.quantization.quant_method) if stored.quantization else None)
    if scale is None:
        if weight is None:
            return said or None
        if weight.info.dtype in FLOATS:
            if said:
                find(f"{path}.weight", f"the description says {said}", weight.info, f"{said} codes and scales")
            return None
        if not stated:
            find(f"{path}.weight", "codes without a weight_scale", weight.info, "a float weight or its scales")
        return stated  # whose scale is found missing
    if reading.spec.place_of(path) is None:
        find(f"{path}.weight_scale", "a quantized linear outside the blocks")
    if said == "":
        find(f"{path}.weight", "the description says nothing of this layer", hint="Quantize the model again.")
    if said is None and stored.methods is not None:
        find(f"{path}.weight_scale", "the description calls this layer float", "scales", "a float weight")
        return None
    if stated:
        return stated
    if said is None:
        unsaid.append(path)
    # What it looks like, to look at the rest: a fault is noted already.
    dual = f"{path}.weight_dual_scale" in reading.tensors
    bits = 4 if dual or (weight is not None and weight.info.dtype is torch.uint8) else 8
    return next(name for name, row in FORMATS.items() if row.bits == bits and bool(row.outer) == dual)


def _settle(reading: Reading, methods: dict[str, str | None]) -> None:
    """One component has one method: what differs is a fault, or taken from the base."""
    count = Counter(method for method in methods.values() if method)
    if reading.stored.quantization is not None:
        main: str | None = str(reading.stored.quantization.quant_method)
    else:
        # What most layers are; between equals the smaller one, over which the other is a fallback.
        main = max(count, key=lambda method: (count[method], -block_format(method).bits), default=None)
    others = [path for path, method in methods.items() if method and method != main]
    if reading.fallback and reading.base:
        for path in others:
            methods[path] = None
            _take_from_base(reading, path)
    elif others:
        blocks = sorted({place.index for path in others if (place := reading.spec.place_of(path))})
        reading.find(
            others[0],
            f"{len(others)} layers are stored in another method than the rest",
            f"{methods[others[0]]} in blocks {', '.join(map(str, blocks))}",
            main,
            "Keep them in BF16: --base with the unquantized model, and --fallback-from-base.",
        )
    for path in [p for p, m in methods.items() if not m and f"{p}.mul_scale" in reading.tensors]:
        # Smoothing was folded into a weight that then stayed float: without its factor it is another weight.
        if reading.fallback and reading.base:
            _take_from_base(reading, path)
        else:
            reading.find(
                f"{path}.mul_scale",
                "a float layer was smoothed, and a plain linear has no place for the factors",
                hint="Take such layers from the unquantized model: --base and --fallback-from-base.",
            )


def _take_from_base(reading: Reading, path: str) -> None:
    for name in [n for n in reading.tensors if n.rpartition(".")[0] == path]:
        del reading.tensors[name]


def quantization_of(reading: Reading, skeleton: nn.Module, methods: Mapping[str, str | None]) -> MXConfig | None:
    """The packed config of a component whose linears are stored so; None where none is quantized, or a fault forbids it."""
    found = {method for method in methods.values() if method}
    stored, layout = reading.stored, LAYOUTS[reading.stored.layout]
    stated = stored.quantization
    if not found:
        if stated is not None or any((stored.methods or {}).values()):
            reading.find(str(stored.folder), "the model is said to be quantized, and no layer is")
        return None
    if len(found) > 1:
        return None  # a fault is noted already
    if stated is None:
        (method,) = found
        alg = layout.scale_alg if method == "mxfp4" else None
        quantized = {path for path, of in methods.items() if of}
        raised = tuple(path for path in stored.raised if path in quantized)
        all_of_them = quantized <= {*raised}
        stated = MXConfig(
            method,
            activation="mxfp8" if all_of_them else None,
            w4a8_fallback_layers=() if all_of_them else raised,
            mxfp4_scale_alg=alg,
        )
    elif layout.floats:
        try:
            said = layout.floats(stated, skeleton)
        except ConfigError as error:
            reading.find(reading.config_file, f"quantization_config: {error}")
            return None
        off = [path for path, is_float in said.items() if is_float == bool(methods[path])]
        if off:
            listed = said[off[0]]
            reading.find(
                reading.config_file,
                "ignored_layers lists other layers than the files hold as float",
                f"{off[0]} {'listed' if listed else 'not listed'}",
                f"{'no scales' if listed else 'scales'} stored for it",
            )
    stated = replace(
        stated,
        ignored_layers=tuple(path for path, method in methods.items() if not method),
        num_bf16_fallback_layers=None,
        is_checkpoint_serialized=True,
        activation=stated.effective_activation,
    )
    if not stated.w4a8_fallback_layers or reading.faults:
        return stated
    try:
        decisions = plan(skeleton, stated)
    except ConfigError as error:
        reading.find(reading.config_file, f"quantization_config: {error}")
        return None
    # By their paths and in the model's order: other layouts have no patterns and no order.
    raised = [p for p, decision in decisions.items() if decision.scheme and decision.activation != stated.activation]
    return replace(stated, w4a8_fallback_layers=tuple(raised))
