"""A transformer run one block at a time over many recorded calls, so that no more than one block has to be at hand.

What is in front of a block and behind it is the model's own `forward`: the blocks before are replaced by modules that give what
the last of them in their list gave, and the model's code hands that on as it would have. So a family of models needs nothing
said about it, whether its lists run one after the other or side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.errors import ModelError
from mxdit.generation.offload import on
from mxdit.generation.recording import map_tensors, velocity_of
from mxdit.models import spec_of

Call = Mapping[str, Any]  # as `mxdit.generation.recording.Recorder` keeps it


class _Given(nn.Module):
    """Stands where a block was, and gives what the last one of its list gave; what a model reads off it is the block's own."""

    def __init__(self, value: Any, block: nn.Module) -> None:
        super().__init__()
        self.value = value
        self.__dict__["block"] = block  # not as a module of this one

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


class _Reached(BaseException):
    """Ends a call behind the block that was wanted. A BaseException, so that no model takes it for its own."""


class Walk:
    """The blocks of a transformer, and recorded calls that go through them one after the other.

    Args:
        model: in memory or mapped; only the block whose turn it is is read.
        calls: of it.
        keep: whether what every block gave to every call is kept, for `back`.

    Raises:
        ModelError: its blocks do not run one after the other.

    Attributes:
        blocks: (path, module) in the order in which they run.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], *, keep: bool = False) -> None:
        spec = spec_of(model)
        if not spec.sequential:
            raise ModelError(
                "the model cannot be run a block at a time, so it cannot be calibrated",
                where=spec.transformer,
                got=f"outputs of single blocks of {' and '.join(spec.blocks)} are used beside the last",
                hint="mxdit quantize needs no calibration.",
            )
        self.model, self.calls, self._keep = model, calls, keep
        self._lists = [(name, model.get_submodule(name)) for name in spec.blocks]
        self.blocks = [
            (f"{name}.{i}", block) for name, blocks in self._lists for i, block in enumerate(_modules(blocks))
        ]
        self._given: list[list[Any]] = []  # for each block that was passed, what it gave to each call

    def __iter__(self) -> Iterator[tuple[str, nn.Module, Callable[[], Iterator[Call]]]]:
        """(path, block, run) of each block; iterating over `run()`, once, sends each call through it, and yields the call."""
        for index, (path, block) in enumerate(self.blocks):
            yield path, block, partial(self._through, index)

    @property
    def nbytes(self) -> int:
        """Bytes of what blocks gave and is still needed."""
        return sum(t.nbytes for given in self._given for value in given for t in _tensors(value))

    def _through(self, index: int) -> Iterator[Call]:
        given: list[Any] = []
        needed = self._passed(index + 1).values()
        with on(self.blocks[index][1], self._device):
            for number, call in enumerate(self.calls):
                with torch.no_grad():
                    inputs = _to(call["inputs"], self._device)
                    given.append(_to(self._run(inputs, index, self._before(index, number)), "cpu"))
                for before in range(index):
                    if not self._keep and before not in needed and self._given[before]:
                        self._given[before][number] = None  # or what two blocks of a list gave would be held
                yield call
        if not self._keep:
            self._given = [kept if before in needed else [] for before, kept in enumerate(self._given)]
        self._given.append(given)

    def _passed(self, index: int) -> dict[str, int]:
        """The index of the last block before `index` in each list that has one."""
        return {path.rpartition(".")[0]: before for before, (path, _) in enumerate(self.blocks[:index])}

    def _before(self, index: int, number: int) -> dict[str, Any]:
        """What the last block before `index` in each list gave to a call."""
        return {name: self._given[before][number] for name, before in self._passed(index).items()}

    def back(self, number: int, direction: Tensor) -> Iterator[str]:
        """Send a gradient back through the blocks, last one first; yields the path of each block that it has passed.

        Hooks on outputs inside a block see their gradients, as in any backward pass. Parameters get none.

        Args:
            number: of the call, which went through all blocks with ``keep``.
            direction: gradient of what is wanted by the velocity, in its shape.
        """
        call, last = self.calls[number], len(self.blocks)
        gradients, waiting = [direction], dict[str, list[Tensor]]()  # by what the last block of a list gave
        for index in range(last, -1, -1):
            # What the block is given: by the block before, and beside it (the text), from which a branch may begin.
            given = map_tensors(_to(self._before(index, number), self._device), _leaf)
            inputs = map_tensors(_to(call["inputs"], self._device), _leaf)
            leaves = [t for t in (*_tensors(given), *_tensors(inputs)) if t.requires_grad]
            held = on(self.blocks[index][1], self._device) if index < last else nullcontext()
            with held, torch.enable_grad():  # to the end of the pass back, which needs the weights
                out = _tensors(self._run(inputs, index if index < last else None, given))
                gradients = [g.to(t.device, t.dtype) for g, t in zip(gradients, out, strict=True)]
                torch.autograd.backward(out, gradients, inputs=leaves)
            for name, value in given.items():
                found = [torch.zeros_like(t) if t.grad is None else t.grad for t in _tensors(value)]
                waiting[name] = [a + b for a, b in zip(found, waiting[name], strict=True)] if name in waiting else found
            if index < last:
                yield self.blocks[index][0]
            if index:
                gradients = waiting.pop(self.blocks[index - 1][0].rpartition(".")[0])

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _run(self, inputs: Mapping[str, Any], index: int | None, given: Mapping[str, Any]) -> Any:
        """What block `index` gives, or the model where it is None, when the last before it in each list gave `given`."""
        found = list[Any]()

        def reached(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise _Reached

        stop = len(self.blocks) if index is None else index
        with self._replaced(stop, map_tensors(given, lambda t: t.to(self._device))):
            hook = None if index is None else self.blocks[index][1].register_forward_hook(reached)
            try:
                found.append(velocity_of(self.model(**inputs)))
            except _Reached:
                pass
            finally:
                if hook is not None:
                    hook.remove()
        return found[0]

    @contextmanager
    def _replaced(self, stop: int, given: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the first `stop` blocks give what `given` has for their list."""
        number = 0
        for name, blocks in self._lists:
            for i, block in enumerate(_modules(blocks)):
                if number < stop:
                    blocks.register_module(str(i), _Given(given[name], block))
                number += 1
        try:
            yield
        finally:
            for path, block in self.blocks[:stop]:
                name, _, i = path.rpartition(".")
                self.model.get_submodule(name).register_module(i, block)


def _modules(blocks: nn.Module) -> list[nn.Module]:
    return list(blocks.children())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _to(value: Any, device: torch.device | str) -> Any:
    return map_tensors(value, lambda t: t.detach().to(device))


def _tensors(value: Any) -> list[Tensor]:
    found = list[Tensor]()
    map_tensors(value, lambda t: found.append(t) or t)
    return found
