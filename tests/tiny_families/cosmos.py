"""Cosmos 1 to Predict2.5 at tiny size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import CosmosSafetyChecker
from numpy.typing import NDArray

from tiny_families.parts import (
    TEXT,
    Native,
    Tiny,
    normal,
    qwen2_5_vl,
    qwen_tokenizer,
    seeded,
    t5,
    t5_tokenizer,
    video,
)

LOOKED_AT = 48  # width of the image encoder's tokens


def cosmos(**overrides: Any) -> CosmosTransformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640.

    It has no padding mask, which is scaled by torchvision and is one channel of the patches alone.
    """
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "num_layers": 2,
        "text_embed_dim": TEXT,
        "adaln_lora_dim": 32,
        "max_size": (4, 8, 8),
        "concat_padding_mask": False,
    }
    return seeded(lambda: CosmosTransformer3DModel(**(config | overrides)))


def cosmos_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents, 6 tokens of text, and 3 of an image where the model looks at one."""
    text = normal(model, 2, 1, 6, TEXT)
    width = model.config.img_context_dim_in
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": (text, normal(model, 3, 1, 3, width)) if width else text,
        "fps": 16,
    }


class Checker(CosmosSafetyChecker):
    """A guardrail that refuses one word, and blackens a corner of what it has seen.

    Predict2.5 has videos checked by the class that it knows alone, which is no more than a name where `cosmos_guardrail` is not
    installed.
    """

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def check_text_safety(self, prompt: str) -> bool:
        self.seen.append(prompt)
        return "weapon" not in prompt

    def check_video_safety(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Frames (T, H, W, 3) as they are given out."""
        self.seen.append(frames.shape)
        frames = frames.copy()
        frames[:, :2, :2] = 0
        return frames

    def to(self, device: Any = None, dtype: Any = None) -> None:
        """It has no weights."""


def pipeline(task: str) -> DiffusionPipeline:
    """Of Cosmos 1 for videos, with its VAE of stride 8 in time and space, and of Predict2 for images."""
    if task == "t2i":
        return predict2(Cosmos2TextToImagePipeline, 4)
    vae: dict[str, Any] = {
        "latent_channels": 4, "encoder_block_out_channels": (4,) * 4, "decode_block_out_channels": (4,) * 4, "num_layers": 1,
        "attention_resolutions": (8,), "resolution": 32, "latents_mean": [0.1] * 4, "latents_std": [0.5] * 4,
    }  # fmt: skip
    made, channels = {"t2v": (CosmosTextToWorldPipeline, 4), "i2v": (CosmosVideoToWorldPipeline, 5)}[task]
    return made(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(64),
        vae=seeded(lambda: AutoencoderKLCosmos(**vae)).bfloat16(),
        transformer=cosmos(in_channels=channels).bfloat16(),
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        safety_checker=Checker(),
    )


def wan_vae() -> AutoencoderKLWan:
    """Of stride 8 in space and 4 in time, with 4 channels."""
    config: dict[str, Any] = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True],
        "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
    }  # fmt: skip
    return seeded(lambda: AutoencoderKLWan(**config)).bfloat16()


def predict2(made: Any, channels: int) -> DiffusionPipeline:
    return made(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(64),
        vae=wan_vae(),
        transformer=cosmos(in_channels=channels, extra_pos_embed_type=None).bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Checker(),
    )


def predict25() -> DiffusionPipeline:
    """Its text is what all three layers of the encoder give, side by side."""
    own = {
        "use_crossattn_projection": True, "crossattn_proj_in_channels": 3 * TEXT, "encoder_hidden_states_channels": TEXT,
        "extra_pos_embed_type": None,
    }  # fmt: skip
    return Cosmos2_5_PredictBasePipeline(
        tokenizer=qwen_tokenizer(),
        text_encoder=qwen2_5_vl(),
        vae=wan_vae(),
        transformer=cosmos(in_channels=5, **own).bfloat16(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        safety_checker=Checker(),
    )


def follow() -> dict[str, Any]:
    """A video of 5 frames to go on from, to 9."""
    return {
        "video": video(1, 5, 32, 48), "prompt": "a red seven", "height": 32, "width": 48, "num_frames": 9,
        "num_inference_steps": 2, "output_type": "np",
    }  # fmt: skip


OTHERS = {
    "Cosmos2VideoToWorldPipeline": lambda: predict2(Cosmos2VideoToWorldPipeline, 5),
    "Cosmos2_5_PredictBasePipeline": predict25,
}
TRANSFER25 = {"img_context_dim_in": LOOKED_AT, "img_context_dim_out": 160, "extra_pos_embed_type": None}
TINY = {
    "CosmosTransformer3DModel": Tiny(
        cosmos, cosmos_inputs, pipeline, (32, 48), 9, TRANSFER25, OTHERS, parts={"safety_checker": Checker()},
        native={name: Native(made, follow) for name, made in OTHERS.items()},
    )
}  # fmt: skip
