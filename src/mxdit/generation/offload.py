"""A pipeline on a device that cannot hold it: weights lie on the CPU and come to the device for as long as they are needed.

Of a transformer one block is there at a time, and all that is not in a block. diffusers' own offloading keeps a whole transformer
there, or moves weights when a forward ends, too early for a gradient; and it puts other tensors in the place of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.generation.pages import release
from mxdit.generation.recording import transformers_of
from mxdit.layers import MXLinear
from mxdit.models import spec_of


@contextmanager
def on(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Inside, the tensors of a module are on that device; afterwards it has those again that it had.

    Nothing is copied back but the weights of quantized layers: what is changed inside is lost. Tensors that are there already
    stay as they are, so that a caller may hold a module on a device over calls that hold it there themselves.
    """
    device = _whole(device)
    with ExitStack() as back:
        for part in module.modules():
            if isinstance(part, MXLinear) and part.weight.device != device:
                back.callback(part.to, part.weight.device)
                part.to(device)  # which lays its weight out as the device wants it
            for name, tensor in _own(part):
                if tensor.device != device:
                    back.callback(setattr, part, name, tensor)
                    setattr(part, name, _moved(tensor, device))
        yield


def offload(pipeline: Any, device: str) -> None:
    """Let a pipeline that is on the CPU run on a device, its weights there no longer than they are used.

    Afterwards weights may be read, and modules in blocks replaced, as if nothing were; the device that
    a transformer computes on is that of its first parameter.
    """
    from accelerate import cpu_offload_with_hook

    transformers = transformers_of(pipeline)
    others = [
        part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name not in transformers
    ]
    hooks = [cpu_offload_with_hook(part, device)[1] for part in others]  # pipelines ask these which device they run on

    def leave(*_: Any) -> None:
        for hook in hooks:
            hook.offload()

    for model in transformers.values():
        by_block(model, device)
        model.register_forward_pre_hook(leave)


def by_block(model: nn.Module, device: str) -> Callable[[], None]:
    """Have a transformer on a device, but its repeated blocks only while they run, one at a time; the result ends it."""
    blocks = [block for name in spec_of(model).blocks for block in model.get_submodule(name).children()]
    inside = {part for block in blocks for part in block.modules()}
    for part in model.modules():
        if part not in inside:
            for name, tensor in _own(part):
                setattr(part, name, _moved(tensor, _whole(device)))
    visits = [_Visit(block, device) for block in blocks]

    def end() -> None:
        for visit in visits:
            visit.end()

    return end


class Turns:
    """Has one transformer of a pipeline on its device at a time: from its first step until another one runs, or the VAE.

    On an accelerator the others' weights stay on the CPU, as they were loaded, and nothing is copied back. On a CPU the pages of
    files that they are mapped from are given back, to be read again; nothing else about them changes.
    """

    def __init__(self, pipeline: Any, device: str) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        self._device, self._there = device, dict[nn.Module, ExitStack]()
        turns = self

        class Leave(ModelHook):
            """diffusers calls a VAE's `decode` and `encode` after this hook, and asks it where the pipeline runs."""

            execution_device = torch.device(device)

            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
                turns.leave()
                return args, kwargs

        hooks = [model.register_forward_pre_hook(self._come) for model in transformers_of(pipeline).values()]
        add_hook_to_module(pipeline.vae, Leave())
        self._hooks = [hook.remove for hook in hooks] + [lambda: remove_hook_from_module(pipeline.vae)]

    def end(self) -> None:
        """Have none there, and no turns any more."""
        self.leave()
        for remove in self._hooks:
            remove()

    def leave(self) -> None:
        """Have none of them there."""
        while self._there:
            self._there.popitem()[1].close()

    def _come(self, model: nn.Module, _: Any) -> None:
        if model not in self._there:
            self.leave()
            self._there[model] = ExitStack()
            if torch.device(self._device).type == "cpu":
                self._there[model].callback(release, model)
            else:
                self._there[model].enter_context(on(model, self._device))


class _Visit:
    """Has a block on a device whenever it runs."""

    def __init__(self, block: nn.Module, device: str) -> None:
        self._device, self._there = device, list[Any]()
        self._hooks = (
            block.register_forward_pre_hook(self._come),
            block.register_forward_hook(self._go, always_call=True),
        )

    def end(self) -> None:
        """Leave the block where it is."""
        for hook in self._hooks:
            hook.remove()

    def _come(self, block: nn.Module, _: Any) -> None:
        self._there.append(on(block, self._device))
        self._there[-1].__enter__()

    def _go(self, *_: Any) -> None:
        self._there.pop().__exit__(None, None, None)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a module itself, by name."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _whole(device: torch.device | str) -> torch.device:
    """With its index: tensors on "cuda" are on "cuda:0"."""
    return torch.empty(0, device=device).device


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
