"""The worked example of docs/format.md is what the code writes."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save

from mxdit import MXLinear, Packed, decode

DOC = (Path(__file__).parent.parent / "docs" / "format.md").read_text()


def test_the_worked_example_is_the_file():
    row = torch.zeros(1, 64, dtype=torch.bfloat16)
    row[0, :6] = torch.tensor([7, -2.9, 1.2, 0.4, -0.05, 0.3])
    row[0, 32:36] = torch.tensor([0.02, -0.013, 0.005, 0.001])
    layer = MXLinear.from_weight(row, torch.tensor([0.5], dtype=torch.bfloat16), method="mxfp4_dualscale")
    file = save({f"blocks.0.ffn.net.2.{name}": tensor for name, tensor in layer.state_dict().items()})
    header = int.from_bytes(file[:8], "little")
    said = re.search(r"```\n((?:[0-9a-f]{2}\s+)+)```", DOC)
    assert said is not None
    assert file[8 + header :] == bytes.fromhex(said.group(1))
    assert f"{len(file)} bytes" in DOC and f"{header} bytes of JSON header" in DOC

    assert layer.weight_dual_scale is not None
    packed = Packed(layer.weight, layer.weight_scale, layer.weight_dual_scale.squeeze(-1), "mxfp4_dualscale")
    values = decode(packed)[0, [0, 1, 2, 3, 4, 5, 32, 33, 34, 35]].tolist()
    numbers = re.findall(r"-?\d+(?:\.\d+)?", DOC.rsplit("Read back:", 1)[1])
    assert values == torch.tensor([float(number) for number in numbers]).tolist()  # the same fp32 numbers
