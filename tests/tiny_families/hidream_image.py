"""HiDream-I1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

from tiny_families.parts import (
    TEXT,
    Tiny,
    clip_tokenizer,
    image_vae,
    llama_tokenizer,
    normal,
    seeded,
    t5,
    t5_tokenizer,
)


def hidream_image(**overrides: Any) -> HiDreamImageTransformer2DModel:
    """Two blocks of each list, d=224, so that the last linear of an expert has K=768."""
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 7,
        "caption_channels": [TEXT, TEXT],
        "text_emb_dim": 2 * TEXT,
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (16, 16),
        "llama_layers": [0, 1, 1, 1],
    }
    return seeded(lambda: HiDreamImageTransformer2DModel(**(config | overrides)))


def hidream_image_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 tokens of an image, so that every expert gets some, 6 of T5 and 5 of each of two layers of Llama."""
    return {
        "hidden_states": normal(model, 24, 1, 4, 16, 16),
        "timesteps": torch.tensor([700.0]),
        "encoder_hidden_states_t5": normal(model, 25, 1, 6, TEXT),
        "encoder_hidden_states_llama3": normal(model, 26, 2, 1, 5, TEXT),
        "pooled_embeds": normal(model, 27, 1, 2 * TEXT),
    }


def hidream_image_pipeline(task: str) -> DiffusionPipeline:
    """Two CLIPs, a T5 and a Llama of two layers. The pipeline's area is 128 x 128 latents: so the VAE's stride is 1, and a
    patch 16 x 16 latents."""
    assert task == "t2i"
    tokenizer = clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, projection_dim=TEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=64, hidden_size=TEXT, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(1, mid_block_add_attention=False),  # which would be of every pixel with each other
        text_encoder=seeded(lambda: CLIPTextModelWithProjection(clip)).bfloat16(),
        tokenizer=tokenizer,
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip), 8).bfloat16(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(64),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=seeded(lambda: LlamaForCausalLM(llama)).bfloat16(),
        tokenizer_4=llama_tokenizer(),
        transformer=hidream_image(patch_size=16, max_resolution=(128, 128)).bfloat16(),
    )


TINY = {
    "HiDreamImageTransformer2DModel": Tiny(hidream_image, hidream_image_inputs, hidream_image_pipeline, (64, 256)),
}
