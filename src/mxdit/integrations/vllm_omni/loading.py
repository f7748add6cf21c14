"""What a rank of the engine holds of a quantized linear, and how a checkpoint's tensors come to it.

A layer of the engine has the parameters of our record, cut by `mxdit.shard`, from the beginning; no float weight is ever
allocated for it. Each parameter has a loader of ours, which the engine calls with a whole tensor of the checkpoint: that is
brought into canonical form, or quantized, and the rank's part of it is copied. So a rank's memory peaks at its shards and
one tensor, and quantizing while loading gives the bytes of a checkpoint that was quantized before, at every degree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.utils import set_weight_attrs

from mxdit.checkpoint.canonical import stored_forms
from mxdit.errors import CheckpointError, ModelError
from mxdit.numerics.formats import FLOATS, PARTS, TensorInfo, block_format
from mxdit.shards import Shard
from mxdit.weights import quantize_weight

Key = str | int | None
"""What the engine calls one of the linears that a layer fuses: "q", "k", "v"; a number; None where it is but one."""


@dataclass(frozen=True)
class Piece:
    """One linear of a layer: the rank's shard of it, and the row of the layer's tensors where that begins."""

    shard: Shard
    first: int


class Loader:
    """The parameters of one layer and their loaders.

    Args:
        layer: the engine's.
        prefix: its name, for errors.
        method, rule: as `mxdit.quantize_weight` takes them.
        serialized: whether the checkpoint is quantized already.
        dtype: of the model's floats: a weight that is quantized while it loads is cast to it first.
        inputs: input features that a rank holds.
        outputs: output features that a rank holds, of each linear that the layer fuses.

    Raises:
        FormatError: the linear cannot be split so (`mxdit.Shard`).
        ModelError: the layer gives several ranks the same rows.
    """

    def __init__(
        self,
        layer: LinearBase,
        prefix: str,
        method: str,
        rule: str | None,
        *,
        serialized: bool,
        require_smooth: bool,
        dtype: torch.dtype,
        inputs: int,
        outputs: list[int],
    ) -> None:
        self._layer, self._prefix, self._method, self._rule = layer, prefix, method, rule
        self._serialized, self._require_smooth, self._dtype = serialized, require_smooth, dtype
        self._pieces = dict(_pieces(layer, prefix, method, inputs, outputs))
        self._loaded: dict[str, set[Key]] = {name: set() for name in PARTS}
        row = block_format(method)
        for name, info in self._record(smooth=serialized and row.smooths).items():
            optional = not serialized or (name == "mul_scale" and not require_smooth)
            fill = torch.ones if name == "mul_scale" else torch.empty
            parameter = nn.Parameter(fill(info.shape, dtype=info.dtype), requires_grad=False)
            attributes: dict[str, Any] = {
                "weight_loader": partial(self._load, name),
                # With an output axis, the engine counts a fused parameter as loaded once each of its linears was.
                "output_dim": None if name == "mul_scale" else 0,
                "is_checkpoint_optional" if optional and name != "weight" else "is_checkpoint_required": True,
            }
            set_weight_attrs(parameter, attributes)
            layer.register_parameter(name, parameter)

    @property
    def phase(self) -> int:
        """Zeros that go in front of a rank's channels (`mxdit.Shard`)."""
        return next(iter(self._pieces.values())).shard.phase

    def finish(self) -> None:
        """Drop a `mul_scale` that no file gave. Raises CheckpointError where a tensor is missing, or half of it."""
        needed = [*self._record(smooth=False)] if self._serialized else ["weight"]
        for name in needed:
            absent = [str(key) for key in self._pieces if key not in self._loaded[name]]
            if absent:
                raise CheckpointError(
                    "a quantized linear is not whole",
                    where=f"{self._prefix}.{name}",
                    got="nothing" if len(absent) == len(self._pieces) else f"nothing for {', '.join(absent)}",
                    hint="Run mxdit inspect on the checkpoint.",
                )
        smooth = self._loaded["mul_scale"]
        if not smooth and self._require_smooth:
            raise CheckpointError(
                "a layer has no mul_scale, and the config requires one",
                where=f"{self._prefix}.mul_scale",
                hint="Calibrate the checkpoint, or leave require_smooth_scale out.",
            )
        if smooth and len(smooth) < len(self._pieces):
            raise CheckpointError(
                "layers that share their input are smoothed differently",
                where=f"{self._prefix}.mul_scale",
                got=f"one for {', '.join(map(str, sorted(map(str, smooth))))}",
                expected=f"one for each of {', '.join(map(str, self._pieces))}",
            )
        if not smooth:
            self._layer.register_parameter("mul_scale", None)

    def _parameter(self, name: str) -> Tensor:
        return self._layer.get_parameter(name)

    def _record(self, *, smooth: bool) -> dict[str, TensorInfo]:
        """The layer's tensors on this rank: those of its linears, one below the other."""
        shards = [piece.shard for piece in self._pieces.values()]
        rows = sum(shard.out_features for shard in shards)
        return shards[0].format.tensors(rows, shards[0].in_features, smooth=smooth, where=self._prefix)

    def _load(self, name: str, parameter: nn.Parameter, loaded: Tensor, key: Key = None) -> None:
        """What the engine calls with a tensor of the checkpoint: whole, of one of the layer's linears or of all of them."""
        if key is None and len(self._pieces) > 1:
            if name == "mul_scale":
                for one in self._pieces:
                    self._load(name, parameter, loaded, one)
                return
            sizes = [piece.shard.n for piece in self._pieces.values()]
            if loaded.shape[0] != sum(sizes):
                raise self._unfit(name, loaded, f"{sum(sizes)} rows")
            for one, part in zip(self._pieces, loaded.split(sizes), strict=True):
                self._load(name, parameter, part, one)
            return
        piece = self._pieces[key]
        parts = self._stored(name, loaded, piece) if self._serialized else self._quantized(name, loaded, piece)
        for part, tensor in parts.items():
            self._take(part, tensor, piece, key)

    def _take(self, name: str, part: Tensor, piece: Piece, key: Key) -> None:
        held = self._parameter(name).data
        if name == "mul_scale":
            if self._loaded[name] and not torch.equal(held, part.to(held.device)):
                raise CheckpointError(
                    "layers that share their input are smoothed differently",
                    where=f"{self._prefix}.mul_scale",
                    got=f"another for {key} than for {', '.join(map(str, self._loaded[name]))}",
                    expected="equal mul_scale in all of them",
                )
            held.copy_(part)
        else:
            held[piece.first : piece.first + part.shape[0]].copy_(part)
        self._loaded[name].add(key)

    def _stored(self, name: str, loaded: Tensor, piece: Piece) -> Mapping[str, Tensor]:
        shard = piece.shard
        whole = shard.format.tensors(shard.n, shard.k, smooth=name == "mul_scale", where=self._prefix)[name]
        forms = stored_forms(shard.format, name, whole)
        info = TensorInfo.of(loaded)
        if info not in forms:
            raise self._unfit(name, loaded, " or ".join(map(str, forms)))
        loaded = loaded.cpu()  # where checks look at it; some of the engine's readers give it on the device
        convert, where = forms[info], f"{self._prefix}.{name}"
        if shard.parallel == "column" and name != "mul_scale":  # a row is converted by itself
            return {name: convert(loaded[shard.start : shard.stop], where)}
        return {name: shard.part(name, convert(loaded, where))}

    def _quantized(self, name: str, loaded: Tensor, piece: Piece) -> Mapping[str, Tensor]:
        shard = piece.shard
        if name != "weight" or loaded.dtype not in FLOATS:
            raise CheckpointError(
                "the checkpoint is quantized already, and its config does not say so",
                where=f"{self._prefix}.{name}",
                got=TensorInfo.of(loaded),
                expected="float weights",
                hint="Restore the quantization_config of its config.json.",
            )
        if tuple(loaded.shape) != (shard.n, shard.k):
            raise self._unfit(name, loaded, (shard.n, shard.k))
        by_rows = shard.parallel == "column"
        if by_rows:  # a row is quantized by itself; a group of 512 may be two ranks'
            loaded = loaded[shard.start : shard.stop]
        weight = loaded.to(self._parameter("weight").device, self._dtype)
        parts = quantize_weight(weight, self._method, rule=self._rule, where=self._prefix)
        return parts if by_rows else {part: shard.part(part, tensor) for part, tensor in parts.items()}

    def _unfit(self, name: str, loaded: Tensor, expected: object) -> CheckpointError:
        return CheckpointError(
            f"not a tensor of this {self._method} layer",
            where=f"{self._prefix}.{name}",
            got=TensorInfo.of(loaded),
            expected=expected,
            hint="Run mxdit inspect on the checkpoint.",
        )


