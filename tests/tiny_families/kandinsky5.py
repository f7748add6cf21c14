"""Kandinsky 5 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from tiny_families.parts import (
    TEXT,
    Tiny,
    clip,
    clip_tokenizer,
    hunyuan_video_vae,
    normal,
    qwen2_5_vl,
    qwen_pair_tokenizer,
    seeded,
)


def _made(config: dict[str, Any]) -> Kandinsky5Transformer3DModel:
    """With modulations as if trained: the class makes them zero, and with them what a block adds."""
    model = Kandinsky5Transformer3DModel(**config)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def kandinsky5(**overrides: Any) -> Kandinsky5Transformer3DModel:
    """Two visual blocks, d=64, and a feed-forward whose second linear has K=544; one block of text."""
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": TEXT,
        "in_text_dim2": TEXT,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 544,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
        "visual_cond": True,
    }
    return seeded(lambda: _made(config | overrides))


def kandinsky5_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents, with the given frames' and their mask, and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 15, 1, 2, 4, 4, 9),
        "encoder_hidden_states": normal(model, 16, 1, 6, TEXT),
        "pooled_projections": normal(model, 17, 1, TEXT),
        "timestep": torch.tensor([700.0], dtype=model.dtype),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(6),
    }


def kandinsky5_pipeline(task: str) -> DiffusionPipeline:
    """Qwen2.5-VL, CLIP, and HunyuanVideo's VAE of stride 4 in time and space.

    Its processor, which would take images too, needs torchvision; the tokenizer inside it does what is asked here. A run has
    17 frames, because the image pipeline fits the first four latent frames to those that follow.
    """
    cls = {"t2v": Kandinsky5T2VPipeline, "i2v": Kandinsky5I2VPipeline}[task]
    return cls(
        transformer=kandinsky5().bfloat16(),
        vae=hunyuan_video_vae(),
        text_encoder=qwen2_5_vl(len(qwen_pair_tokenizer())),
        tokenizer=qwen_pair_tokenizer(),
        text_encoder_2=clip(77),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


TINY = {"Kandinsky5Transformer3DModel": Tiny(kandinsky5, kandinsky5_inputs, kandinsky5_pipeline, (16, 32), 17)}
