"""What a rank of the engine holds of a quantized linear, and how a checkpoint's tensors come to it.

A layer of the engine has the parameters of our record, cut by `mxdit.shard`, from the beginning; no float weight is ever
allocated for it. Each parameter has a loader of ours, which the engine calls with a whole tensor of the checkpoint: that is
brought into canonical form, or quantized, and the rank's part of it is copied. So a rank's memory peaks at its shards and
one tensor, and quantizing while loading gives the bytes of a checkpoint that was quantized before, at every degree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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

BLOCK = 1 << 20
"""Elements that are converted or quantized at once: what that needs beside them is then small."""
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
            parameter = nn.Parameter(torch.empty(info.shape, dtype=info.dtype), requires_grad=False)
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
        shard = piece.shard
        self._check(name, loaded, shard)
        self._loaded[name].add(key)
        if name == "mul_scale":
            self._take_factors(shard.part(name, self._converted(name, loaded, shard)), key)
            return
        rows = loaded[shard.start : shard.stop] if shard.parallel == "column" else loaded
        step = max(1, BLOCK // shard.k)
        for first in range(0, rows.shape[0], step):  # a row is converted, or quantized, by itself
            block = rows[first : first + step]
            part = replace(shard, n=block.shape[0], **({"rank": 0, "degree": 1} if shard.parallel == "column" else {}))
            for leaf, tensor in self._parts(name, block, part).items():
                at = piece.first + first
                self._layer.get_parameter(leaf).data[at : at + block.shape[0]].copy_(part.part(leaf, tensor))

    def _check(self, name: str, loaded: Tensor, shard: Shard) -> None:
        """Raise CheckpointError unless this is the whole tensor of one linear, in a form that a layout stores it in."""
        info = TensorInfo.of(loaded)
        if self._serialized:
            whole = shard.format.tensors(shard.n, shard.k, smooth=name == "mul_scale", where=self._prefix)[name]
            forms = stored_forms(shard.format, name, whole)
            if info not in forms:
                raise self._unfit(name, loaded, " or ".join(map(str, forms)))
        elif name != "weight" or loaded.dtype not in FLOATS:
            raise CheckpointError(
                "the checkpoint is quantized already, and its config does not say so",
                where=f"{self._prefix}.{name}",
                got=info,
                expected="float weights",
                hint="Restore the quantization_config of its config.json.",
            )
        elif info.shape != (shard.n, shard.k):
            raise self._unfit(name, loaded, (shard.n, shard.k))

    def _parts(self, name: str, block: Tensor, part: Shard) -> Mapping[str, Tensor]:
        """Rows of a tensor of the checkpoint in canonical form: themselves, or what they are quantized to."""
        if self._serialized:
            return {name: self._converted(name, block, part)}
        weight = block.to(self._layer.get_parameter("weight").device, self._dtype)
        return quantize_weight(weight, self._method, rule=self._rule, where=self._prefix)

    def _converted(self, name: str, stored: Tensor, part: Shard) -> Tensor:
        whole = part.format.tensors(part.n, part.k, smooth=name == "mul_scale", where=self._prefix)[name]
        convert = stored_forms(part.format, name, whole)[TensorInfo.of(stored)]
        # On the CPU, where checks look at it; some of the engine's readers give it on the device.
        return convert(stored.cpu(), f"{self._prefix}.{name}")

    def _take_factors(self, factors: Tensor, key: Key) -> None:
        held = self._layer.get_parameter("mul_scale").data
        if len(self._loaded["mul_scale"]) > 1 and not torch.equal(held, factors.to(held.device)):
            raise CheckpointError(
                "layers that share their input are smoothed differently",
                where=f"{self._prefix}.mul_scale",
                got=f"another for {key} than for {', '.join(str(one) for one in self._loaded['mul_scale'] if one != key)}",
                expected="equal mul_scale in all of them",
            )
        held.copy_(factors)

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
