"""FLUX.2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from tiny_families.parts import TEXT, Tiny, normal, qwen3, qwen_tokenizer, seeded


def flux2(**overrides: Any) -> Flux2Transformer2DModel:
    """Two blocks of each list, d=160, so that a single block's to_out has K=640; three layers of the text encoder's."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": 3 * TEXT,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    return seeded(lambda: Flux2Transformer2DModel(**(config | overrides)))


def flux2_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    one = torch.zeros(1)
    return {
        "hidden_states": normal(model, 11, 1, 16, 16),
        "encoder_hidden_states": normal(model, 12, 1, 6, 3 * TEXT),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]) if model.config.guidance_embeds else None,
        "img_ids": torch.cartesian_prod(one, torch.arange(4.0), torch.arange(4.0), one),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(6.0)),
    }


def flux2_vae() -> AutoencoderKLFlux2:
    """Of stride 2."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
    }  # fmt: skip
    return seeded(lambda: AutoencoderKLFlux2(**config)).bfloat16()


def flux2_pipeline(task: str) -> DiffusionPipeline:
    """Mistral 3 of 30 layers, for the pipeline takes three of them by their numbers; a VAE of stride 2.

    A tokenizer stands for the release's PixtralProcessor, which wants torchvision, and hands text on to its tokenizer.
    """
    assert task == "t2i"
    text = {
        "model_type": "mistral", "vocab_size": 272, "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 30,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}\n{% endfor %}"
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=seeded(lambda: Mistral3ForConditionalGeneration(config)).bfloat16(),
        tokenizer=tokenizer,
        transformer=flux2().bfloat16(),
    )


def klein_pipeline() -> DiffusionPipeline:
    """Qwen3 of 27 layers, for the pipeline takes three of them by their numbers; no embedded guidance."""
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(Qwen3ForCausalLM, 27),
        tokenizer=qwen_tokenizer(),
        transformer=flux2(guidance_embeds=False).bfloat16(),
    )


TINY = {
    "Flux2Transformer2DModel": Tiny(flux2, flux2_inputs, flux2_pipeline, others={"Flux2KleinPipeline": klein_pipeline})
}
