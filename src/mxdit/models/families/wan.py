"""Wan 2.1 and 2.2 (T2V, I2V, TI2V): one transformer class, two experts in the A14B cascades."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published, Shapes


def _original_config(original: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """diffusers' config of an original WanModel; what its config.json leaves to code defaults is read off the tensors."""
    width = original["dim"]
    image = shapes.get("img_emb.proj.0.weight")  # the CLIP branch, in Wan2.1 I2V only
    positions = shapes.get("img_emb.emb_pos")
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(shapes["patch_embedding.weight"][2:]),
        "num_attention_heads": original["num_heads"],
        "attention_head_dim": width // original["num_heads"],
        "in_channels": original["in_dim"],
        "out_channels": original["out_dim"],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": original["freq_dim"],
        "ffn_dim": original["ffn_dim"],
        "num_layers": original["num_layers"],
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.self_attn.norm_q.weight" in shapes else None,
        "eps": original["eps"],
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": width if image else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


# dim, ffn_dim and num_layers of what was published -> num_heads, which no tensor's shape tells; eps is 1e-6 in all of them.
# Source: the releases' config.json of Wan2.1 1.3B and 14B, and Wan2.2 5B and A14B (docs/wan22.md).
_PUBLISHED = {(1536, 8960, 30): 12, (3072, 14336, 30): 24, (5120, 13824, 40): 40}


def _original_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The config.json of the release that a model of these shapes is of, None for sizes that were not published."""
    patch = shapes["patch_embedding.weight"]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    size = (patch[0], shapes["blocks.0.ffn.0.weight"][0], len(blocks))
    if size not in _PUBLISHED:
        return None
    return {
        "dim": size[0],
        "ffn_dim": size[1],
        "num_layers": size[2],
        "num_heads": _PUBLISHED[size],
        "eps": 1e-6,
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "in_dim": patch[1],
        "out_dim": shapes["head.head.weight"][0] // prod(patch[2:]),
    }


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """A patch is 1 x p x p latents, and the VAE's stride depends on its version (2.1: 4 x 8 x 8, 2.2: 4 x 16 x 16)."""
    stride = int(vae.get("scale_factor_spatial") or 8)
    return Geometry(
        multiple=stride * int(config["patch_size"][1]),
        temporal=int(vae.get("scale_factor_temporal") or 4),
        positions=config["rope_max_seq_len"],
    )


def _shapes(
    config: Mapping[str, Any],
    vae: Mapping[str, Any],
    settings: Mapping[str, Any],
    height: int,
    width: int,
    frames: int,
) -> Shapes:
    """TI2V has a timestep for each token; Wan2.1's I2V has CLIP's 257 tokens of the image."""
    stride, temporal = int(vae.get("scale_factor_spatial") or 8), int(vae.get("scale_factor_temporal") or 4)
    sides = ((frames - 1) // temporal + 1, height // stride, width // stride)
    tokens = sides[0] * (sides[1] // config["patch_size"][1]) * (sides[2] // config["patch_size"][2])
    inputs = {
        "hidden_states": (1, int(config.get("in_channels", 16)), *sides),
        "timestep": (1, tokens) if settings.get("expand_timesteps") else (1,),
        "encoder_hidden_states": (1, 512, int(config.get("text_dim", 4096))),
    }
    if config.get("image_dim"):
        inputs["encoder_hidden_states_image"] = (1, 257, int(config["image_dim"]))
    return Shapes(inputs, (1, int(vae.get("z_dim", 16)), *sides))


_CALL = {**VIDEO_CALL, "guidance_2": "guidance_scale_2", "boundary_ratio": "config.boundary_ratio"}
# Share of the noise schedule above which the first of two transformers runs: where it is not set there is no second.
_ONLY_WITH = {"guidance_2": "boundary_ratio", "boundary_ratio": "boundary_ratio"}
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
_FLOAT32 = (
    "vae",
)  # it decodes once and is small, and its BF16 error shows in flat areas: diffusers' examples load it so

# Source of the figures: the generation configs of the Wan2.2 release (docs/wan22.md). The guidance pair there is (low, high);
# here, as in diffusers, `guidance` belongs to the high-noise expert and `guidance_2` to the low-noise one.
_A14B = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128}  # Wan2.1-14B is one of one expert
_5B = {"num_layers": 30, "num_attention_heads": 24, "attention_head_dim": 128}
_MINI = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 64}  # the model that comes with mxdit
_PRESETS = (
    Preset("Wan2.2-T2V-A14B", "t2v", (480, 832), 81, 16, 40, 4.0, 3.0, 12.0, _A14B, 2),
    Preset("Wan2.2-I2V-A14B", "i2v", (480, 832), 81, 16, 40, 3.5, 3.5, 5.0, _A14B, 2),
    Preset("Wan2.2-TI2V-5B", "t2v", (704, 1280), 121, 24, 50, 5.0, None, 5.0, _5B, 1),
    Preset("Wan2.2-TI2V-5B", "i2v", (704, 1280), 121, 24, 50, 5.0, None, 5.0, _5B, 1),
    Preset(
        "mini-T2V", "t2v", (64, 64), 17, 8, 20, 3.0, 3.0, 3.0, _MINI, 2,
        prompt="a red seven moving left on a blue background",
    ),
    Preset(
        "mini-I2V", "i2v", (64, 64), 17, 8, 20, 3.0, 3.0, 3.0, _MINI, 2,
        prompt="a yellow five moving right on a green background",
    ),
    # Any other model of the family: the A14B's figures, with the scheduler as its directory has it.
    Preset("Wan", "t2v", (480, 832), 81, 16, 40, 4.0, 3.0),
    Preset("Wan", "i2v", (480, 832), 81, 16, 40, 3.5, 3.5),
)  # fmt: skip

