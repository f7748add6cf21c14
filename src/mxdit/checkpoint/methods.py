"""Which linear of a stored component is what, and whether its config says the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mxdit.checkpoint.component import Fault, Stored
from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.layout import CONFIG
from mxdit.checkpoint.layouts import LAYOUTS
from mxdit.config import MXConfig
from mxdit.config.methods import exceptions_of
from mxdit.errors import ConfigError
from mxdit.models import ModelSpec
from mxdit.numerics.formats import FLOATS, FORMATS, PARTS, block_format
from mxdit.quantize.plan import matches, plan


@dataclass
class Reading:
    """A component that is being read.

    fallback  whether linears of another method than most, and smoothed float ones, are taken from `base`.
    tensors   those of `stored` that count.
    faults    found so far.
    from_base the linears that are taken from `base` instead.
    """

    stored: Stored
    base: Stored | None
    spec: ModelSpec
    fallback: bool
    tensors: dict[str, Readable]
    faults: list[Fault] = field(default_factory=list)
    from_base: set[str] = field(default_factory=set)

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
    linears, config = list(linears), reading.stored.quantization
    others = config.layer_methods.items() if config else ()
    own = {path: method for method, patterns in others for name in patterns for path in matches(linears, name)}
    main = str(config.quant_method) if config else None
    methods = {path: _method(reading, path, own.get(path, main), unsaid) for path in linears}
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


def _method(reading: Reading, path: str, configured: str | None, unsaid: list[str]) -> str | None:
    """How a linear is stored; `configured` is the method that the config gives it, where there is one."""
    stored, find = reading.stored, reading.find
    weight = reading.tensors.get(f"{path}.weight")
    scale = reading.tensors.get(f"{path}.weight_scale")
    said = None if stored.methods is None else stored.methods.get(path, "")
    stated = said or configured
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


def main_of(reading: Reading, methods: Mapping[str, str | None]) -> str | None:
    """The method that a component's config states, or that most of its layers have; None where none is quantized."""
    if reading.stored.quantization is not None:
        return str(reading.stored.quantization.quant_method)
    count = Counter(method for method in methods.values() if method)
    # Between equals the smaller one, over which the other is a fallback.
    return max(count, key=lambda method: (count[method], -block_format(method).bits), default=None)


def _settle(reading: Reading, methods: dict[str, str | None]) -> None:
    """Take from the base what differs from the rest, where that is wished, and what has no place otherwise."""
    if reading.fallback and reading.base:
        main = main_of(reading, methods)
        for path in [path for path, method in methods.items() if method not in (None, main)]:
            methods[path] = None
            _take_from_base(reading, path)
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
    reading.from_base.add(path)
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
    main = main_of(reading, methods)
    assert main is not None
    listed = exceptions_of(main, methods)
    if stated is None:
        raised = {path: method for path in stored.raised if (method := methods.get(path))}
        all_of_them = all(path in raised for path, method in methods.items() if method == main)
        stated = MXConfig(
            main,
            layer_methods=listed["layer_methods"],
            activation="mxfp8" if all_of_them else None,
            w4a8_fallback_layers=tuple(path for path, of in raised.items() if not all_of_them or of != main),
            mxfp4_scale_alg=layout.scale_alg if "mxfp4" in found else None,
        )
    elif layout.floats:
        try:
            said = layout.floats(stated, skeleton)
        except ConfigError as error:
            reading.find(reading.config_file, f"quantization_config: {error}")
            return None
        kept = {path: is_float for path, is_float in said.items() if path not in reading.from_base}
        off = [path for path, is_float in kept.items() if is_float == bool(methods[path])]
        if off:
            is_listed = said[off[0]]
            reading.find(
                reading.config_file,
                "ignored_layers lists other layers than the files hold as float",
                f"{off[0]} {'listed' if is_listed else 'not listed'}",
                f"{'no scales' if is_listed else 'scales'} stored for it",
            )
    stated = replace(
        stated,
        **listed,
        num_bf16_fallback_layers=None,
        is_checkpoint_serialized=True,
        activation=stated.effective_activation,
        # Where all layers that these are for come from the base.
        mxfp4_scale_alg=stated.mxfp4_scale_alg if "mxfp4" in found else None,
        require_smooth_scale=stated.require_smooth_scale and any(block_format(method).smooths for method in found),
    )
    if not stated.w4a8_fallback_layers or reading.faults:
        return stated
    try:
        decisions = plan(skeleton, stated)
    except ConfigError as error:
        reading.find(reading.config_file, f"quantization_config: {error}")
        return None
    # By their paths and in the model's order: other layouts have no patterns and no order.
    raised = [p for p, of in decisions.items() if of.method and of.activation != stated.activation_of(of.method)]
    return replace(stated, w4a8_fallback_layers=tuple(raised))
