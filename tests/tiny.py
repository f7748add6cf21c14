"""Tiny Wan2.2 pipelines of the real diffusers classes: two experts, VAE, UMT5, tokenizer, scheduler. Built locally, seeded.

Sizes keep what matters of the big model: K of the FFN's second linear spans one 512 group and a part of another, several
heads, and an I2V expert that takes 36 channels. Other families are in tiny_families.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TASKS = ("t2v", "i2v")
WORDS = ("a", "red", "blue", "green", "seven", "three", "moving", "left", "right", "on", "background")
TEXT_DIM = 32
BLOCKS = 2
WEIGHTS = "diffusion_pytorch_model.safetensors"  # where an expert saved as one file keeps its tensors
LINEARS = 10  # of a block


def transformer(task: str = "t2v", *, seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """One expert in float32, d=64, f=576; `overrides` are keys of its config."""
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 36 if task == "i2v" else 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 64,
        "ffn_dim": 576,
        "num_layers": BLOCKS,
        "rope_max_seq_len": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**(config | overrides)).eval()


def pipeline(task: str = "t2v", dtype: torch.dtype = torch.bfloat16) -> DiffusionPipeline:
    """A whole cascade; the experts and the text encoder in `dtype`, the VAE in float32 as Wan2.2 wants it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        )
    cls = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}[task]
    return cls(
        tokenizer=_tokenizer(),
        text_encoder=text_encoder.to(dtype).eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(task, seed=1).to(dtype),
        transformer_2=transformer(task, seed=2).to(dtype),
        boundary_ratio=0.875 if task == "t2v" else 0.9,
    )


def save(directory: Path, task: str = "t2v", **kwargs: Any) -> Path:
    """A pipeline's directory, as a hub would hold it; `kwargs` go to `save_pretrained`."""
    pipeline(task).save_pretrained(directory, **kwargs)
    return directory


def forward(model: WanTransformer3DModel, *, seed: int = 0) -> torch.Tensor:
    """One call on seeded inputs: 2 frames of 8x8 latents and 6 tokens of text. Returns (1, 16, 2, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.dtype
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, model.config.in_channels, 2, 8, 8, generator=generator).to(dtype),
            timestep=torch.tensor([999.3]),
            encoder_hidden_states=torch.randn(1, 6, TEXT_DIM, generator=generator).to(dtype),
        ).sample


def load(
    directory: Path, config: Any = None, dtype: torch.dtype | None = torch.bfloat16, **kwargs: Any
) -> WanTransformer3DModel:
    """One expert's directory through `from_pretrained`, with diffusers' own names for the arguments."""
    return WanTransformer3DModel.from_pretrained(directory, quantization_config=config, torch_dtype=dtype, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same kinds of layers and the same tensors, dtypes included."""
    left, right = a.state_dict(), b.state_dict()
    return (
        [type(module) for module in a.modules()] == [type(module) for module in b.modules()]
        and left.keys() == right.keys()
        and all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)
    )


def generate(pipe: Any, *, steps: int = 4, seed: int = 0) -> np.ndarray:
    """A clip of 5 frames of 16x16 that both experts have worked on: (1, 5, 16, 16, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    image = {}
    if isinstance(pipe, WanImageToVideoPipeline):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = {"image": Image.fromarray(pixels)}
    return pipe(
        prompt="a red seven moving left",
        negative_prompt="blue",
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        max_sequence_length=8,
        output_type="np",
        generator=torch.Generator().manual_seed(seed),
        **image,
    ).frames


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
