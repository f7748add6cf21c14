"""An emulated NPU: a torch device "npu" whose memory is CPU tensors that only this module can reach.

An `NpuTensor` has the shape, strides, dtype and autograd behaviour of a tensor on device "npu:0" and holds its data in
a CPU tensor, `raw`. ATen operators run on the raw tensors; operators of other libraries (``mxdit::``) get the kernel
that is registered for the device, or their composite one. So models, pipelines and backends see a device that computes
exactly what the CPU does, and refuses what a device refuses: tensors of another device, another device's generator.

A tensor has a storage format, as torch_npu's tensors do. FRACTAL_NZ data is really laid out so, in blocks, and nothing
but the operators made for it can use it: whoever mistakes it for rows computes garbage, and whoever views, slices, pads
or changes it is refused (op-plugin docs/zh/custom_APIs/torch_npu, npu_format_cast, constraints for Ascend 950DT).

The device belongs to the process: importing sets it up, once. `state` says what it pretends to be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend

aten = torch.ops.aten

FORMAT_NCHW, FORMAT_ND, FORMAT_NZ = 0, 2, 29  # torch_npu.Format
_BLOCK_ROWS, _BLOCK_BYTES = 16, 32  # a FRACTAL_NZ block is 16 rows of 32 bytes


@dataclass
class State:
    """What the emulated machine is, and what it has been asked to do.

    Attributes:
        name: what `torch.npu.get_device_name` says.
        count: the number of devices.
        cann: the version of CANN.
        missing: operators that this torch_npu has not.
        no_kernel: aclnn kernels that this CANN has not, such as ``aclnnDynamicMxQuantV3``.
        calls: every operator called, with what it was given, in order.
    """

    name: str = "Ascend950PR_9579"
    count: int = 1
    cann: str = "9.1.0"
    missing: frozenset[str] = frozenset()
    no_kernel: frozenset[str] = frozenset()
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @contextmanager
    def pretending(self, **changes: Any) -> Iterator[State]:
        """Another machine for a while, with a fresh list of calls."""
        before = dict(vars(self))
        vars(self).update({"calls": []} | changes)
        try:
            yield self
        finally:
            vars(self).update(before)


state = State(count=0)
"""Without a device until a test asks for one, so that the tests that know nothing of it see none."""


class NpuTensor(Tensor):
    """A tensor on the emulated device: `raw` holds its data on the CPU, `npu_format` says how."""

    raw: Tensor
    npu_format: int

    @staticmethod
    def __new__(cls, raw: Tensor, npu_format: int = FORMAT_ND, like: Tensor | None = None) -> NpuTensor:
        """``like`` has the shape, strides and dtype to show where the raw tensor has others."""
        shown = raw if like is None else like
        self = Tensor._make_wrapper_subclass(
            cls,
            shown.shape,
            strides=shown.stride(),
            storage_offset=shown.storage_offset(),
            dtype=shown.dtype,
            device=torch.device("npu", 0),
        )
        self.raw, self.npu_format = raw, npu_format
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims"):
            return func.redispatch(_PRIVATE_USE, *args, **kwargs)
        return _run(func, args, kwargs)

    def _set_data(self, value: NpuTensor) -> None:
        Tensor.data.__set__(self, value)  # shape and dtype; `Module.to` changes parameters so
        self.raw, self.npu_format = value.raw, value.npu_format

    data = property(lambda self: Tensor.data.__get__(self), _set_data)

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of any tensor. Torch answers for rows without asking the device, so the refusal has to be here."""
        if self.npu_format == FORMAT_NZ:
            raise RuntimeError(_changes_nz("contiguous"))
        return super().contiguous(*args, **kwargs)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the data lies: safetensors compares addresses to see what is shared."""
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return repr(self.detach().cpu()).removesuffix(")") + ", device='npu:0')"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)


_PRIVATE_USE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


# -- operators ---------------------------------------------------------------------------------------------------------


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An ATen operator on the raw tensors; what it makes is on the device unless it was told another one."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, NpuTensor)]
    device = kwargs.get("device")
    on_npu = bool(tensors) if device is None else torch.device(device).type == "npu"
    _check(func, flat, tensors, on_npu)
    if any(x.npu_format == FORMAT_NZ for x in tensors):
        return _run_on_nz(func, args, kwargs, on_npu)
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if func is aten.copy_.default:
        return args[0]
    wrappers = {id(x.raw): x for x in tensors}  # an operator that works in place gives back what it was given

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or not on_npu:
            return x
        if id(x) not in wrappers:
            return NpuTensor(x)
        wrapper = wrappers[id(x)]
        if (x.shape, x.stride(), x.storage_offset()) != (wrapper.shape, wrapper.stride(), wrapper.storage_offset()):
            wrapper.data = NpuTensor(x)  # resized, or its axes moved
        return wrapper

    return tree_map(wrap, result)


def _check(func: Any, flat: list[Any], tensors: list[NpuTensor], on_npu: bool) -> None:
    """Refuse what a device refuses: a device that is not there, tensors and generators of another one."""
    for x in flat:
        if isinstance(x, torch.device) and x.type == "npu" and (x.index or 0) >= state.count:
            raise RuntimeError(f"{func}: {x} is not there: this machine has {state.count} NPU devices")
        if isinstance(x, torch.Generator) and on_npu:
            raise RuntimeError(f"{func}: expected a 'npu' device type for generator but found '{x.device.type}'")
        if not tensors or not isinstance(x, Tensor) or isinstance(x, NpuTensor) or func is aten.copy_.default:
            continue
        if x.dim() or x.device.type != "cpu":  # numbers on the CPU go with everything
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found at least two devices, "
                f"npu:0 and {x.device}!"
            )


def _unwrap(x: Any) -> Any:
    if isinstance(x, NpuTensor):
        return x.raw
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "npu" else x


# -- FRACTAL_NZ --------------------------------------------------------------------------------------------------------


def to_nz(x: Tensor) -> Tensor:
    """Rows (..., R, C) as FRACTAL_NZ blocks (..., C1, R1, 16, C0 bytes), zeros filling the last ones."""
    rows = x.contiguous().view(torch.uint8)
    rows = F.pad(rows, (0, -rows.shape[-1] % _BLOCK_BYTES, 0, -rows.shape[-2] % _BLOCK_ROWS))
    blocks = rows.unflatten(-1, (-1, _BLOCK_BYTES)).unflatten(-3, (-1, _BLOCK_ROWS))  # (..., R1, 16, C1, 32)
    return blocks.movedim(-2, -4).contiguous()


def from_nz(x: NpuTensor) -> Tensor:
    """The rows of a FRACTAL_NZ tensor, on the CPU."""
    rows = x.raw.movedim(-4, -2).flatten(-2).flatten(-3, -2)  # (..., R1, 16, C1, 32), then (..., R, bytes), padded
    return rows[..., : x.shape[-2], : x.shape[-1] * x.element_size()].contiguous().view(x.dtype)


def _run_on_nz(func: Any, args: Any, kwargs: Any, on_npu: bool) -> Any:
    """The few operators that leave a FRACTAL_NZ tensor as it is, and the copy to the CPU, which gives rows."""
    if func in (aten.detach.default, aten.clone.default):
        return NpuTensor(func(args[0].raw), FORMAT_NZ, args[0])
    if func is aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
        return NpuTensor(args[0].raw.clone(), FORMAT_NZ, args[0]) if on_npu else from_nz(args[0])
    if func is aten.copy_.default and not isinstance(args[0], NpuTensor):
        return args[0].copy_(from_nz(args[1]))
    raise RuntimeError(_changes_nz(func))


def _changes_nz(what: Any) -> str:
    return (
        f"{what}: got a FRACTAL_NZ tensor, which no operation may view or change on this device (npu_format_cast, "
        "constraints); cast it to ND first"
    )


# -- the device as torch sees it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A queue of one device: everything here is done when it is called."""

    device: torch.device


