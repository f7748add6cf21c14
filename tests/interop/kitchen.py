"""Run by `test_comfy_kitchen.py` where comfy-kitchen can be imported: a file of its layouts, and what it decodes them to.

Arguments: a safetensors file of floats, a format, the file to make, the file of decoded floats.
"""

import json
import sys

import torch
from comfy_kitchen import dequantize_mxfp8, dequantize_nvfp4
from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorCoreMXFP8Layout, TensorCoreNVFP4Layout
from safetensors.torch import load_file, save_file

LAYOUTS = {"mxfp8": TensorCoreMXFP8Layout, "nvfp4": TensorCoreNVFP4Layout, "float8_e4m3fn": TensorCoreFP8Layout}

source, fmt, made, decoded = sys.argv[1:]
layout = LAYOUTS[fmt]
tensors, values = {}, {}
for name, tensor in load_file(source).items():
    path = name.removesuffix(".weight")
    if path == name or tensor.dim() != 2 or not name.startswith("blocks."):
        tensors[name] = values[name] = tensor
        continue
    codes, params = layout.quantize(tensor)
    tensors |= {f"{name}{suffix}": part for suffix, part in layout.state_dict_tensors(codes, params).items()}
    tensors[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps({"format": fmt}).encode()), dtype=torch.uint8)
    if fmt == "mxfp8":
        values[name] = dequantize_mxfp8(codes, params.scale, torch.float32)
    elif fmt == "nvfp4":
        values[name] = dequantize_nvfp4(codes, params.scale, params.block_scale, torch.float32)
    else:
        values[name] = codes.to(torch.float32) * params.scale
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made)
save_file({name: tensor.contiguous() for name, tensor in values.items()}, decoded)
