"""ERNIE-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from transformers import Mistral3Config, Mistral3Model

from tiny_families.flux2 import flux2_vae
from tiny_families.parts import TEXT, Tiny, normal, qwen_tokenizer, seeded


def ernie_image(**overrides: Any) -> ErnieImageTransformer2DModel:
    """Two blocks, d=128, K=640 in linear_fc2. The class starts modulation and output at zero, where no input would matter."""
    config = {
        "hidden_size": 128, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 640, "in_channels": 16,
        "out_channels": 16, "text_in_dim": TEXT, "rope_axes_dim": (8, 12, 12),
    }  # fmt: skip

    def make() -> ErnieImageTransformer2DModel:
        model = ErnieImageTransformer2DModel(**(config | overrides))
        for linear in (model.adaLN_modulation[-1], model.final_linear):
            nn.init.normal_(linear.weight, std=0.02)
        return model

    return seeded(make)


def ernie_image_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    return {
        "hidden_states": normal(model, 11, 1, 16, 4, 4),
        "timestep": torch.tensor([700.0]),
        "text_bth": normal(model, 12, 1, 6, TEXT),
        "text_lens": torch.tensor([6]),
    }


def ernie_image_pipeline(task: str) -> DiffusionPipeline:
    """Mistral 3 of 2 layers, for the pipeline takes the output of the last but one; without a model that rewrites prompts."""
    assert task == "t2i"
    text = {
        "model_type": "ministral3", "vocab_size": 272, "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision)
    return ErnieImagePipeline(
        transformer=ernie_image().bfloat16(),
        vae=flux2_vae(),
        text_encoder=seeded(lambda: Mistral3Model(config)).bfloat16(),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


TINY = {"ErnieImageTransformer2DModel": Tiny(ernie_image, ernie_image_inputs, ernie_image_pipeline)}
