"""The shapes of Wan2.2, as data: what docs/wan22.md says of its blocks and products, once for every benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT_TOKENS = 512
SMALL_M = (1, 4, 16, 32, 512)  # where the weight's bytes count, not the products


@dataclass(frozen=True)
class Layer:
    """Linears of a block that have one shape, ``count`` of them: K input and N output features."""

    names: str
    count: int
    k: int
    n: int
    on_text: bool = False  # their rows are the text's tokens, not the video's


@dataclass(frozen=True)
class Wan:
    """A transformer, the clips it is run for as (frames, height, width), and what a pipeline holds beside it."""

    name: str
    dim: int
    ffn: int
    heads: int
    blocks: int
    stride: int  # of the VAE in height and width; 4 in time
    clips: Mapping[str, tuple[int, int, int]] = field(hash=False)
    experts: int = 1
    channels: int = 16  # of the latents, in and out
    vae: Mapping[str, Any] = field(default_factory=dict, hash=False)  # what differs from AutoencoderKLWan's defaults

    @property
    def config(self) -> dict[str, Any]:
        """What WanTransformer3DModel is made with."""
        return {
            "num_layers": self.blocks,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.dim // self.heads,
            "ffn_dim": self.ffn,
            "in_channels": self.channels,
            "out_channels": self.channels,
        }

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The ten linears of a block as diffusers holds them."""
        d, f = self.dim, self.ffn
        return (
            Layer("attn1.to_q, to_k, to_v, to_out.0, attn2.to_q, to_out.0", 6, d, d),
            Layer("attn2.to_k, to_v", 2, d, d, on_text=True),
            Layer("ffn.net.0.proj", 1, d, f),
            Layer("ffn.net.2", 1, f, d),
        )

    @property
    def qkv(self) -> Layer:
        """attn1's q, k and v in one, as serving engines fuse them."""
        return Layer("attn1.to_qkv", 1, self.dim, 3 * self.dim)

    def tokens(self, clip: str) -> int:
        """Tokens of a clip, M of most products; a patch is 1 x 2 x 2 latents."""
        frames, height, width = self.clips[clip]
        return ((frames - 1) // 4 + 1) * (height // self.stride // 2) * (width // self.stride // 2)

    def gemms(self, tokens: int) -> tuple[tuple[int, Layer], ...]:
        """(M, layer) for every shape of a block, text tokens where the layer reads those."""
        return tuple((TEXT_TOKENS if layer.on_text else tokens, layer) for layer in self.layers)


A14B = Wan(
    "Wan2.2-A14B", dim=5120, ffn=13824, heads=40, blocks=40, stride=8, experts=2,
    clips={"480p": (81, 480, 832), "720p": (81, 720, 1280), "480p, 2 s": (33, 480, 832)},
)  # fmt: skip
TI2V_5B = Wan(
    "Wan2.2-TI2V-5B", dim=3072, ffn=14336, heads=24, blocks=30, stride=16, channels=48,
    clips={"480p": (121, 480, 832), "720p": (121, 704, 1280)},
    vae={
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2,
        "is_residual": True, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
)  # fmt: skip
MINI = Wan("mini", dim=256, ffn=1536, heads=4, blocks=4, stride=8, experts=2, clips={"64 x 64": (17, 64, 64)})
PUBLISHED = {"A14B": A14B, "TI2V-5B": TI2V_5B}

SEED = (19800, A14B.qkv.k, A14B.qkv.n)  # (M, K, N) of the seed benchmark: the fused q, k, v
TEXT_ENCODER = {  # UMT5-XXL's encoder, which both have
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