def _pieces(layer: nn.Module, prefix: str, method: str, inputs: int, outputs: list[int]) -> Iterator[tuple[Key, Piece]]:
    """The linears that a layer fuses, by what the engine calls them."""
    sizes: Any = layer  # its attributes are those of any nn.Module to a type checker
    if isinstance(layer, QKVParallelLinear) and layer.num_kv_head_replicas > 1:
        raise ModelError(
            "several ranks would hold the same heads of keys and values",
            where=prefix,
            got=f"tensor parallelism of {sizes.tp_size}, {layer.total_num_kv_heads} heads",
            hint="Use a smaller --tensor-parallel-size.",
        )
    keys: list[Key] = [None]
    if isinstance(layer, QKVParallelLinear):
        keys = ["q", "k", "v"]
    elif isinstance(layer, MergedColumnParallelLinear):
        keys = list(range(len(outputs)))
    k, n = int(sizes.input_size), int(sizes.output_size)  # of all ranks
    parallel, degree = ("row", k // inputs) if inputs < k else ("column", n // sum(outputs))
    first = 0
    for key, rows in zip(keys, outputs, strict=True):
        whole = rows * degree if parallel == "column" else rows
        rank = int(sizes.tp_rank) if degree > 1 else 0
        yield key, Piece(Shard(method, whole, k, parallel, rank, degree, prefix), first)
        first += rows
