"""One forward of a model, watched: what each of its linears is given, and from which arguments that was computed.

Weights are replaced by tensors of the meta device for the call, so none is read and nothing of their size is allocated. The
arguments keep their numbers: masks, positions and lengths are computed for real, until they meet something that came from
a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from mxdit.models.skeleton import UNBUILDABLE

# What code raises for arguments that it does not take, or where a package is not installed.
FAILURES = (*UNBUILDABLE, NameError, ImportError)
_CHOOSING = {
    "topk",
    "sort",
    "argsort",
    "argmax",
    "argmin",
    "multinomial",
}  # functions whose result is which, not how much
# Whose result has the shape of a tensor and none of its numbers.
_SHAPED = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"}
# Whose result is no tensor, and the same on every device.
_TOLD = {"shape", "dtype", "ndim", "size", "dim", "numel", "stride", "storage_offset", "_version", "is_inference"}
_JOINING = {"cat", "concat", "concatenate"}
_INTEGERS = (torch.int64, torch.int32)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Linear:
    """What one linear met, an entry for each of its calls.

    inputs  numbers of the tensors that it was given: equal ones are the same tensor.
    rows    of those, all dimensions but the last taken together.
    reads   arguments of the model that they were computed from.
    """

    inputs: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)


@dataclass
class Trace:
    """What one forward showed.

    linears  path -> what it met, in the order of first calls; a linear that was not called is not here.
    blocks   path of each watched module that was called -> arguments that its own were computed from, in that order, too.
    routers  linears by whose output alone something is chosen, such as experts.
    apart    linear -> what took its weight outside the linear's own forward: "dtype", "data", "linear", ...
    misfit   (arguments, width, the layer's width) of a tensor that the last layer so far was given and does not take, by the
             arguments that it was computed from; None where it takes it.
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    blocks: dict[str, set[str]] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)
    apart: dict[str, str] = field(default_factory=dict)
    misfit: tuple[set[str], int, int] | None = None


def trace(model: nn.Module, inputs: Mapping[str, Any], watched: Iterable[str] = (), into: Trace | None = None) -> Trace:
    """Call `model(**inputs)` with weights on the meta device; the hooks and numbers of `model` are as before afterwards.

    Args:
        model: any module, on any device.
        inputs: arguments of its forward, with tensors anywhere inside them.
        watched: paths of modules whose running order is asked for.
        into: a Trace to write to, which holds what was seen even if the forward raises.

    Raises whatever the model's forward raises.
    """
    seen = Trace() if into is None else into
    weights = {name: weight.detach().to("meta") for name, weight in model.named_parameters()}
    buffers = {name: _own(buffer) for name, buffer in model.named_buffers()}
    linears = {
        id(weights[f"{path}.weight"]): path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" in weights
    }
    given = {name: tree_map(_own, value) for name, value in inputs.items()}
    watch = _Watch(seen, linears)
    for name, value in given.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                watch.reads[leaf] = {name}
    # Compiled functions run as they are written: a compiler does not see what is watched.
    with torch.compiler.set_stance("force_eager"), _hooks(model, watch, set(watched)), torch.no_grad(), watch:
        torch.func.functional_call(model, {**weights, **buffers}, (), given)
    return seen


class _Stretch(NamedTuple):
    """Where the numbers of a tensor lie: tensors of one stretch have the same.

    The storage is kept with it, so that no other one comes to lie in its place; `version` counts writes to it.
    """

    storage: torch.UntypedStorage
    version: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _stretch(tensor: Tensor) -> _Stretch:
    version = 0 if tensor.is_inference() else tensor._version  # torch does not count in inference mode
    where = (version, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
    return _Stretch(tensor.untyped_storage(), *where)


def _whole(tensors: Any, dim: int = 0, **_: Any) -> _Stretch | None:
    """The stretch that tensors joined along a dimension were cut from, in their order; None if they were not."""
    parts = [_stretch(tensor) for tensor in tensors if tensor.numel()]
    if not parts:
        return None
    for one, other in pairwise(parts):
        follows = one._replace(offset=one.offset + one.shape[dim] * one.strides[dim], shape=other.shape)
        if follows != other:
            return None
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0]._replace(shape=tuple(shape))


def _own(value: Any) -> Any:
    """A copy of a tensor on the CPU, or on the meta device if it is there; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach() if value.is_meta else value.detach().to("cpu", copy=True)


def _meta(value: Any) -> Any:
    """Tensors on the meta device. A single integer keeps its number: it may be a size."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (leaf.ndim == 0 and leaf.dtype in _INTEGERS):
            return leaf
        return leaf.to("meta")

    return tree_map(moved, value)


def _devices(value: Any, of: str) -> Any:
    """Arguments of a function whose devices are `of`, "cpu" or "meta", whichever of the two they were."""
    both = (torch.device("cpu"), torch.device("meta"), "cpu", "meta")
    return tree_map(lambda leaf: of if isinstance(leaf, (torch.device, str)) and leaf in both else leaf, value)


def _indices(index: Any) -> Any:
    """An index whose masks are numbers of places: how many those are must be known where there are no numbers."""
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        masks = isinstance(part, Tensor) and part.dtype is torch.bool and not part.is_meta
        found.extend(part.nonzero(as_tuple=True) if masks else (part,))
    return tuple(found)


def _output_size(tensor: Tensor, repeats: Any, dim: int | None = None, **_: Any) -> dict[str, int]:
    """The argument of `repeat_interleave` that says how many items come of repeats that differ from item to item."""
    if not isinstance(repeats, Tensor) or repeats.is_meta:
        return {}
    return {"output_size": int(repeats.expand(tensor.numel() if dim is None else tensor.shape[dim]).sum())}


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


