"""Quantize original-layout experts with msModelSlim's own quantizers, packer and savers, and write down what it decodes.

    python slim.py RECIPES.json

A process of its own, because importing msModelSlim patches pydantic and torch.nn.Module. Each recipe is
    {"source": DIR, "out": DIR, "method": KEY, "smooth": [GLOB], "maxima": DIR, "methods": {GLOB: KEY}, "saver": NAME,
     "part": GB, "attention": BOOL}
with globs over the linears of the blocks; the last of "methods" that fits counts, and "attention" adds what its recipes for
quantized attention leave in the files. "smooth" puts in factors by chance; "maxima", where `<folder>.safetensors` says how large
each channel of each linear's input becomes, has its own smoothing choose them. Beside the experts' folders OUT gets
`oracle/<folder>.safetensors`: per linear `<path>.weight`, as msModelSlim itself multiplies by it, and `<path>.mul_scale`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import msmodelslim.ir as ir
import torch
from msmodelslim.core.base.protocol import BatchProcessRequest
from msmodelslim.core.graph import AdapterConfig
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Config, AscendV1Saver
from msmodelslim.core.quant_service.modelslim_v1.save.mindie_format import MindIEFormatConfig, MindIEFormatSaver
from msmodelslim.core.quantizer.base import QConfig
from msmodelslim.core.quantizer.linear import LinearQConfig, LinearQuantizer
from msmodelslim.ir.non_fusion_smooth_quant_ir import NonFusionSmoothQuantHookIR, NonFusionSmoothQuantWrapper
from msmodelslim.ir.qal import QDType, QParam, QScope
from msmodelslim.model import IModel
from msmodelslim.model.wan2_2 import Wan2_2BaseModelAdapter
from msmodelslim.processor.anti_outlier.iter_smooth import IterSmoothInterface
from msmodelslim.processor.anti_outlier.iter_smooth.processor import IterSmoothProcessor, IterSmoothProcessorConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EXPERTS = ("low_noise_model", "high_noise_model")  # in the order in which it works on them
SHARED = (("self_attn.q", "self_attn.k", "self_attn.v"), ("cross_attn.k", "cross_attn.v"))
SAVERS = {
    "mindie": (MindIEFormatConfig, MindIEFormatSaver),  # what its Wan recipes use
    "ascendv1": (AscendV1Config, AscendV1Saver),  # the one that can say W4A8
}


def main(recipes: list[dict[str, Any]]) -> None:
    for recipe in recipes:
        for folder in EXPERTS:
            _expert(Path(recipe["source"]) / folder, Path(recipe["out"]), folder, recipe)


@torch.no_grad()
def _expert(source: Path, out: Path, folder: str, recipe: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(file))
    model = _model({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    (out / folder).mkdir(parents=True)
    settings, saver_class = SAVERS[recipe.get("saver", "mindie")]
    config = settings(part_file_size=recipe.get("part", 0))
    config.set_save_directory(str(out / folder))
    root = out / "root"  # of the model, from which it copies what is no expert
    root.mkdir(exist_ok=True)
    blocks = dict(model.get_submodule("blocks").named_children())
    adapter = _Adapter(root, len(blocks))
    saver = saver_class(model, config, adapter)
    saver.pre_run()
    smoother = IterSmoothProcessor(model, IterSmoothProcessorConfig(), adapter)
    maxima = load_file(Path(recipe["maxima"]) / f"{folder}.safetensors") if "maxima" in recipe else None
    oracle: dict[str, Tensor] = {}
    for index, block in blocks.items():
        _smooth(block, f"blocks.{index}", recipe.get("smooth", []))
        if maxima is not None:
            request = BatchProcessRequest(name=f"blocks.{index}", module=block)
            smoother.preprocess(request)  # hooks that observe, on one linear of those that share an input
            for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
                linear(maxima[f"blocks.{index}.{name}"].to(linear.weight.dtype)[None])
            smoother.postprocess(request)
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            path = f"blocks.{index}.{name}"
            fitting = [kind for glob, kind in recipe.get("methods", {}).items() if fnmatchcase(path, glob)]
            kind = fitting[-1] if fitting else recipe["method"]
            if kind != "float":
                quantizer = LinearQuantizer(_settings(kind))
                quantizer.setup(linear)
                block.set_submodule(name, quantizer.deploy())
                oracle |= _decoded(path, block.get_submodule(name))
        if recipe.get("attention"):
            _mark_attention(block, f"blocks.{index}.self_attn")
        saver.postprocess(BatchProcessRequest(name=f"blocks.{index}", module=block))
    saver.post_run()
    (out / "oracle").mkdir(exist_ok=True)
    save_file(oracle, out / "oracle" / f"{folder}.safetensors")


class _Adapter(IModel, IterSmoothInterface):
    """All that the savers and the smoothing ask of msModelSlim's model adapters."""

    model_path, model_type, trust_remote_code = Path(), "Wan2.2-T2V-A14B", False

    def __init__(self, model_path: Path, blocks: int) -> None:
        self.model_path, self._blocks = model_path, blocks

    def get_adapter_config_for_subgraph(self) -> list[AdapterConfig]:
        """Which linears share an input, as its adapter of Wan2.2 says, which needs nothing of itself for that."""
        return Wan2_2BaseModelAdapter.get_adapter_config_for_subgraph(self, self._blocks)


