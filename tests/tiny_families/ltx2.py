"""LTX-2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from tiny_families.parts import TEXT, Tiny, normal, seeded

VIDEO, AUDIO = 160, 64  # widths of the two streams


def ltx2(**overrides: Any) -> LTX2VideoTransformer3DModel:
    """Two blocks, d=160 for the video, so that its FFN's second linear has K=640."""
    config: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "cross_attention_dim": VIDEO,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": AUDIO,
        "num_layers": 2,
        "caption_channels": TEXT,
    }
    return seeded(lambda: LTX2VideoTransformer3DModel(**(config | overrides)))


def ltx2_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 2 x 3 latents, 5 of sound, and 6 tokens of text, projected for each stream where the model does not."""
    projects = model.config.use_prompt_embeddings
    return {
        "hidden_states": normal(model, 1, 1, 12, 8),
        "audio_hidden_states": normal(model, 2, 1, 5, 8),
        "encoder_hidden_states": normal(model, 3, 1, 6, TEXT if projects else VIDEO),
        "audio_encoder_hidden_states": normal(model, 4, 1, 6, TEXT if projects else AUDIO),
        "timestep": torch.tensor([700.0]),
        "sigma": torch.tensor([700.0]),
        "num_frames": 2,
        "height": 2,
        "width": 3,
        "fps": 24.0,
        "audio_num_frames": 5,
    }


def ltx2_pipeline(task: str) -> DiffusionPipeline:
    """Gemma 3, a VAE of stride 4 in time and 16 in space, one of sound of 2 x 4 channels, and a vocoder."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    pieces = {piece: i for i, piece in enumerate([*marks, *map(chr, range(ord("a"), ord("z") + 1))])}
    text: dict[str, Any] = {
        "vocab_size": len(pieces), "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    gemma = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=4)
    vae: dict[str, Any] = {
        "latent_channels": 8, "block_out_channels": (8, 8), "decoder_block_out_channels": (8, 16),
        "down_block_types": ("LTX2VideoDownBlock3D",) * 2, "layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, True),
        "decoder_spatio_temporal_scaling": (True, True), "decoder_inject_noise": (False,) * 3,
        "downsample_type": ("spatiotemporal",) * 2, "upsample_type": ("spatiotemporal",) * 2,
        "upsample_residual": (True, True), "upsample_factor": (2, 2), "patch_size": 4,
        "spatial_compression_ratio": 16, "temporal_compression_ratio": 4,
    }  # fmt: skip
    sound: dict[str, Any] = {
        "base_channels": 8, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 16,
    }  # fmt: skip
    connectors: dict[str, Any] = {
        "caption_channels": TEXT, "text_proj_in_factor": 2, "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 16, "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": 8, "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 16, "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": 8,
    }  # fmt: skip
    vocoder: dict[str, Any] = {
        "in_channels": 32, "hidden_channels": 8, "upsample_kernel_sizes": [4], "upsample_factors": [2],
        "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 1, 1]],
    }  # fmt: skip
    made = {"t2v": LTX2Pipeline, "i2v": LTX2ImageToVideoPipeline}[task]
    return made(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=seeded(lambda: AutoencoderKLLTX2Video(**vae)).bfloat16(),
        audio_vae=seeded(lambda: AutoencoderKLLTX2Audio(**sound)).bfloat16(),
        text_encoder=seeded(lambda: Gemma3ForConditionalGeneration(gemma)).bfloat16(),
        tokenizer=GemmaTokenizer(vocab=pieces, merges=[]),
        connectors=seeded(lambda: LTX2TextConnectors(**connectors)).bfloat16(),
        transformer=ltx2().bfloat16(),
        vocoder=seeded(lambda: LTX2Vocoder(**vocoder)).bfloat16(),
    )


# What the config of LTX-2.3 has beyond that of LTX-2.
LTX23 = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
TINY = {"LTX2VideoTransformer3DModel": Tiny(ltx2, ltx2_inputs, ltx2_pipeline, (32, 64), 5, LTX23)}
