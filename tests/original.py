"""Tiny experts in the layout of Wan's own release: its names, its folders, its config.json, FP32 in two shards.

The names come from diffusers' own converter, so that our map is held against somebody else's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

import tiny

EXPERTS = {"high_noise_model": "transformer", "low_noise_model": "transformer_2"}
STEM = "diffusion_pytorch_model"


def transformer(component: str, task: str = "t2v", **overrides: Any) -> WanTransformer3DModel:
    """The expert that `save` writes in that component's folder; its config says no more than an original one can."""
    seed = 1 + list(EXPERTS.values()).index(component)
    model = tiny.transformer(task, seed=seed, rope_max_seq_len=1024, **overrides)
    with torch.no_grad():  # what no random weight has: whole groups of zeros, and a block of them
        model.blocks[0].ffn.net[2].weight[0] = 0
        model.blocks[0].ffn.net[2].weight[1, 32:64] = 0
    return model


def save(directory: Path, task: str = "t2v", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Both experts; `overrides` are keys of the diffusers config."""
    for folder, component in EXPERTS.items():
        model = transformer(component, task, **overrides)
        expert = directory / folder
        expert.mkdir(parents=True)
        _save_shards(expert, {name: tensor.to(dtype).contiguous() for name, tensor in state_dict(model).items()})
        (expert / "config.json").write_text(json.dumps(_config(model, task)))
    return directory


def state_dict(model: WanTransformer3DModel) -> dict[str, Tensor]:
    """The model's tensors under Wan's own names."""
    theirs = names(model.config.num_layers)
    return {theirs[name]: tensor.detach() for name, tensor in model.state_dict().items()}


def names(blocks: int) -> dict[str, str]:
    """diffusers' name of each tensor -> Wan's."""
    linears = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    linears += ["time_projection.1", "head.head"]
    alone = ["head.modulation"]
    for block in (f"blocks.{index}" for index in range(blocks)):
        attentions = [f"{block}.{kind}" for kind in ("self_attn", "cross_attn")]
        linears += [f"{attention}.{name}" for attention in attentions for name in "qkvo"]
        linears += [f"{block}.{name}" for name in ("ffn.0", "ffn.2", "norm3")]
        alone += [f"{attention}.norm_{name}.weight" for attention in attentions for name in "qk"]
        alone.append(f"{block}.modulation")
    theirs = [f"{path}.{leaf}" for path in linears for leaf in ("weight", "bias")] + alone
    return convert_wan_transformer_to_diffusers({name: name for name in theirs})


def _config(model: WanTransformer3DModel, task: str) -> dict[str, Any]:
    config = model.config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": task,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": 512,
    }


def _save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    half = len(tensors) // 2
    shards = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    files = [f"{STEM}-{index:05d}-of-00002.safetensors" for index in (1, 2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
