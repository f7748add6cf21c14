"""Kandinsky 6 at tiny size: video with sound, and super-resolution."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6SRLatentUpscalerBank,
    Kandinsky6SRPipeline,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    PiflowScheduler,
)

from tiny_families.parts import (
    TEXT,
    Native,
    Tiny,
    clip,
    clip_tokenizer,
    hunyuan_video_vae,
    normal,
    qwen2_5_vl,
    qwen_pair_tokenizer,
    seeded,
    video,
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


def kandinsky6_sr_pipeline() -> DiffusionPipeline:
    """A VAE of stride 4 in space and 2 in time, tiles of 32 x 32 pixels, and the distilled release's scheduler."""
    vae = {
        "latent_channels": 4, "encoder_block_out_channels": (4, 8, 8), "decoder_block_out_channels": (4, 8, 8),
        "layers_per_block": 1, "temporal_compression_ratio": 2,
    }  # fmt: skip
    upscaler = {
        "in_channels": 4, "stage_channels": (8, 8, 8), "num_pre_blocks": 1, "num_mid_blocks": 1, "num_post_blocks": 1,
        "num_x2_adapter_blocks": 1, "scales": (2,),
    }  # fmt: skip
    return Kandinsky6SRPipeline(
        transformer=kandinsky6_sr(tile_sizes=((32, 32),)).bfloat16(),
        vae=seeded(lambda: Kandinsky6SRVAE(**vae)).bfloat16(),
        scheduler=PiflowScheduler(n_grid=2, num_policy_substeps=4),
        latent_upscaler=seeded(lambda: Kandinsky6SRLatentUpscalerBank(**upscaler)).bfloat16(),
    )


def kandinsky6_sr_call() -> dict[str, Any]:
    """3 frames of 16 x 24 pixels to twice the size, in two tiles."""
    return {"video": video(1, 3, 16, 24), "resolution_scale": 2, "num_inference_steps": 2, "output_type": "np"}


TINY = {
    "Kandinsky6Transformer3DModel": Tiny(kandinsky6, kandinsky6_inputs, kandinsky6_pipeline, (16, 32), 5),
    "Kandinsky6SRTransformer3DModel": Tiny(
        kandinsky6_sr,
        kandinsky6_sr_inputs,
        native={"Kandinsky6SRPipeline": Native(kandinsky6_sr_pipeline, kandinsky6_sr_call)},
    ),
}
