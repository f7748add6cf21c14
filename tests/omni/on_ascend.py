"""Linears of the engine on an emulated NPU, in a process of its own: `python on_ascend.py`. Prints what they did as JSON.

The engine runs on its CPU platform, which is asked to say that it is an NPU only while a linear is made. The device itself is
the fake torch_npu of the suite, which keeps the operators' documented contract; it comes in after the engine was imported,
or the engine would look for its NPU platform, and before mxdit, which then finds an Ascend backend.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm_omni.platforms import current_omni_platform

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
import torch_npu

import layers
import mxdit
from mxdit.checkpoint.layouts.numeric import unpack

NAME = "blocks.0.ffn.net_2"
K, N = 576, 64  # a rank of two begins inside a group

SERIALIZED = {
    "mxfp4": "is_checkpoint_mxfp4_serialized",
    "mxfp4_dualscale": "is_checkpoint_serialized",
    "mxfp8": "is_checkpoint_mxfp8_serialized",
}
PACKED = {"is_checkpoint_serialized": True, "layout": "packed", "version": 1}
# name -> method, keys, degree, and the choice of MXDIT_VLLM_OMNI
CASES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    **{f"numeric {m}": (m, {key: True}, 1, "auto") for m, key in SERIALIZED.items()},
    **{f"numeric {m}, ours": (m, {key: True}, 1, "mxdit") for m, key in SERIALIZED.items()},
    **{f"online {m}": (m, {}, 1, "auto") for m in SERIALIZED},
    **{f"packed {m}": (m, PACKED, 1, "auto") for m in SERIALIZED},
    **{f"packed {m}, two ranks": (m, PACKED, 2, "auto") for m in SERIALIZED},
    "numeric mxfp4, two ranks": ("mxfp4", {SERIALIZED["mxfp4"]: True}, 2, "auto"),
    "numeric dual, two ranks": ("mxfp4_dualscale", {SERIALIZED["mxfp4_dualscale"]: True}, 2, "auto"),
    "online dual, two ranks": ("mxfp4_dualscale", {"num_bf16_fallback_layers": 0}, 2, "auto"),
    "ignored by a glob": ("mxfp4", {"ignored_layers": ["blocks.0.ffn.net.*"]}, 1, "auto"),
    "steps over mxfp4": ("mxfp4", {"w4a8_fallback_steps": [0]}, 1, "auto"),
    "steps over dual": ("mxfp4_dualscale", {"num_bf16_fallback_layers": 0, "w4a8_fallback_steps": [0]}, 1, "auto"),
    "bf16 activations": ("mxfp4", {"activation": "bf16"}, 1, "auto"),
}


def main() -> None:
    with torch_npu.state.pretending(count=1) as state:
        print(json.dumps({name: run(state, *case) for name, case in CASES.items()}))


def run(state: Any, method: str, keys: dict[str, Any], degree: int, choice: str) -> dict[str, Any]:
    """Whose method the linear got on each rank; of ours, the NPU's operators that it called, and whether it gave what
    `mxdit.MXLinear` gives on the CPU."""
    torch.manual_seed(0)
    weight, x = torch.randn(N, K).bfloat16(), torch.randn(3, K).bfloat16()
    parts = mxdit.quantize_weight(weight, method, rule="ocp")
    found: dict[str, Any] = {"methods": [], "calls": [], "equal": []}
    for rank in range(degree):
        layer = made(method, keys, degree, rank, choice)
        found["methods"].append(type(layer.quant_method).__name__)
        if found["methods"][-1] != "MXLinearMethod":
            continue
        for name, tensor in stored(parts, weight, method, keys).items():
            held = getattr(layer, name)
            held.weight_loader(held, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        held, shard = mxdit.shard(parts, method, "row", rank, degree)
        own = x[:, rank * K // degree : (rank + 1) * K // degree]
        context = SimpleNamespace(denoise_step_idx=0, total_denoise_steps=4)
        with patch("vllm_omni.diffusion.forward_context._forward_context", context):
            state.calls.clear()
            given = layer.quant_method.apply(layer, own.to("npu"))
        found["calls"].append([call for call, _ in state.calls if call != "get_npu_format"])
        found["equal"].append(torch.equal(given.cpu(), defined(method, keys, held, shard.phase, own)))
    return found


def made(method: str, keys: dict[str, Any], degree: int, rank: int, choice: str) -> Any:
    """A row-parallel linear of the engine on the NPU, with nothing in it yet."""
    with (
        patch.dict("os.environ", {"MXDIT_VLLM_OMNI": choice}),
        layers.building(degree=degree, rank=rank),
        patch.object(type(current_omni_platform), "is_npu", lambda self: True),
        torch.device("npu"),
    ):
        return layers.made(RowParallelLinear, K, N, name=NAME, method=method, keys=keys)


def stored(parts: dict[str, Tensor], weight: Tensor, method: str, keys: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: BF16, packed, or numeric."""
    if not any(key.endswith("serialized") for key in keys):
        return {"weight": weight}
    if "layout" in keys:
        return parts
    values = unpack(parts["weight"]) if method != "mxfp8" else parts["weight"].view(torch.float8_e4m3fn)
    return {**parts, "weight": values}


def defined(method: str, keys: dict[str, Any], held: dict[str, Tensor], phase: int, x: Tensor) -> Tensor:
    activation = "mxfp8" if keys.get("w4a8_fallback_steps") else keys.get("activation")
    rule = "ocp" if method != "mxfp4" or "layout" not in keys else "uos"
    layer = mxdit.MXLinear(x.shape[1] + phase, N, False, method=method, activation=activation, rule=rule)
    layer.load(held)
    with torch.no_grad():
        return layer(torch.nn.functional.pad(x, (phase, 0)))


if __name__ == "__main__":
    main()
