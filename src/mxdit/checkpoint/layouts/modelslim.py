"""msModelSlim's layout of a quantized component (26.1.0, and older ones that store FP4 as values): the original names.

A component has a folder, and a linear that was smoothed lies in a wrapper: `X.linear.weight` and `X.div.mul_scale`. A
description beside the weights says what is quantized.

Source: core/quant_service/modelslim_v1/save/mindie_format.py and ascendv1.py of the 26.1.0 wheel.
"""

from __future__ import annotations

from typing import Any

from mxdit.checkpoint.component import Component, Stored
from mxdit.checkpoint.layout import Folder, Layout, Written
from mxdit.checkpoint.layouts.description import NAMES, read_described
from mxdit.checkpoint.layouts.numeric import as_e4m3
from mxdit.checkpoint.writer import Part
from mxdit.errors import CheckpointError
from mxdit.numerics.formats import PARTS, block_format


def recognizes(folder: Folder) -> bool:
    return folder.described and folder.original


def read(folder: Folder) -> Stored:
    return read_described(folder, MODELSLIM.name, lambda name: folder.spec.from_original(name) or name)


def write(component: Component) -> Written:
    """The component's tensors by the release's names, smoothed linears in their wrapper, and the description.

    A component that stayed float has a description that calls every tensor FLOAT.
    """
    config = component.quantization
    raised = set[str]()  # with MXFP8 activations
    if config:
        raised.update(config.w4a8_fallback_layers)
        if config.effective_activation == "mxfp8":
            raised.update(path for path, method in component.methods.items() if method == config.quant_method)
    kinds = {
        path: NAMES[method, "mxfp8" if method == "mxfp4" and path in raised else None]
        for path, method in component.methods.items()
    }
    smoothed = {name.removesuffix(".mul_scale") for name in component.parts if name.endswith(".mul_scale")}
    # Its saver for Wan names the files after the type of the last quantized layer.
    kind = next((kind for kind in reversed(kinds.values()) if kind != "FLOAT"), "FLOAT")
    description: dict[str, Any] = {"model_quant_type": kind}
    parts: dict[str, Part] = {}
    for name, part in component.parts.items():
        path, _, leaf = name.rpartition(".")
        method = component.methods.get(path)
        released = component.spec.to_original(name)
        if released is None:
            raise CheckpointError(
                "the model's own release has no name for this tensor",
                where=name,
                hint="Give it in the family's ModelSpec (docs/adapting-a-model.md).",
            )
        if path in smoothed:
            module = released.removesuffix(f".{leaf}")
            released = f"{module}.{'div' if leaf == 'mul_scale' else 'linear'}.{leaf}"
        eight = method is not None and leaf == "weight" and block_format(method).bits == 8
        parts[released] = as_e4m3(part) if eight else part
        encoded = method is not None and leaf in PARTS and leaf != "mul_scale"
        description[released] = kinds[path] if encoded else "FLOAT"
    lost = []
    if config and config.effective_activation == "bf16":
        lost.append("activation 'bf16': the types of msModelSlim's description quantize activations")
    elif any(component.methods[path] == "mxfp4_dualscale" for path in raised):
        lost.append("activation 'mxfp8': msModelSlim has it over single-scale MXFP4 only")
    if config and config.require_smooth_scale:
        lost.append("require_smooth_scale: msModelSlim's description has no such key")
    if config and config.activation_steps:
        lost.append(f"activation_steps {config.activation_steps}: msModelSlim's description knows no steps")
    if config and config.mxfp4_scale_alg:
        lost.append(f"mxfp4_scale_alg {config.mxfp4_scale_alg}: msModelSlim's description means 0 (OCP)")
    files = {f"quant_model_description_{kind.lower()}.json": description}
    return Written(parts, files=files, lost=tuple(lost), stem=f"quant_model_weight_{kind.lower()}")


MODELSLIM = Layout("modelslim", recognizes, read, write, as_released=True, scale_alg=0)
