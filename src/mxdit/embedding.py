"""MXEmbedding: the layer that takes the place of ``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxdit.errors import FormatError
from mxdit.numerics.formats import FLOATS
from mxdit.packed import PackedModule
from mxdit.weights import quantize_weight


class MXEmbedding(PackedModule):
    """A table of vectors in a microscaling format: a lookup takes packed rows out of it and decodes those, never the table.

    What it returns has the bits of the whole table decoded and indexed. The table is frozen, and lies in buffers as the weight
    of `mxdit.MXLinear` does, canonical on every device; names that share one module, as the tied embeddings of a T5 do, share
    its memory, and `state_dict()` lists it under each.

    Args:
        num_embeddings: V, the rows.
        embedding_dim: K, even for the four-bit formats.
        method: the format: ``mxfp4``, ``mxfp4_dualscale`` or ``mxfp8``.
        rule: the scale rule of the table; None means the format's default.
        padding_idx: the row of padding. It is looked up like any other; in a float embedding it only has no gradient.
        dtype: what a lookup returns: bf16, fp16 or fp32, None for torch's default. A cast of the module changes it.

    Buffers are the format's record of a (V, K) weight (`BlockFormat.tensors`), uninitialized until `load` is given them.

    Raises:
        FormatError: for a method, rule, shape, dtype or row of padding that does not exist.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        method: str,
        rule: str | None = None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "MXEmbedding"
        self._hold(num_embeddings, embedding_dim, method=method, rule=rule, device=device, where=where)
        self.dtype = dtype or torch.get_default_dtype()
        if self.dtype not in FLOATS:
            raise FormatError(
                "a lookup returns no such dtype", where=where, got=dtype, expected=" or ".join(map(str, FLOATS))
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise FormatError(
                "the row of padding is not in the table",
                where=where,
                got=f"padding_idx={padding_idx}, {num_embeddings} rows",
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings

    @classmethod
    def like(
        cls,
        embedding: nn.Embedding,
        *,
        method: str,
        rule: str | None = None,
        device: torch.device | str | None = None,
        where: str = "MXEmbedding",
    ) -> MXEmbedding:
        """The layer that takes the place of an embedding, without its numbers.

        Args:
            embedding: of float numbers.
            device: of the buffers; None means the embedding's.
            where: for errors, its path.

        Raises:
            FormatError: as the constructor, and for an embedding that does more than look rows up.
        """
        does = [
            f"{name}={getattr(embedding, name)}"
            for name in ("max_norm", "scale_grad_by_freq", "sparse")
            if getattr(embedding, name) not in (None, False)
        ]
        if type(embedding) is not nn.Embedding or does:
            raise FormatError(
                "an embedding that does more than look rows up",
                where=where,
                got=", ".join([type(embedding).__name__, *does]),
                expected="torch.nn.Embedding itself, without max_norm, scale_grad_by_freq and sparse",
                hint="Leave it in its float dtype.",
            )
        weight = embedding.weight
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            method=method,
            rule=rule,
            padding_idx=embedding.padding_idx,
            device=device or weight.device,
            dtype=weight.dtype,
        )

    @classmethod
    def from_weight(
        cls, weight: Tensor, *, method: str, rule: str | None = None, padding_idx: int | None = None
    ) -> MXEmbedding:
        """The layer that looks up rows of a table.

        Args:
            weight: (V, K), see `quantize_weight`; a lookup returns its dtype.

        Raises:
            FormatError: as the constructor and `quantize_weight`.
        """
        parts = quantize_weight(weight, method, rule=rule, where="MXEmbedding.from_weight")
        layer = cls(*weight.shape, method=method, rule=rule, padding_idx=padding_idx, device="meta", dtype=weight.dtype)
        layer.load(parts)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 or int32 to (..., K) in `dtype`. Ids outside of the table are torch's own error."""
        table = self.packed()
        codes, scale = F.embedding(ids, table.codes), F.embedding(ids, table.scale)
        outer = None if table.outer is None else F.embedding(ids, table.outer)
        return torch.ops.mxdit.dequantize(codes, scale, outer, self.method, self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, method={self.method}, rule={self.rule}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast changes what lookups return, and never the table."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self
