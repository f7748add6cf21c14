"""GLM-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
)

from tiny_families.parts import TEXT, Tiny, image_vae, normal, seeded, t5

CODES = 64  # of the coarse image


def glm_image(**overrides: Any) -> GlmImageTransformer2DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "text_embed_dim": TEXT,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": CODES,
    }
    return seeded(lambda: GlmImageTransformer2DModel(**(config | overrides)))


def glm_image_inputs(model: Any) -> dict[str, Any]:
    """4 x 4 tokens of an image, as many of the coarse one that it follows, and 6 of text."""
    return {
        "hidden_states": normal(model, 22, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 23, 1, 6, TEXT),
        "prior_token_id": torch.arange(16)[None],
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": torch.tensor([700.0]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """Of words and digits, behind the codes and the two marks of a coarse image; its vocabulary is smaller than 128."""
    codes = [f"<|code_{i}|>" for i in range(CODES)]
    marks = ["<|image_start|>", "<|image_end|>", "<unk>", "<pad>", "<grid>", "</grid>", "<|image|>", "<|user|>"]
    words = [*"0123456789", "a", "red", "seven", "moves", "left"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*codes, *marks, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\w+|[^\w\s]+"), "removed", invert=True)
    named = {"image_token": marks[6], "grid_bos_token": marks[4], "grid_eos_token": marks[5]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[1], unk_token=marks[2], pad_token=marks[3],
        extra_special_tokens=named, padding_side="left",
    )  # fmt: skip


def glm_image_pipeline(task: str) -> DiffusionPipeline:
    """An autoregressive model of one layer that draws codes, a T5 of bytes for what is written in the image, a VAE of stride 8:
    a code stands for 32 x 32 pixels."""
    assert task == "t2i"
    tokenizer = glm_tokenizer()
    text = {
        "vocab_size": 128, "vision_vocab_size": CODES, "hidden_size": TEXT, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": TEXT, "intermediate_size": 64, "num_heads": 2, "image_size": 64}
    config = GlmImageConfig(
        text_config=text,
        vision_config=vision,
        vq_config={"embed_dim": TEXT, "num_embeddings": CODES, "latent_channels": TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=tokenizer.bos_token_id,
        image_end_token_id=tokenizer.eos_token_id,
    )
    template = (
        "{% for m in messages %}<|user|>{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<|image_start|><|image|><|image_end|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(extra_ids=0),
        processor=GlmImageProcessor(GlmImageImageProcessor(), tokenizer, chat_template=template),
        text_encoder=t5(384),
        vision_language_encoder=seeded(lambda: GlmImageForConditionalGeneration(config)).bfloat16(),
        vae=image_vae(4, latents_mean=[0.1] * 4, latents_std=[2.0] * 4),
        transformer=glm_image().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


TINY = {"GlmImageTransformer2DModel": Tiny(glm_image, glm_image_inputs, glm_image_pipeline, (32, 64))}
