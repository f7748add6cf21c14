"""HunyuanVideo and FramePack at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tiny_families.parts import TEXT, Native, Tiny, clip_tokenizer, image, llama_tokenizer, normal, seeded

_SIZES = {  # d=160, so that the FFN's second linear has K=640 and a single block's proj_out K=800
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "rope_axes_dim": (8, 12, 12),
}


_FRAMEPACK = {"has_image_proj": True, "image_proj_dim": TEXT, "has_clean_x_embedder": True}


def hunyuan(**overrides: Any) -> HunyuanVideoTransformer3DModel:
    return seeded(lambda: HunyuanVideoTransformer3DModel(**(_SIZES | overrides)))


def framepack(**overrides: Any) -> HunyuanVideoFramepackTransformer3DModel:
    return seeded(lambda: HunyuanVideoFramepackTransformer3DModel(**(_SIZES | _FRAMEPACK | overrides)))


def inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents and 6 tokens of text, of which one is padding."""
    return {
        "hidden_states": normal(model, 4, 1, model.config.in_channels, 2, 4, 4),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 5, 1, 6, TEXT),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "pooled_projections": normal(model, 6, 1, TEXT),
        "guidance": torch.tensor([6000.0]),
    }


def framepack_inputs(model: Any) -> dict[str, Any]:
    """The same, 3 tokens of an image, and the frames before: one as it is, two at half and four at a quarter of the size."""
    return inputs(model) | {
        "image_embeds": normal(model, 7, 1, 3, TEXT),
        "indices_latents": torch.arange(7, 9),
        "latents_clean": normal(model, 8, 1, 4, 1, 4, 4),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": normal(model, 9, 1, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": normal(model, 10, 1, 4, 4, 4, 4),
        "indices_latents_history_4x": torch.arange(4),
    }


def parts() -> dict[str, Any]:
    """All but the transformer and what sees an image: Llama, CLIP, and a VAE of stride 8."""
    words: Any = llama_tokenizer()
    tokenizer: Any = clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae: dict[str, Any] = {
        "latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }  # fmt: skip
    return {
        "tokenizer": words,
        "text_encoder": seeded(lambda: LlamaModel(llama(words))).bfloat16(),
        "text_encoder_2": seeded(lambda: CLIPTextModel(clip)).bfloat16(),
        "tokenizer_2": tokenizer,
        "vae": seeded(lambda: AutoencoderKLHunyuanVideo(**vae)).bfloat16(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def llama(words: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def pipeline(task: str) -> DiffusionPipeline:
    """For I2V, Llava in Llama's place sees the image as 576 tokens, as the pipeline counts on."""
    shared = parts()
    if task == "t2v":
        return HunyuanVideoPipeline(**shared, transformer=hunyuan().bfloat16())
    words = shared["tokenizer"]
    side = 24 * 2  # of an image of 24 x 24 patches
    vision = CLIPVisionConfig(
        hidden_size=TEXT,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=2,
    )
    llava: dict[str, Any] = {
        "text_config": llama(words), "vision_config": vision, "pad_token_id": words.pad_token_id,
        "image_token_index": words.convert_tokens_to_ids("<image>"),
    }  # fmt: skip
    size = {"height": side, "width": side}
    return HunyuanVideoImageToVideoPipeline(
        **shared | {"text_encoder": seeded(lambda: LlavaForConditionalGeneration(LlavaConfig(**llava))).bfloat16()},
        transformer=hunyuan(image_condition_type="token_replace").bfloat16(),
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
    )


def framepack_pipeline() -> DiffusionPipeline:
    """With Siglip, which sees an image as 4 patches."""
    size = {"height": 32, "width": 32}
    config = SiglipVisionConfig(
        hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return HunyuanVideoFramepackPipeline(
        **parts(),
        transformer=framepack().bfloat16(),
        image_encoder=seeded(lambda: SiglipVisionModel(config)).bfloat16(),
        feature_extractor=SiglipImageProcessor(size=size),
    )


def framepack_call() -> dict[str, Any]:
    """Two sections of two frames of latents between a first and a last image, the later one first."""
    return {
        "prompt": "a red seven", "image": image(1), "last_image": image(2), "height": 32, "width": 32,
        "num_frames": 10, "latent_window_size": 2, "num_inference_steps": 2, "output_type": "np",
    }  # fmt: skip


_I2V = {"image_condition_type": "token_replace"}  # blocks of another class, with the same linears
TINY = {
    "HunyuanVideoTransformer3DModel": Tiny(hunyuan, inputs, pipeline, (16, 16), 5, _I2V),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        framepack,
        framepack_inputs,
        native={"HunyuanVideoFramepackPipeline": Native(framepack_pipeline, framepack_call)},
    ),
}