class Event:
    """A moment of a stream. Its time can be read once the stream has got there, and only if it was asked for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timing, self._at = enable_timing, None

    def record(self, stream: Stream) -> None:
        """torch_npu takes no stream for the current device's; mxdit measures on others, too, so here it must be said."""
        if not isinstance(stream, Stream):
            raise TypeError(f"not a stream: {stream!r}")
        self._at = (time.perf_counter(), stream.device)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if self._at is None or end._at is None or not (self._timing and end._timing):
            raise RuntimeError("both events must be recorded, with timing")
        if self._at[1] != end._at[1]:
            raise RuntimeError("events of two devices")
        return (end._at[0] - self._at[0]) * 1e3


class _Npu:
    """What torch_npu puts at `torch.npu`, as far as inference uses it."""

    matmul = SimpleNamespace(allow_hf32=False)
    Event = Event

    @staticmethod
    def current_stream(device: Any = None) -> Stream:
        return Stream(torch.device("npu:0" if device is None else device))

    @staticmethod
    def is_available() -> bool:
        return state.count > 0

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return state.count

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return state.name

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return 96 << 30, 128 << 30

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


class _Hook(_DummyPrivateUse1Hook):
    """What torch.accelerator asks."""

    def is_available(self) -> bool:
        return state.count > 0


npu = _Npu()
_setup_privateuseone_for_python_backend("npu", npu, _Hook())

# Operators that make tensors have none to find the device by, nor do kernels that torch runs without the Python key.
_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")


def _whole(name: str) -> None:
    """Run a composite operator as a whole: torch would take it apart in another way than for the CPU."""
    func = getattr(aten, name).default
    _ATEN.impl(name, lambda *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")


_whole("scaled_dot_product_attention")
_whole("copy_")  # also reached without the Python key: torch.tensor(..., device="npu")
