"""quantize_ on a model whose weights are elsewhere, in another form, or in place under a hook that moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.big_modeling import attach_layerwise_casting_hooks
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, WanTransformer3DModel, apply_layer_skip
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mxdit
import tiny
from mxdit import ModelError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FP8 = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
ROOMS = ("rope", "patch_embedding", "condition_embedder", "norm_out", "proj_out", "scale_shift_table", "blocks.1")
Hook = Callable[[WanTransformer3DModel, str], Any]


def group(kind: str, on_disk: bool) -> Hook:
    return lambda model, folder: model.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1,
        offload_to_disk_path=folder if on_disk else None,
    )


# Hooks that keep weights elsewhere or in another form -> what the error says.
OFFLOADING: dict[str, tuple[Hook, str]] = {
    "blocks": (group("block_level", False), r"GroupOffloadingHook.*quantize it, then call enable_group_offload\(\)"),
    "leaves": (group("leaf_level", False), "GroupOffloadingHook"),
    "blocks on disk": (group("block_level", True), "GroupOffloadingHook"),
    "leaves on disk": (group("leaf_level", True), "GroupOffloadingHook"),
    "accelerate": (
        lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
        "AlignDevicesHook. Quantize first, then offload.",
    ),
    "accelerate on disk": (
        lambda model, folder: accelerate.disk_offload(model, folder, CPU, offload_buffers=True),
        "AlignDevicesHook. Quantize first, then offload.",
    ),
    "dispatched in part": (
        lambda model, folder: accelerate.dispatch_model(
            model, {"blocks.0": "disk", **dict.fromkeys(ROOMS, "cpu")}, main_device="cpu", offload_dir=folder
        ),
        "blocks.0: a hook keeps.*AlignDevicesHook",
    ),
    "layerwise casting": (lambda model, _: model.enable_layerwise_casting(**FP8), "got LayerwiseCastingHook"),
    "accelerate's casting": (
        lambda model, _: attach_layerwise_casting_hooks(model, **FP8),
        "got LayerwiseCastingHook",
    ),
}
# Hooks under which the weights stay where they are.
HARMLESS: dict[str, Hook] = {
    "dispatched": lambda model, _: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "dispatched by blocks": lambda model, _: accelerate.dispatch_model(
        model, dict.fromkeys(("blocks.0", *ROOMS), "cpu"), force_hooks=True
    ),
    "whole model": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU),
    "layers skipped": lambda model, _: apply_layer_skip(
        model, LayerSkipConfig(indices=[1], fqn="blocks", skip_attention=False, skip_ff=False, dropout=0.0)
    ),
}


@pytest.fixture(scope="module")
def expected():
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    return model


@pytest.mark.parametrize(("hook", "message"), OFFLOADING.values(), ids=OFFLOADING)
def test_offloaded_weights_are_refused(hook, message, tmp_path):
    model = tiny.transformer().bfloat16()
    hook(model, str(tmp_path))
    with pytest.raises(ModelError, match=message):
        mxdit.quantize_(model, "mxfp4")
    assert not any(isinstance(module, mxdit.MXLinear) for module in model.modules())


# accelerate's casting runs no float Wan either: it casts the convolution that diffusers' own leaves out
@pytest.mark.parametrize("name", [name for name in OFFLOADING if name != "accelerate's casting"])
def test_the_order_that_the_error_tells(name, tmp_path, expected):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    OFFLOADING[name][0](model, str(tmp_path))
    for _ in range(2):  # the second call brings back what the first one put away
        assert torch.equal(tiny.forward(model), tiny.forward(expected))


@pytest.mark.parametrize("name", ["accelerate", "accelerate on disk"])
def test_weights_that_a_removed_hook_brought_back(name, tmp_path, expected):
    model = tiny.transformer().bfloat16()
    OFFLOADING[name][0](model, str(tmp_path))
    remove_hook_from_submodules(model)
    mxdit.quantize_(model, "mxfp4")
    assert tiny.same(model, expected)


@pytest.mark.parametrize("hook", HARMLESS.values(), ids=HARMLESS)
def test_hooks_that_leave_the_weights_in_place(hook, tmp_path, expected):
    model = tiny.transformer().bfloat16()
    hook(model, str(tmp_path))
    mxdit.quantize_(model, "mxfp4")
    assert tiny.same(model, expected)


def test_pipelines_that_offload():
    pipe = tiny.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    mxdit.quantize_(pipe.transformer, "mxfp4")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ModelError, match=r"AlignDevicesHook.* remove_all_hooks\(\) of the pipeline"):
        mxdit.quantize_(pipe.transformer_2, "mxfp4")
    pipe.remove_all_hooks()
    mxdit.quantize_(pipe.transformer_2, "mxfp4")
    clip = tiny.generate(pipe)
    other = tiny.pipeline()
    for name in ("transformer", "transformer_2"):
        mxdit.quantize_(getattr(other, name), "mxfp4")
    assert (clip == tiny.generate(other)).all()


def test_a_cache_over_the_blocks_goes_on_working():
    model, plain = (tiny.transformer().bfloat16() for _ in range(2))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    mxdit.quantize_(model, "mxfp4")
    mxdit.quantize_(plain, "mxfp4")
    with model.cache_context("cond"):
        assert torch.equal(tiny.forward(model), tiny.forward(plain))


def test_a_hook_on_a_linear_itself_would_be_lost():
    model = tiny.transformer().bfloat16()
    HookRegistry.check_if_exists_or_initialize(model.blocks[0].attn1.to_q).register_hook(ModelHook(), "mine")
    with pytest.raises(
        ModelError, match=r"blocks.0.attn1.to_q: the linear has a hook that would be lost; got ModelHook"
    ):
        mxdit.quantize_(model, "mxfp4")


def to_meta(model: nn.Module) -> None:
    model.norm_out.to("meta")
    model.scale_shift_table = nn.Parameter(torch.empty_like(model.scale_shift_table, device="meta"))


def to_fp8(model: nn.Module) -> None:
    model.blocks[1].to(torch.float8_e4m3fn)


def to_double(model: nn.Module) -> None:
    model.blocks[1].double()


def freed(model: nn.Module) -> None:
    """What a sharding library does between two calls."""
    model.blocks[1].ffn.net[2].weight.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_meta, r"scale_shift_table: the weight is not loaded; got a tensor on the meta device"),
        (to_fp8, r"blocks.1.attn1.to_q.weight: .*got a Parameter of torch.float8_e4m3fn; expected torch.bfloat16 or"),
        (to_double, r"blocks.1.attn1.to_q.weight: .*got a Parameter of torch.float64; expected torch.bfloat16 or"),
        (freed, r"blocks.1.ffn.net.2.weight: the weight's memory is not there; got 0 bytes; expected 73728"),
    ],
)
def test_weights_that_are_not_floats_in_memory(change, message):
    """Also in a later block alone: nothing before it is quantized by then."""
    model = tiny.transformer().bfloat16()
    change(model)
    with pytest.raises(ModelError, match=message):
        mxdit.quantize_(model, "mxfp4")
    assert not any(isinstance(module, mxdit.MXLinear) for module in model.modules())


def test_a_sharded_model_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(tiny.transformer().bfloat16(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ModelError, match=r"the weight is not a plain tensor; got DTensor.*before sharding"):
            mxdit.quantize_(model, "mxfp4")
    finally:
        dist.destroy_process_group()
