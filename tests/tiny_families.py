"""A tiny pipeline of every family, of the real classes of diffusers and transformers, for test_families*.py.

Sizes keep what matters of the big models: several heads, and linears whose K is one 512 group and a part of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import tiny
from mxdit.models import SPECS, ModelSpec

TEXT = 32  # width of every text and image encoder


@dataclass(frozen=True)
class Tiny:
    """One family at tiny size.

    transformer  makes one, float32 and seeded; takes keys of its config.
    inputs       seeded arguments of its forward, in the model's dtype, given the model.
    pipeline     makes a whole one for a task, bfloat16 and seeded.
    size         (height, width) of a run.
    frames       of a run, None for an image.
    more         keys of a config that has linears which the plain one has not.
    """

    transformer: Callable[..., Any]
    inputs: Callable[[Any], dict[str, Any]]
    pipeline: Callable[[str], DiffusionPipeline]
    size: tuple[int, int]
    frames: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def _normal(model: Any, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def _seeded(make: Callable[[], Any], seed: int = 7) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


# -- FLUX.1 ------------------------------------------------------------------------------------------------------------


def flux(**overrides: Any) -> FluxTransformer2DModel:
    """Two blocks of each list, d=128, so that a single block's proj_out has K=640."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": TEXT,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 12, 12),
    }
    return _seeded(lambda: FluxTransformer2DModel(**(config | overrides)))


def flux_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    return {
        "hidden_states": _normal(model, 1, 1, 16, 16),
        "encoder_hidden_states": _normal(model, 2, 1, 6, TEXT),
        "pooled_projections": _normal(model, 3, 1, TEXT),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]) if model.config.guidance_embeds else None,
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
    }


def flux_pipeline(task: str) -> DiffusionPipeline:
    """CLIP and T5, a VAE of stride 2."""
    assert task == "t2i"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = {
        piece: i
        for i, piece in enumerate([*letters, *(f"{a}</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=words["<|startoftext|>"], eos_token_id=words["<|endoftext|>"],
    )  # fmt: skip
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
        "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "scaling_factor": 0.36,
    }  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_seeded(lambda: AutoencoderKL(**vae)).bfloat16(),
        text_encoder=_seeded(lambda: CLIPTextModel(clip)).bfloat16(),
        tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=24),
        text_encoder_2=_t5(64),
        tokenizer_2=T5Tokenizer(
            vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)],
            extra_ids=0,
        ),
        transformer=flux().bfloat16(),
    )


def _t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=TEXT, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return _seeded(lambda: T5EncoderModel(config)).bfloat16()


# -- HunyuanVideo 1.5 --------------------------------------------------------------------------------------------------


def hunyuan(**overrides: Any) -> HunyuanVideo15Transformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640; one block of the text's refiner."""
    config = {
        "in_channels": 9,  # 4 of the latents, 4 of the image's and a mask
        "out_channels": 4,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT,
        "text_embed_2_dim": TEXT,
        "image_embed_dim": TEXT,
        "rope_axes_dim": (8, 12, 12),
        "target_size": 32,
    }
    return _seeded(lambda: HunyuanVideo15Transformer3DModel(**(config | overrides)))


def hunyuan_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents, 6 tokens of text, 4 of glyphs (of which one is padding) and 3 of an image."""
    return {
        "hidden_states": _normal(model, 4, 1, 9, 2, 4, 4),
        "timestep": torch.tensor([700.0], dtype=model.dtype),  # as its pipelines cast it
        "encoder_hidden_states": _normal(model, 5, 1, 6, TEXT),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "encoder_hidden_states_2": _normal(model, 6, 1, 4, TEXT),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
        "image_embeds": _normal(model, 7, 1, 3, TEXT),
    }


def hunyuan_pipeline(task: str) -> DiffusionPipeline:
    """The text half of Qwen2.5-VL, ByT5, for I2V SigLIP, and a VAE of stride 4 in time and space."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    pieces = {piece: i for i, piece in enumerate([*bytes_to_unicode().values(), *marks])}
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(pieces), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, pad_token_id=pieces["<|endoftext|>"],
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    )  # fmt: skip
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    tokenizer = Qwen2Tokenizer(vocab=pieces, merges=[], extra_special_tokens=list(marks[1:]))
    tokenizer.chat_template = template
    vae: dict[str, Any] = {
        "latent_channels": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "spatial_compression_ratio": 4,
    }  # fmt: skip
    bytes_of = ByT5Tokenizer()
    parts: dict[str, Any] = {
        "text_encoder": _seeded(lambda: Qwen2_5_VLTextModel(qwen)).bfloat16(),
        "tokenizer": tokenizer,
        "transformer": hunyuan(task_type=task).bfloat16(),
        "vae": _seeded(lambda: AutoencoderKLHunyuanVideo15(**vae)).bfloat16(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": _t5(len(bytes_of)),
        "tokenizer_2": bytes_of,
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if task == "t2v":
        return HunyuanVideo15Pipeline(**parts)
    siglip = SiglipVisionConfig(
        hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **parts,
        image_encoder=_seeded(lambda: SiglipVisionModel(siglip)).bfloat16(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


# -- Wan ---------------------------------------------------------------------------------------------------------------


def wan_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 8 x 8 latents, 6 tokens of text, and 257 of an image where the model takes one."""
    width = model.config.image_dim
    return {
        "hidden_states": _normal(model, 8, 1, model.config.in_channels, 2, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": _normal(model, 9, 1, 6, tiny.TEXT_DIM),
        "encoder_hidden_states_image": _normal(model, 10, 1, 257, width) if width else None,
    }


WAN21_I2V = {"added_kv_proj_dim": 64, "image_dim": TEXT}
TINY = {
    "WanTransformer3DModel": Tiny(tiny.transformer, wan_inputs, tiny.pipeline, (16, 16), 5, WAN21_I2V),
    "FluxTransformer2DModel": Tiny(flux, flux_inputs, flux_pipeline, (16, 24)),
    "HunyuanVideo15Transformer3DModel": Tiny(hunyuan, hunyuan_inputs, hunyuan_pipeline, (16, 24), 5),
}


def tiny_of(spec: ModelSpec) -> Tiny:
    assert spec.transformer in TINY, f"write a tiny {spec.transformer} and its pipelines in tests/tiny_families.py"
    return TINY[spec.transformer]


families = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
pipelines = pytest.mark.parametrize(
    "spec, name", [pytest.param(spec, name, id=name) for spec in SPECS.values() for name in spec.pipelines]
)
