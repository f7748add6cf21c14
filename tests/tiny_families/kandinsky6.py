"""Kandinsky 6 at tiny size: video with sound, and super-resolution."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
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


def kandinsky6(**overrides: Any) -> Kandinsky6Transformer3DModel:
    """Two fused blocks, d=64, and a feed-forward whose second linear has K=544; one block of text for each side."""
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_audio_dim": 4,
        "out_audio_dim": 4,
        "in_text_dim": TEXT,
        "in_text_dim2": TEXT,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 544,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
        "text_token_padding": True,
        "ca_rope": True,
        "cross_gates": True,
        "fix_modulation": True,
    }
    return seeded(lambda: Kandinsky6Transformer3DModel(**(config | overrides)))


def kandinsky6_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents, with the given frames' and their mask, 5 of sound and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 18, 1, 2, 4, 4, 9),
        "audio_hidden_states": normal(model, 19, 1, 5, 4),
        "encoder_hidden_states": normal(model, 20, 1, 6, TEXT),
        "pooled_projections": normal(model, 21, 1, TEXT),
        "timestep": torch.tensor([700.0]),
    }


def kandinsky6_pipeline(task: str) -> DiffusionPipeline:
    """Qwen2.5-VL, CLIP, HunyuanVideo's VAE, and nothing for the sound, which is not asked for.

    Its processor, which would take images too, needs torchvision; the tokenizer inside it does what is asked here.
    """
    assert task == "t2v"
    return Kandinsky6TI2VAPipeline(
        transformer=kandinsky6().bfloat16(),
        vae=hunyuan_video_vae(),
        text_encoder=qwen2_5_vl(len(qwen_pair_tokenizer())),
        tokenizer=qwen_pair_tokenizer(),
        text_encoder_2=clip(77),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def kandinsky6_sr(**overrides: Any) -> Kandinsky6SRTransformer3DModel:
    """Two blocks, d=64, and a feed-forward whose second linear has K=544."""
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 8,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 544,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
    }
    return seeded(lambda: Kandinsky6SRTransformer3DModel(**(config | overrides)))


def kandinsky6_sr_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 8 x 8 latents, the least that its sparse attention takes, with the anchor's and its mask."""
    return {"hidden_states": normal(model, 22, 1, 2, 8, 8, 9), "timestep": torch.tensor([700.0])}


TINY = {
    "Kandinsky6Transformer3DModel": Tiny(kandinsky6, kandinsky6_inputs, kandinsky6_pipeline, (16, 32), 5),
    "Kandinsky6SRTransformer3DModel": Tiny(kandinsky6_sr, kandinsky6_sr_inputs, None, (16, 24), 5),
}
