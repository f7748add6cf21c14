"""Fibo 2.0 at tiny size."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import (
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from tiny_families.flux2 import flux2_vae
from tiny_families.parts import (
    TEXT,
    Native,
    Tiny,
    image,
    normal,
    qwen3_vl,
    qwen_processor,
    qwen_vision_processor,
    seeded,
)


def bria_fibo2(**overrides: Any) -> BriaFibo2Transformer2DModel:
    """Two blocks, the second of which reads the text, and one that refines, d=288, so that the FFN's last has K=768."""
    config = {
        "in_channels": 4,
        "dim": 288,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 9,
        "cap_feat_dim": TEXT,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 8,
        "axes_dims": (8, 12, 12),
        "axes_lens": (32, 16, 16),
    }
    model = seeded(lambda: BriaFibo2Transformer2DModel(**(config | overrides)))
    for layer in model.config.injection_layer_ids:
        model.layers[layer].cross_attn_gate.data.fill_(1.0)  # it begins with none of the text
    return model


def bria_fibo2_inputs(model: Any) -> dict[str, Any]:
    """4 x 4 tokens of an image, and 6 of text for the gist and for one layer."""
    return {
        "hidden_states": normal(model, 38, 1, 4, 8, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": normal(model, 39, 1, 2, 6, TEXT),
    }


def bria_fibo2_pipeline(task: str) -> DiffusionPipeline:
    """Qwen3-VL of 36 layers, of which the pipeline takes six times three, one for the gist and five for as many layers."""
    assert task == "t2i"
    return _bria_fibo2_pipeline(qwen_processor())


def _bria_fibo2_pipeline(processor: Any) -> DiffusionPipeline:
    return BriaFibo2Pipeline(
        transformer=bria_fibo2(n_layers=5, injection_layer_ids=tuple(range(5)), cap_feat_dim=3 * TEXT).bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3_vl(Qwen3VLForConditionalGeneration, 36),
        processor=processor,
    )


def edit() -> dict[str, Any]:
    """One image, of which a half is to be made anew."""
    prompt = {"short_description": "a red seven", "edit_instruction": "make it blue"}
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return {
        "prompt": json.dumps(prompt), "image": image(0), "mask": mask, "height": 16, "width": 24,
        "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np",
    }  # fmt: skip


NATIVE = {"BriaFibo2Pipeline": Native(lambda: _bria_fibo2_pipeline(qwen_vision_processor(16)), edit, output="images")}
TINY = {
    "BriaFibo2Transformer2DModel": Tiny(bria_fibo2, bria_fibo2_inputs, bria_fibo2_pipeline, native=NATIVE),
}
