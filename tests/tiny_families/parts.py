"""What the tiny families are made of: `Tiny`, seeds, and small text encoders of the real classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage, DiffusionPipeline
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT = 32  # width of every text and image encoder
_QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION_IDS = {  # of `qwen_vision_processor`: behind 256 bytes and the marks of a chat
    key: 256 + len(_QWEN_MARKS) + i
    for i, key in enumerate(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"))
}
_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


@dataclass(frozen=True)
class Native:
    """A tiny pipeline that is called through diffusers, for what no request of ours has words for.

    pipeline  makes it, bfloat16 and seeded.
    call      arguments of its call for two steps, all but the generator, made anew for each; arrays are to come out of it.
    output    attribute of what the call returns: a batch of arrays between 0 and 1, or a list of arrays.
    """

    pipeline: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    output: str = "frames"


@dataclass(frozen=True)
class Tiny:
    """One family at tiny size.

    transformer  makes one, float32 and seeded; takes keys of its config.
    inputs       seeded arguments of its forward, in the model's dtype, given the model.
    pipeline     makes a whole one for a task, bfloat16 and seeded; None where all pipelines of the family are `hosts`.
    size         (height, width) of a run.
    frames       of a run, None for an image.
    more         keys of a config that has linears which the plain one has not.
    others       class name -> makes that one, where a task has a second class.
    native       class name -> one that is run through diffusers: of the `hosts`, or of the `pipelines` with what no request
                 gives them. docs/supported-models.md says of these hosts that they are run, and of others that they are not.
    parts        components that it is given, for which a directory has no files.
    """

    transformer: Callable[..., Any]
    inputs: Callable[[Any], dict[str, Any]]
    pipeline: Callable[[str], DiffusionPipeline] | None = None
    size: tuple[int, int] = (16, 24)
    frames: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Callable[[], DiffusionPipeline]] = field(default_factory=dict)
    native: Mapping[str, Native] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)


def normal(model: Any, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def image(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    """Of four by four squares in random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def video(seed: int, frames: int, height: int = 16, width: int = 16) -> list[Image.Image]:
    """An image to each frame."""
    return [image(1000 * seed + frame, height, width) for frame in range(frames)]


def seeded(make: Callable[[], Any], seed: int = 7) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Of single letters, 24 tokens long."""
    letters = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    words = {piece: i for i, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=24)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Of words, cut as Llama 3 cuts them, with its marks and an image's; its vocabulary is smaller than 64."""
    marks = ("<pad>", "<unk>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
    words = ("\n\n", "system", "user", "assistant", "a", "red", "seven", "moves", "left")
    vocabulary = {word: i for i, word in enumerate((*marks, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\w+|[^\w\s]+"), "removed", invert=True)
    begin = ("<|begin_of_text|>", vocabulary["<|begin_of_text|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token=begin[0], eos_token="<|eot_id|>",
        extra_special_tokens=list(marks[3:]),
    )  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    """Of single letters; its vocabulary is smaller than 64."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*marks, *((letter, -3.0) for letter in _LETTERS)], extra_ids=0)


def qwen_tokenizer(*more: str) -> Qwen2Tokenizer:
    """Of single bytes, the marks of a chat and those that are given; its vocabulary is smaller than 272."""
    marks = (*_QWEN_MARKS, *more)
    pieces = {piece: i for i, piece in enumerate([*bytes_to_unicode().values(), *marks])}
    # By name, as processors look an image's up.
    named = {f"{mark[2:-2].replace('_pad', '')}_token": mark for mark in marks[1:]}
    tokenizer = Qwen2Tokenizer(vocab=pieces, merges=[], extra_special_tokens=named)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    return tokenizer


def hunyuan_video_vae() -> AutoencoderKLHunyuanVideo:
    """Of stride 4 in time and space."""
    config: dict[str, Any] = {
        "latent_channels": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
        "spatial_compression_ratio": 4, "mid_block_add_attention": False,
    }  # fmt: skip
    return seeded(lambda: AutoencoderKLHunyuanVideo(**config)).bfloat16()


def t5(vocabulary: int, width: int = TEXT) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return seeded(lambda: T5EncoderModel(config)).bfloat16()


def gemma_tokenizer() -> GemmaTokenizer:
    """Of single letters; what is none of them is unknown."""
    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁")
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate((*marks, *_LETTERS))}, merges=[])


def gemma2() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=32, hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
    )  # fmt: skip
    return seeded(lambda: Gemma2Model(config)).bfloat16()


def qwen3(model: Any, layers: int) -> Any:
    """A Qwen3Model or Qwen3ForCausalLM."""
    config = Qwen3Config(
        vocab_size=272, hidden_size=TEXT, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    return seeded(lambda: model(config)).bfloat16()


def qwen2_5_vl(vocabulary: int = 272, **marks: int) -> Qwen2_5_VLForConditionalGeneration:
    """For a tokenizer of so many pieces; `VISION_IDS` where it sees images."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": TEXT, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": TEXT}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)).bfloat16()


def qwen3_vl(model: Any, layers: int) -> Any:
    """A Qwen3VLModel or Qwen3VLForConditionalGeneration."""
    text = {
        "vocab_size": 272, "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": TEXT, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": TEXT,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **VISION_IDS)
    return seeded(lambda: model(config)).bfloat16()


def qwen_processor() -> LlavaProcessor:
    """The same tokenizer in a processor: Llava's, because Qwen's own needs torchvision and is asked no more than this."""
    tokenizer = qwen_tokenizer()
    return LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14, chat_template=tokenizer.chat_template)


def qwen_vision_processor(patch: int) -> PaddleOCRVLProcessor:
    """Of images, too, in tokens of 2 x 2 patches of so many pixels a side: PaddleOCR's, which counts tokens as Qwen's own."""
    tokenizer = qwen_tokenizer(*_VISION_MARKS)
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
    return PaddleOCRVLProcessor(
        Qwen2VLImageProcessor(patch_size=patch, size=size), tokenizer, chat_template=tokenizer.chat_template
    )


def image_vae(stages: int = 2, **overrides: Any) -> AutoencoderKL:
    """Of stride 2, or of twice as much for each further stage, with 4 channels."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages,
        "block_out_channels": (4,) * stages, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
        "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "scaling_factor": 0.36,
    }  # fmt: skip
    return seeded(lambda: AutoencoderKL(**(config | overrides))).bfloat16()


def clip(positions: int) -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return seeded(lambda: CLIPTextModel(config)).bfloat16()


# Frequent pairs of English, so that a prompt is not cut off behind a pipeline's long instruction.
_QWEN_PAIRS = ("Ġ t", "h e", "Ġt he", "i n", "o r", "e r", "a n", "o n", "i s", "e n", "r e", "c t", "i t", "e s", "in g",
               "Ġ a", "Ġ s", "Ġ o", "Ġ d", "Ġ p", "Ġ c", "Ġ m", "Ġ v", "Ġ w", "c r", "i b", "r o", "a t", "Ġ i")  # fmt: skip


def qwen_pair_tokenizer() -> Qwen2Tokenizer:
    """Of bytes and a few pairs."""
    pairs = [tuple(pair.split()) for pair in _QWEN_PAIRS]
    pieces = [*bytes_to_unicode().values(), *map("".join, pairs), *_QWEN_MARKS]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=pairs, extra_special_tokens=list(_QWEN_MARKS[1:]))


def qwen_image_vae() -> AutoencoderKLQwenImage:
    """Of stride 2, with 4 channels."""
    config: dict[str, Any] = {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False],
        "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
    }  # fmt: skip
    return seeded(lambda: AutoencoderKLQwenImage(**config)).bfloat16()