def _model(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules that hold these tensors at their names; a matrix makes its module an nn.Linear."""
    root = nn.Module()
    for name in sorted(tensors):
        path, _, leaf = name.rpartition(".")
        module = root
        for part in path.split("."):
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensors[name], requires_grad=False))
    for path, module in list(root.named_modules()):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = weight, module.bias
            root.set_submodule(path, linear)
    return root


def _settings(kind: str) -> LinearQConfig:
    def of(dtype: QDType, method: str, scope: QScope = QScope.PER_BLOCK, **ext: Any) -> QConfig:
        return QConfig(dtype=dtype, scope=scope, symmetric=True, method=method, ext=ext)

    four, eight = of(QDType.MXFP4, "minmax"), of(QDType.MXFP8, "minmax")
    dual = of(QDType.MXFP4, "dualscale", QScope.DUAL_SCALE, dual_block_size=512)
    act, weight = {
        "dual": (dual, dual),
        "single": (four, four),
        "single, searched": (four, of(QDType.MXFP4, "ceil_x", enable_search=True)),
        "mxfp8": (eight, eight),
        "mxfp8, searched": (eight, of(QDType.MXFP8, "mse_round")),
        "w4a8": (eight, four),
    }[kind]
    return LinearQConfig(act=act, weight=weight)


def _smooth(block: nn.Module, prefix: str, globs: list[str]) -> None:
    """Put factors into the linears that `globs` name, as its smoothing does, one vector for those that share an input."""
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        group = next((group for group in SHARED if name in group), (name,))
        if not any(fnmatchcase(f"{prefix}.{name}", glob) for glob in globs):
            continue
        generator = torch.Generator().manual_seed(len(prefix + group[0]))
        scales = (torch.rand(linear.in_features, generator=generator) * 2 + 0.25).to(linear.weight.dtype)
        linear.weight.mul_(scales)
        hook = NonFusionSmoothQuantHookIR(scales)
        hook.set_hook_handle(linear.register_forward_pre_hook(hook))


def _mark_attention(block: nn.Module, path: str) -> None:
    """Rotations of q and k, which are stored, and the types of their quantization, which the description names."""
    attention = block.get_submodule("self_attn")
    for name in ("q_rot", "k_rot"):
        info = ir.OnlineRotationInfo(torch.eye(32, dtype=torch.bfloat16), "replace", f"{path}.{name}")
        attention.add_module(name, ir.OnlineRotationWrapper(nn.Identity(), f"{path}.{name}", info))
    for name in ("fa3_q", "fa3_k", "fa3_v"):
        attention.add_module(name, ir.FakeQuantActivationPerBlock(QParam(scheme=ir.mxfp4_per_block_sym)))


def _decoded(path: str, module: nn.Module) -> dict[str, Tensor]:
    """The weight that a quantized linear multiplies by, taken from its own forward, and the factors on its input."""
    decoded = {}
    if isinstance(module, NonFusionSmoothQuantWrapper):
        decoded[f"{path}.mul_scale"] = module.scales.detach().float()
        module = module.wrapped_module
    x = torch.ones(1, module.weight.shape[1], dtype=torch.bfloat16)
    with mock.patch("torch.nn.functional.linear", lambda x, weight, bias=None: weight):
        decoded[f"{path}.weight"] = module(x).float().contiguous()
    return decoded


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
