"""PackedModule: what the layers that hold a packed weight have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from mxdit.errors import FormatError
from mxdit.numerics.codec import Packed
from mxdit.numerics.formats import PARTS, TensorInfo, block_format


class PackedModule(nn.Module):
    """A layer whose weight lies in buffers, bytes as uint8: a host that casts or reads floating parameters leaves it alone.

    Attributes:
        method: the weight's format.
        rule: its scale rule.
        record: name of a buffer -> its shape and dtype (`BlockFormat.tensors`).
    """

    weight_scale: Tensor
    weight_dual_scale: Tensor | None
    mul_scale: Tensor | None

    def _hold(
        self,
        n: int,
        k: int,
        *,
        method: str,
        rule: str | None,
        device: torch.device | str | None,
        smooth: bool = False,
        where: str,
    ) -> None:
        """Have uninitialized buffers for an (n, k) weight. Raises FormatError for a method, rule or shape that does not exist."""
        row = block_format(method, where=where)
        self.record = row.tensors(n, k, smooth=smooth, where=where)
        if rule is not None and rule not in row.rules:
            raise FormatError(
                f"{method} has no such scale rule", where=where, got=repr(rule), expected=" or ".join(row.rules)
            )
        self.method, self.rule = method, rule or row.default_rule
        for name in PARTS:
            info = self.record.get(name)
            empty = None if info is None else torch.empty(info.shape, dtype=info.dtype, device=device)
            self.register_buffer(name, empty)

    def load(self, parts: Mapping[str, Tensor]) -> None:
        """Take tensors of the record as they are, without a copy; those that are not given stay.

        Args:
            parts: name -> tensor in canonical layout, on any device.

        Raises:
            FormatError: a name, shape or dtype that is not the record's; nothing is taken then.
        """
        for name, part in parts.items():
            self._check(name, part, name)
        for name, part in parts.items():
            setattr(self, name, part)

    def _canonical(self) -> Tensor:
        """The codes in canonical layout."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    def packed(self) -> Packed:
        """The weight in canonical layout, (N, K) to `mxdit.decode`."""
        dual = self.weight_dual_scale
        return Packed(self._canonical(), self.weight_scale, None if dual is None else dual.squeeze(-1), self.method)

    def check_state(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Raise FormatError unless what a state_dict holds for this layer is of its very shapes and dtypes.

        `nn.Module` would cast floats to codes, and leave out multipliers that one of the two sides does not have.
        """
        for name in PARTS:
            if prefix + name in state:
                self._check(name, state[prefix + name], prefix + name)

    def _check(self, name: str, part: Tensor, where: str) -> None:
        if TensorInfo.of(part) != self.record.get(name):
            raise FormatError(
                f"not a tensor of this {self.method} layer",
                where=where,
                got=TensorInfo.of(part),
                expected=self.record.get(name, f"one of {', '.join(self.record)}"),
                hint="Loading does not quantize: load floats into the float model, and quantize that.",
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``nn.Module._apply``, which serves every move and cast; the fp32 scales are moved but never cast."""
        before = {name: self._buffers[name] for name in PARTS}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype is not kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self
