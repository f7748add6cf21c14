"""Which matrix products are measured, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mxdit.bench.shapes import SEED, SMALL_M, Wan


@dataclass(frozen=True)
class Product:
    """One matrix product: (M, K) activations times an (N, K) weight.

    Attributes:
        name: the linears that it is, and of what.
        m, k, n: the sizes.
        full: M before it was scaled down.
    """

    name: str
    m: int
    k: int
    n: int
    full: int

    def __str__(self) -> str:
        return f"M={self.m} K={self.k} N={self.n}"

    @property
    def operations(self) -> int:
        """2MNK: a multiplication and an addition for each."""
        return 2 * self.m * self.n * self.k


def products(models: Sequence[Wan], clips: Sequence[str], scale: Fraction) -> list[Product]:
    """Every product of these models' blocks at these clips, as diffusers holds the linears and with q, k, v fused; the seed
    benchmark's; and small M. Only video tokens are scaled, and no product is listed twice.

    Args:
        clips: of "480p" and "720p".
        scale: what M, where it counts video tokens, is multiplied by.
    """
    found: dict[tuple[int, int, int], Product] = {}

    def add(name: str, m: int, k: int, n: int, scaled: bool) -> None:
        rows = max(1, round(m * scale)) if scaled else m
        found.setdefault((rows, k, n), Product(name, rows, k, n, m))

    for wan in models:
        for clip in clips:
            tokens = wan.tokens(clip)
            for m, layer in (*wan.gemms(tokens), (tokens, wan.qkv)):
                add(f"{wan.name} {clip}: {layer.names}", m, layer.k, layer.n, not layer.on_text)
    add("seed: attn1.to_qkv", *SEED, True)
    for wan in models:
        for m in SMALL_M:
            add(f"{wan.name} small M", m, wan.dim, wan.dim, False)
    return list(found.values())
