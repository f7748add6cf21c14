"""vLLM-Omni 0.30.0's own merge tools and our export, from the same msModelSlim directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import original
import peers
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint

DUAL, EIGHT = "merge_mxfp4_dualscale_checkpoint", "merge_mxfp8_checkpoint"
SAME = [("dual-smoothed", DUAL), ("dual-some-float", DUAL), ("dual", DUAL), ("mxfp8", EIGHT)]
BLOCK_LINEARS = ("attn1.to_qkv", "attn1.to_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out", "ffn.net_0.proj", "ffn.net_2")  # fmt: skip


def expert(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of one expert."""
    tensors = load_file(directory / f"{original.STEM}.safetensors")
    return tensors, json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module", params=SAME, ids=[name for name, _ in SAME])
def both(request: pytest.FixtureRequest, base: Path, quantized: Path, tmp_path_factory) -> tuple[Path, Path, Path]:
    """What msModelSlim wrote, in the variant that the tool reads, and what the tool and we make of it."""
    name, tool = request.param
    root = tmp_path_factory.mktemp("vllm")
    source = quantized / name if tool == EIGHT else peers.numeric(quantized / name, root / "numeric")
    theirs = peers.merged(tool, base, source, root / "theirs")
    convert_checkpoint(source, root / "ours", "vllm-omni", base=base).write()
    return source, theirs, root / "ours"


def assert_same_value(name: str, ours: Tensor, theirs: Tensor) -> None:
    """The same number; and the same dtype, but where one of the two has it from elsewhere."""
    if name.endswith(".mul_scale"):
        # As msModelSlim stored them, BF16; ours are FP32 that hold the same BF16 values. The loader casts to BF16.
        assert theirs.dtype == torch.bfloat16 and ours.dtype == torch.float32
        theirs = theirs.float()
    elif theirs.dtype == torch.float32 and not name.endswith("weight_dual_scale"):
        # What is not quantized, and the biases of layers without factors, the tool takes from the base, which is FP32; we
        # take msModelSlim's BF16 copy, which it stores as FP32 for biases of quantized layers.
        theirs = theirs.bfloat16().to(ours.dtype)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


def rounded(tensor: Tensor) -> Tensor:
    """Floats as BF16: what the tool carries over from the base is FP32."""
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("component", original.EXPERTS.values())
def test_the_tensors_are_those_of_its_merge_tool(both, component):
    theirs, ours = (expert(directory / component)[0] for directory in both[1:])
    ones = ours.keys() - theirs.keys()
    # The tool writes no factors where there is no smoothing, and the loader then runs with memory it never set.
    assert all(name.endswith(".mul_scale") and bool((ours[name] == 1).all()) for name in ones)
    assert theirs.keys() == ours.keys() - ones
    for name, tensor in theirs.items():
        assert_same_value(name, ours[name], tensor)


@pytest.mark.parametrize("component", original.EXPERTS.values())
def test_the_config_is_that_of_its_merge_tool(both, component):
    _, theirs, ours = both
    (_, their_config), (_, our_config) = expert(theirs / component), expert(ours / component)
    their_stated, our_stated = their_config.pop("quantization_config"), our_config.pop("quantization_config")
    assert our_config == their_config
    # The tool's list also has norms, embedders and proj_out, none of which takes a quantization config in the runtime.
    assert our_stated.pop("ignored_layers") == in_blocks(their_stated.pop("ignored_layers", []))
    assert our_stated == their_stated


def in_blocks(names: list[str]) -> list[str]:
    """Those that are linears of a block, in the order of blocks and layers."""
    order = [f"blocks.{block}.{name}" for block in range(8) for name in BLOCK_LINEARS]
    return [name for name in order if name in names]


def test_the_rest_of_the_pipeline_is_the_same(both):
    _, theirs, ours = both
    left, right = (rest(directory) for directory in (theirs, ours))
    assert left.pop("model_index.json") and right.pop("model_index.json")
    assert left == right and any("text_encoder" in name for name in left)
    index, other = (json.loads((directory / "model_index.json").read_text()) for directory in (theirs, ours))
    assert index == other


def rest(directory: Path) -> Mapping[str, bytes]:
    """The files beside the experts."""
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("transformer")}


def test_we_read_what_its_merge_tool_wrote(both, base, tmp_path):
    source, theirs, _ = both
    convert_checkpoint(theirs, tmp_path / "via", "packed").write()
    convert_checkpoint(source, tmp_path / "direct", "packed", base=base).write()
    for component in original.EXPERTS.values():
        (via, via_config), (direct, direct_config) = (expert(tmp_path / way / component) for way in ("via", "direct"))
        assert via_config == direct_config and via.keys() == direct.keys()
        for name, tensor in direct.items():
            if name.endswith("_scale"):
                assert torch.equal(via[name], tensor), name
            else:
                assert torch.equal(rounded(via[name]), rounded(tensor)), name


def test_inspect_says_what_the_runtime_does_with_them(both):
    _, theirs, ours = both
    for directory in (theirs, ours):
        whole = all(factors_are_whole(expert(directory / component)[0]) for component in original.EXPERTS.values())
        found = inspect_checkpoint(directory)
        reasons = [each.loaders["vLLM-Omni 0.30"] for each in found.components]
        assert found.clean and [each.layout for each in found.components] == ["vllm-omni"] * 2
        assert whole or directory == theirs
        assert all(reason is None if whole else "mul_scale is missing" in str(reason) for reason in reasons)


def factors_are_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every dual-scale layer has factors, as the runtime needs."""
    suffix = ".weight_dual_scale"
    return all(f"{name.removesuffix(suffix)}.mul_scale" in tensors for name in tensors if name.endswith(suffix))
