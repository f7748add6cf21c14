"""Allegro at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from tiny_families.parts import TEXT, Tiny, normal, seeded, t5, t5_tokenizer


def allegro(**overrides: Any) -> AllegroTransformer3DModel:
    """Two blocks, d=192, so that the FFN's second linear has K=768."""
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "cross_attention_dim": 192,
        "num_layers": 2,
        "sample_height": 4,
        "sample_width": 6,
        "sample_frames": 2,
        "caption_channels": TEXT,
    }
    return seeded(lambda: AllegroTransformer3DModel(**(config | overrides)))


def allegro_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text, of which one is padding."""
    tables: Any = get_3d_rotary_pos_embed_allegro(48, ((0, 0), (2, 3)), (2, 3), 2)
    *angles, frames, rows, columns = tables
    positions = torch.cartesian_prod(frames, rows, columns).long().unbind(1)
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "timestep": torch.tensor([700]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "image_rotary_emb": (angles, [axis[None] for axis in positions]),
    }


def allegro_pipeline(_: str) -> DiffusionPipeline:
    """T5, and a VAE whose tiles are as small as their fixed overlaps let them be."""
    vae: dict[str, Any] = {
        "block_out_channels": (4,) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 128,
    }
    return AllegroPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(64),
        vae=seeded(lambda: AutoencoderKLAllegro(**vae)).bfloat16(),
        transformer=allegro().bfloat16(),
        scheduler=EulerAncestralDiscreteScheduler(),
    )


TINY = {"AllegroTransformer3DModel": Tiny(allegro, allegro_inputs, allegro_pipeline, (128, 128), 24)}
