"""Tensor parallelism: what one of several ranks holds of a quantized linear, as slices of the whole one's tensors.

Ranks that split N hold rows. Ranks that split K hold columns, and keep the whole weight's grid of groups: where a rank's
first channel lies inside a group of 512, zeros in front fill the group, so that ops see a K axis that begins at one, and
codes and scales stay what they are. Source: docs/numerics.md section 5.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdit.errors import FormatError
from mxdit.numerics.formats import PARTS, BlockFormat, TensorInfo, block_format

PARALLEL = ("column", "row")
"""How a linear is split: by its output features N (column-parallel), or by its input features K (row-parallel)."""


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a linear of N = ``n`` outputs and K = ``k`` inputs; known before any tensor is.

    A row-parallel rank is given channels [start, stop) of x, puts ``phase`` zeros in front of them, and multiplies by a
    linear of ``in_features`` = phase + stop - start. The results of all ranks are summed. A bias is no part of this: by
    columns it is rows [start, stop), by rows it is whole, and added by rank 0 only.

    Args:
        method: ``mxfp4``, ``mxfp4_dualscale`` or ``mxfp8``.
        n: output features of the whole linear.
        k: input features of the whole linear.
        parallel: ``column`` (N is split) or ``row`` (K is split).
        rank: of this shard, from 0.
        degree: the number of ranks.
        where: the layer's name, for errors.

    Raises:
        FormatError: for names that do not exist, a shape that the format cannot hold, a rank that is not one of
            ``degree``, an N that ``degree`` does not divide, or a K that does not give every rank whole blocks of 32. The
            message lists the degrees that do.
    """

    method: str
    n: int
    k: int
    parallel: str
    rank: int
    degree: int
    where: str = field(default="shard", compare=False)

    def __post_init__(self) -> None:
        row = block_format(self.method, where=self.where)
        row.tensors(self.n, self.k, where=self.where)
        if self.parallel not in PARALLEL:
            raise FormatError(
                "a linear is not split so",
                where=self.where,
                got=f"parallel={self.parallel!r}",
                expected=" or ".join(map(repr, PARALLEL)),
            )
        if not 0 <= self.rank < self.degree:
            raise FormatError(
                "no such rank",
                where=self.where,
                got=f"rank {self.rank} of {self.degree}",
                expected=f"0 to {self.degree - 1}" if self.degree > 0 else "at least one rank",
            )
        name, size, unit = ("N", self.n, 1) if self.parallel == "column" else ("K", self.k, row.block)
        if self.degree > 1 and size % (unit * self.degree):
            able = [str(d) for d in range(1, size // unit + 1) if size % (unit * d) == 0] or ["1"]
            raise FormatError(
                f"{name} = {size} cannot be split over so many ranks",
                where=self.where,
                got=f"tensor parallelism of {self.degree}",
                expected=f"one of {', '.join(able)}" if len(able) > 1 else "1",
                hint=f"Every rank needs whole blocks of {unit} input features." if unit > 1 else None,
            )

    @property
    def format(self) -> BlockFormat:
        """The row of ``method``."""
        return block_format(self.method, where=self.where)

    @property
    def start(self) -> int:
        """The first output or input feature, by ``parallel``, that the rank holds."""
        return self.rank * self._width

    @property
    def stop(self) -> int:
        """Where the rank's features end."""
        return self.start + self._width

    @property
    def _width(self) -> int:
        return (self.n if self.parallel == "column" else self.k) // self.degree

    @property
    def phase(self) -> int:
        """Zeros in front of the rank's channels: how far into a group of 512 its first one lies. A multiple of 32."""
        outer = self.format.outer
        return self.start % outer if outer and self.parallel == "row" else 0

    @property
    def in_features(self) -> int:
        """K of the rank's linear, the zeros in front included."""
        return self.phase + self._width if self.parallel == "row" else self.k

    @property
    def out_features(self) -> int:
        """N of the rank's linear."""
        return self._width if self.parallel == "column" else self.n

    def record(self, *, smooth: bool = False) -> dict[str, TensorInfo]:
        """name -> shape and dtype of the rank's tensors, as `BlockFormat.tensors`; ``smooth``: with a `mul_scale`."""
        return self.format.tensors(self.out_features, self.in_features, smooth=smooth, where=self.where)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The rank's part of one tensor of the whole linear.

        Args:
            name: one of `PARTS`.
            whole: the tensor of that name, in canonical layout, on any device, meta included.

        Returns:
            The tensor that `record` names: a view of ``whole`` where nothing is put in front, else of its own. What is put
            there is zero codes, under the scale of the block behind them, and factors of 1. A group that two ranks share
            has its outer scale on both.

        Raises:
            FormatError: ``whole`` is not that tensor of the whole linear.
        """
        row = self.format
        expected = row.tensors(self.n, self.k, smooth=name == "mul_scale", where=self.where).get(name)
        if TensorInfo.of(whole) != expected:
            raise FormatError(
                f"not a tensor of the whole {self.method} linear",
                where=f"{self.where}, {name}",
                got=TensorInfo.of(whole),
                expected=expected or f"one of {', '.join(PARTS)}",
                hint="A shard is cut from the tensor of all ranks.",
            )
        if self.parallel == "column":
            return whole if name == "mul_scale" else whole[self.start : self.stop]
        step = {"weight": row.per_byte, "weight_scale": row.block, "weight_dual_scale": row.outer or 0}.get(name, 1)
        first, last = self.start // step, -(-self.stop // step)
        held = whole.narrow(0 if name == "mul_scale" else 1, first, last - first)
        front = self.phase // step  # none of an outer scale: a phase is less than a group
        if not front:
            return held
        if name == "weight_scale":  # a scale that makes the group no wider: integer kernels are faster over narrow ones
            return torch.cat((held[:, :1].expand(-1, front), held), 1)
        return F.pad(held, (front, 0), value=1 if name == "mul_scale" else 0)


def shard(
    parts: Mapping[str, Tensor], method: str, parallel: str, rank: int, degree: int, *, where: str = "shard"
) -> tuple[dict[str, Tensor], Shard]:
    """What a rank holds of a quantized linear: the tensors of a smaller one, and how x comes to it.

    Args:
        parts: the linear's tensors, as `mxdit.quantize_weight` returns them and files store them.
        method, parallel, rank, degree, where: as `Shard` takes them.

    Returns:
        (name -> tensor, contiguous; the `Shard`, whose ``phase`` zeros a caller puts in front of the rank's channels of x).
        Rows share their memory with ``parts``.

    Raises:
        FormatError: as `Shard`, and for tensors that are not those of one linear of this method.
    """
    row = block_format(method, where=where)
    codes = parts.get("weight")
    if codes is None or codes.dim() != 2:
        raise FormatError(
            "no codes of a linear to split",
            where=f"{where}, weight",
            got="none" if codes is None else TensorInfo.of(codes),
            expected="(N, K) codes, packed",
        )
    held = Shard(method, codes.shape[0], codes.shape[1] * row.per_byte, parallel, rank, degree, where)
    names = list(held.record(smooth="mul_scale" in parts))
    if set(names) != set(parts):
        raise FormatError(
            f"not the tensors of one {method} linear", where=where, got=", ".join(parts), expected=", ".join(names)
        )
    return {name: held.part(name, parts[name]).contiguous() for name in names}, held
