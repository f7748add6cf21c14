"""Teach mxdit a model that it does not know, quantize it, save it, and load it again.

    python examples/add_a_family.py [OUT]

The model is defined here. A family of diffusers' own would have its file in src/mxdit/models/families/;
docs/adapting-a-model.md says what to look up for it.
"""

import sys
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

import mxdit
from mxdit.models import ModelSpec, register_family
from mxdit.models.spec import MODULATION

OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("family")


class Block(nn.Module):
    """Attention and a feed-forward layer, modulated by the timestep."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, gate = self.modulation(time).chunk(2, dim=-1)
        h = x * (1 + scale)
        x = x + self.to_out(nn.functional.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + gate * self.ffn(x)


class ClockTransformer(ModelMixin, ConfigMixin):
    """Tokens (B, L, channels) and a timestep (B,) to tokens (B, L, channels)."""

    @register_to_config
    def __init__(self, channels: int = 16, dim: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(channels, dim), nn.Linear(1, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(num_layers))
        self.head = nn.Linear(dim, channels)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x, time = self.embed(x), self.time(timestep[:, None, None])
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


# What mxdit has to know: where the blocks are, which linears read the same tensor, and which make modulations.
register_family(
    ModelSpec(
        transformer="ClockTransformer",
        blocks=("blocks",),
        groups=(("to_q", "to_k", "to_v"),),
        keep={"modulation": MODULATION},
    )
)

torch.manual_seed(0)
model = ClockTransformer().eval()
x, timestep = torch.randn(1, 6, 16), torch.tensor([0.5])
with torch.no_grad():
    expected = model(x, timestep)
    print(mxdit.quantize_(model, "mxfp4"))
    got = model(x, timestep)
    print(f"relative error of the output: {((got - expected).norm() / expected.norm()).item():.3f}")

    model.save_pretrained(OUT)
    reloaded = ClockTransformer.from_pretrained(OUT)
    assert torch.equal(reloaded(x, timestep), got), "a reload computes the same"
print(f"{OUT}/: saved, loaded again, and the same")
