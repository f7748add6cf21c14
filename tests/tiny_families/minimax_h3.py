"""MiniMax-H3 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Blocks,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from transformers import Qwen3VLForConditionalGeneration

from tiny_families.parts import TEXT, Native, Tiny, normal, qwen3_vl, qwen_processor, seeded


def minimax_h3(**overrides: Any) -> MiniMaxH3Transformer3DModel:
    """Two blocks, d=64, and a feed-forward whose second linear has K=544; one block of the text's refiner."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "hidden_size": 64,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 544,
        "in_channels": 4,
        "audio_in_channels": 4,
        "text_dim": TEXT,
        "freq_dim": 32,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 32,
        "rope_freq_dim": 4,
    }
    return seeded(lambda: MiniMaxH3Transformer3DModel(**(config | overrides)))


def minimax_h3_inputs(model: Any) -> dict[str, Any]:
    """One sequence, all of it at one timestep: 6 tokens of text, 3 of sound, and 2 frames of 2 x 2 patches."""
    frames = torch.cartesian_prod(torch.arange(6.0, 8.0), torch.arange(2.0), torch.arange(2.0))
    before = torch.arange(9.0)[:, None].expand(9, 3)
    return {
        "hidden_states": normal(model, 23, 1, 8, 16),
        "audio_hidden_states": normal(model, 24, 1, 3, 4),
        "encoder_hidden_states": normal(model, 25, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "timestep_indices": torch.zeros(17, dtype=torch.long),
        "token_tags": torch.tensor([1] * 6 + [2] * 3 + [0] * 8),
        "position_ids": torch.cat([before, frames]),
        "video_indices": torch.arange(9, 17),
        "audio_indices": torch.arange(6, 9),
        "text_indices": torch.arange(6),
    }


def minimax_h3_pipeline() -> Any:
    """The workflow of text alone, because the processor of images needs torchvision; VAEs of stride 2.

    The text encoder has 51 layers, because what the 50th gives is taken.
    """
    blocks = MiniMaxH3Blocks().get_workflow("t2va")
    pipeline = MiniMaxH3ModularPipeline(blocks)
    video_vae = {
        "latent_channels": 4, "block_out_channels": (4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2,
        "spatial_downsample_factors": (2, 1, 1), "temporal_downsample_factors": (1, 2, 2), "decoder_num_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16, "latents_mean": (0.1,) * 4,
        "latents_std": (2.0,) * 4,
    }  # fmt: skip
    audio_vae = {
        "encoder_dim": 2, "encoder_rates": (2,), "latent_dim": 32, "latent_channels": 4, "num_attention_heads": 2,
        "decoder_dim": 8, "decoder_rates": (2,), "decoder_kernel_sizes": (4,), "resblock_kernel_sizes": (3,),
        "resblock_dilation_sizes": ((1,),), "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
    }  # fmt: skip
    processor = qwen_processor()
    pipeline.update_components(
        transformer=minimax_h3().bfloat16(),
        vae=seeded(lambda: AutoencoderKLMiniMaxH3(**video_vae)).bfloat16(),
        audio_vae=seeded(lambda: AutoencoderKLMiniMaxH3Audio(**audio_vae)).bfloat16(),
        scheduler=MiniMaxH3Scheduler(),
        audio_scheduler=MiniMaxH3Scheduler(),
        text_encoder=qwen3_vl(Qwen3VLForConditionalGeneration, 51),
        tokenizer=processor.tokenizer,
        processor=processor,
    )
    return pipeline


def minimax_h3_call() -> dict[str, Any]:
    """The fewest frames that it makes: five seconds."""
    return {
        "prompt": "a red seven", "height": 8, "width": 8, "num_frames": 124, "num_inference_steps": 2,
        "output_type": "np",
    }  # fmt: skip


TINY = {
    "MiniMaxH3Transformer3DModel": Tiny(
        minimax_h3,
        minimax_h3_inputs,
        native={"MiniMaxH3ModularPipeline": Native(minimax_h3_pipeline, minimax_h3_call, "videos")},
    )
}