# Source: docs/wan22.md; all else as diffusers' class has it.
_5B_SIZES = {**_5B, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_1B_SIZES = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_RELEASES = (
    Published("Wan-AI/Wan2.2-T2V-A14B-Diffusers", transformers=2),
    Published("Wan-AI/Wan2.2-I2V-A14B-Diffusers", {"in_channels": 36}, 2),
    Published("Wan-AI/Wan2.2-TI2V-5B-Diffusers", _5B_SIZES),
    Published("Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    Published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _1B_SIZES),
    Published(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
    ),
)


WAN = ModelSpec(
    title="Wan 2.1 and 2.2",
    transformer="WanTransformer3DModel",
    blocks=("blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.add_k_proj", "attn2.add_v_proj"),  # the image branch, in Wan2.1 I2V only
    ),
    components=("transformer", "transformer_2"),
    pipelines={
        "WanPipeline": PipelineSpec("t2v", _CALL, _ONLY_WITH, _EMBEDDINGS, float32=_FLOAT32),
        "WanImageToVideoPipeline": PipelineSpec(
            "i2v", {**_CALL, "image": "image"}, _ONLY_WITH, _EMBEDDINGS, float32=_FLOAT32
        ),
    },
    hosts=("WanVideoToVideoPipeline", "LucyEditPipeline"),  # they take a video
    shared="expand_timesteps",  # TI2V: its first latent frame may be given
    needed=("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "rope_max_seq_len"),
    geometry=_geometry,
    shapes=_shapes,
    presets=_PRESETS,
    published=_RELEASES,
    # Source: NVIDIA/Model-Optimizer, examples/diffusers/quantization/utils.py.
    recipes={
        "NVIDIA ModelOpt": "the first three and the last three of 40 blocks; here only where num_bf16_fallback_layers or"
        " ignored_layers ask for it",
    },
    original_mark="patch_embedding",
    original={
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
        "blocks.#.self_attn": "blocks.#.attn1",
        "blocks.#.self_attn.q": "blocks.#.attn1.to_q",
        "blocks.#.self_attn.k": "blocks.#.attn1.to_k",
        "blocks.#.self_attn.v": "blocks.#.attn1.to_v",
        "blocks.#.self_attn.o": "blocks.#.attn1.to_out.0",
        "blocks.#.cross_attn": "blocks.#.attn2",
        "blocks.#.cross_attn.q": "blocks.#.attn2.to_q",
        "blocks.#.cross_attn.k": "blocks.#.attn2.to_k",
        "blocks.#.cross_attn.v": "blocks.#.attn2.to_v",
        "blocks.#.cross_attn.o": "blocks.#.attn2.to_out.0",
        "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
        "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
        "blocks.#.cross_attn.norm_k_img": "blocks.#.attn2.norm_added_k",
        "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
        "blocks.#.ffn.2": "blocks.#.ffn.net.2",
        "blocks.#.norm3": "blocks.#.norm2",  # the original's norm1 and norm2 have no parameters
        "blocks.#.modulation": "blocks.#.scale_shift_table",
    },
    original_components={"high_noise_model": "transformer", "low_noise_model": "transformer_2"},
    original_config=_original_config,
    original_sizes=_original_sizes,
    gguf="wan",
    runtimes={
        "vllm-omni": {  # fuses q, k and v of self-attention
            "attn1.to_q": "attn1.to_qkv",
            "attn1.to_k": "attn1.to_qkv",
            "attn1.to_v": "attn1.to_qkv",
            "attn1.to_out.0": "attn1.to_out",
            "attn2.to_out.0": "attn2.to_out",
            "ffn.net.0.proj": "ffn.net_0.proj",
            "ffn.net.2": "ffn.net_2",
        },
        "sglang": {
            "attn1.to_q": "to_q",
            "attn1.to_k": "to_k",
            "attn1.to_v": "to_v",
            "attn1.to_out.0": "to_out",
            "attn2.to_out.0": "attn2.to_out",
            "ffn.net.0.proj": "ffn.fc_in",
            "ffn.net.2": "ffn.fc_out",
            "proj_out": "proj_out",
        },
    },
)

SPECS = (WAN,)