@contextmanager
def _hooks(model: nn.Module, watch: _Watch, watched: set[str]) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch.linear_begins(path), with_kwargs=True))
            handles.append(module.register_forward_hook(watch.linear_ends(path)))
        elif path in watched:
            handles.append(module.register_forward_pre_hook(watch.block_begins(path), with_kwargs=True))
        if (width := _width(module)) is not None:
            handles.append(module.register_forward_pre_hook(watch.check_width(*width), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _width(module: nn.Module) -> tuple[int, int] | None:
    """(dimension, counted from its end, of an input that must have a width, that width) of a layer that has one."""
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, _CONVOLUTIONS):
        return -len(module.kernel_size) - 1, module.in_channels
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1 and not isinstance(module, nn.GroupNorm):
        return -1, len(weight)
    return None


class _Watch(TorchFunctionMode):
    """Sees every function of torch that the forward calls, and runs it where some of its tensors have no numbers."""

    def __init__(self, seen: Trace, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.seen, self.weights = seen, weights
        # tensor -> arguments of the model that it was computed from
        self.reads: MutableMapping[Tensor, set[str]] = WeakTensorKeyDictionary()
        # tensor -> the linears that it was computed from, the last ones only
        self.sources: MutableMapping[Tensor, set[str]] = WeakTensorKeyDictionary()
        self.numbers: dict[_Stretch, int] = {}
        # tensor -> what it was put together from again: slices that lie one after the other
        self.whole: MutableMapping[Tensor, _Stretch] = WeakTensorKeyDictionary()
        self.inside: list[str] = []  # the linears whose forward runs
        self.chance = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        taken = func.__self__.__name__ if name == "__get__" else name
        for tensor in tensors:
            path = self.weights.get(id(tensor))
            if path is not None and path not in self.inside:
                self.seen.apart.setdefault(path, taken)
        if taken == "device":
            return torch.device("cpu")  # where there would be numbers: code that asks chooses kernels by it
        if taken in _TOLD:
            return func(*args, **kwargs)
        if name in _CHOOSING and tensors:
            sources = self.sources.get(tensors[0], set())
            self.seen.routers |= sources if len(sources) == 1 else set()
        result = self._run(func, name, tensors, args, kwargs)
        if name in _SHAPED or name.startswith("new_"):
            return result
        if name in _JOINING and (whole := _whole(*args, **kwargs)) is not None:
            self.whole[result] = whole
        reads, sources = (
            set[str]().union(*(known.get(tensor, ()) for tensor in tensors)) for known in (self.reads, self.sources)
        )
        changed = args[:1] if name == "__setitem__" else result
        for leaf in tree_leaves(changed):
            if isinstance(leaf, Tensor) and id(leaf) not in self.weights:
                self.reads[leaf], self.sources[leaf] = reads, sources
        return result

    def _run(
        self, func: Callable[..., Any], name: str, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The function's result; on the meta device where one of its tensors is there."""
        if not any(tensor.is_meta for tensor in tensors):
            return func(*_devices(args, "cpu"), **_devices(kwargs, "cpu"))
        if name in _CHOOSING:  # which ones depends on numbers that nobody has: any will do
            made = torch.rand(tensors[0].shape, generator=self.chance)
            args, kwargs = tree_map(lambda leaf: made if leaf is tensors[0] else leaf, (args, kwargs))
            chosen = func(*args, **kwargs)
            dtype = tensors[0].dtype
            return tree_map(lambda leaf: leaf.to("meta", dtype) if leaf.is_floating_point() else leaf, chosen)
        first = args[0] if args else None
        if name in ("cpu", "cuda"):
            return first
        if name == "flex_attention":  # its mask is a function, of tensors that may have numbers
            query, _, value = args[:3]
            rows = query.new_empty(query.shape[:-1])
            return query.new_empty((*query.shape[:-1], value.shape[-1])), rows, rows
        if name == "repeat_interleave":
            kwargs = {**kwargs, **_output_size(*args, **kwargs)}
        changes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if changes and isinstance(first, Tensor) and not first.is_meta:
            return first  # it cannot become one without numbers; those that it has are of no use from here on
        if name in ("__getitem__", "__setitem__"):
            args = (first, _indices(args[1]), *args[2:])
        args, kwargs = _devices((args, kwargs), "meta")
        return func(*_meta(args), **_meta(kwargs))

    def linear_begins(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = _first_tensor(args, kwargs)
            assert tensor is not None
            found = self.seen.linears.setdefault(path, Linear())
            found.inputs.append(self.numbers.setdefault(self.whole.get(tensor) or _stretch(tensor), len(self.numbers)))
            found.rows.append(tensor.numel() // max(tensor.shape[-1], 1))
            found.reads |= self.reads.get(tensor, set())
            self.inside.append(path)

        return hook

    def linear_ends(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.inside.remove(path)
            self.sources[output] = {path}

        return hook

    def block_begins(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.seen.blocks.setdefault(path, set()).update(*(self.reads.get(tensor, ()) for tensor in given))

        return hook

    def check_width(self, dimension: int, width: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = _first_tensor(args, kwargs)
            if tensor is None:
                return
            has = tensor.shape[dimension] if tensor.ndim >= -dimension else 0
            reads = self.reads.get(tensor, set())
            self.seen.misfit = (reads, has, width) if has != width else None

        return hook
