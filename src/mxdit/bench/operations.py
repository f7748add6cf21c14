"""The forward of a Wan block, operation by operation: what each took, and the least that it must move and compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.bench.ceilings import Ceilings
from mxdit.bench.gemm import QUANTIZE, steps
from mxdit.bench.profiling import FORWARD, SCOPE
from mxdit.bench.shapes import TEXT_TOKENS, Wan
from mxdit.bench.timing import Call, alternate, timer
from mxdit.layers import MXLinear, linears_of

OTHER = "other"
MODULES = {  # prefixes of paths; the first that fits
    "norm": "{0}",
    "attn1.to_": "attn1: linears",
    "attn1.norm_": "attn1: norms of q, k",
    "attn2.to_": "attn2: linears",
    "attn2.norm_": "attn2: norms of q, k",
    "ffn.net.0.proj": "ffn: up",
    "ffn.net.0": "ffn: GELU",
    "ffn.net.2": "ffn: down",
}
AFTER = {  # of the block's own, what follows each of its modules
    None: "modulation table",
    "norm1": "norm1: scale, shift",
    "attn1": "attn1: gate, residual",
    "norm2": "norm2",  # a cast
    "attn2": "attn2: residual",
    "norm3": "norm3: scale, shift",
    "ffn": "ffn: gate, residual",
}
PREPARING = {
    "attn1": "attn1: rotary",
    "attn2": "attn2: norms of q, k",
}  # of attentions' own, what precedes the attention
LINEARS = ("attn1: linears", "attn2: linears", "ffn: up", "ffn: down")
ATTENTIONS = ("attn1: attention", "attn2: attention")
ROWS = 512  # of queries, where the products of an attention are measured alone


@dataclass(frozen=True)
class Work:
    """The least that an operation by itself has to do: read its operands and write its result once, and compute.

    Attributes:
        nbytes: read and written.
        products: operations of matrix products, two for a multiplication and an addition.
        others: all other operations, FP32; an exponential or a tanh counts as one.
    """

    nbytes: int
    products: int = 0
    others: int = 0

    def floor(self, best: Ceilings, peak: float) -> float:
        """Seconds, where the device reached its ceilings at all of it at once; ``peak`` is that of the products."""
        return max(self.nbytes / best.copy, self.products / peak, self.others / best.fp32)

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.products + other.products, self.others + other.others)


@dataclass(frozen=True)
class Operation:
    """One operation of a forward.

    Attributes:
        name: of it, or of the part.
        seconds: the quickest of the profiled forwards. Of a part: the quickest of its calls alone, or what such parts left.
        share: of all operations' seconds together, parts apart, 0 to 1.
        nbytes, flop: what it has to move and to compute, as `Work` counts; 0 for "other".
        floor: seconds that takes at the ceilings of the same run.
        part_of: the operation that it is a part of, which counts it already.
    """

    name: str
    seconds: float
    share: float
    nbytes: int = 0
    flop: int = 0
    floor: float = 0.0
    part_of: str | None = None


# -- what was done -------------------------------------------------------------------------------------------------------


def seconds_of(events: Iterable[Any], device: str) -> dict[str, float]:
    """Seconds of every operation inside of one forward, whose modules are marked (`profiling.marked`); `OTHER` is what is left
    of it. An operator counts for the module that called it. What a block or an attention calls itself is told by what came
    before: a cast right before a norm is the norm's."""
    (root,) = (event for event in events if event.name == FORWARD and str(event.device_type).endswith("CPU"))
    found: dict[str, float] = {}
    for name, event in _named(root, ""):
        found[name] = found.get(name, 0.0) + _seconds(event, device)
    return found | {OTHER: _seconds(root, device) - sum(s for name, s in found.items() if name != OTHER)}


def quickest(forwards: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least seconds of every operation: together what a forward takes that nothing disturbs."""
    return {name: min(seconds[name] for seconds in forwards) for name in forwards[0]}


def _seconds(event: Any, device: str) -> float:
    return (event.cpu_time_total if device == "cpu" else event.device_time_total) / 1e6


def _named(scope: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = sorted(scope.cpu_children, key=lambda event: event.time_range.start)
    names = [child.name.removeprefix(SCOPE) if child.name.startswith(SCOPE) else None for child in children]
    last, attended = None, False
    for index, (child, inner) in enumerate(zip(children, names, strict=True)):
        if inner is not None:
            last = inner
            yield from _named(child, inner)
        elif not path:
            following = names[index + 1] if index + 1 < len(names) else None
            cast = child.name == "aten::to" and following is not None and following.startswith("norm")
            yield (following if cast and following else AFTER.get(last, OTHER)), child
        elif path in PREPARING:
            attended |= "attention" in child.name
            yield (f"{path}: attention" if attended else PREPARING[path]), child
        else:
            fits = (name for prefix, name in MODULES.items() if path.startswith(prefix))
            yield next(fits, OTHER).format(path), child


# -- what had to be done -------------------------------------------------------------------------------------------------


def work_of(block: nn.Module, wan: Wan, tokens: int, dtype: torch.dtype) -> dict[str, Work]:
    """What every operation of a block's forward has to do over that many video tokens and the text's 512, with activations in
    ``dtype`` between operations, and weights as they lie in the block."""
    text, size = TEXT_TOKENS, dtype.itemsize
    video, inner, words = tokens * wan.dim, tokens * wan.ffn, text * wan.dim
    per_pixel = 4 * wan.dim  # one FP32 number for each feature, the same for all tokens
    found = {
        "modulation table": Work(3 * 6 * per_pixel, others=6 * wan.dim),
        "attn1: gate, residual": Work(3 * video * size + per_pixel, others=2 * video),
        "attn2: residual": Work(3 * video * size, others=video),
        "ffn: gate, residual": Work(3 * video * size + per_pixel, others=2 * video),
        "attn1: norms of q, k": Work(4 * video * size, others=2 * 4 * video),
        "attn2: norms of q, k": Work(2 * (video + words) * size, others=4 * (video + words)),
        # a sine and a cosine for each pair; four multiplications and two additions
        "attn1: rotary": Work(4 * video * size + 4 * tokens * wan.dim // wan.heads, others=2 * 3 * video),
        "ffn: GELU": Work(2 * inner * size, others=9 * inner),  # the tanh of a cubic
    }
    for norm in ("norm1", "norm2", "norm3"):
        affine = norm == "norm2"
        found[norm] = Work(2 * video * size + 2 * per_pixel * affine, others=(7 if affine else 5) * video)
        if not affine:
            found[f"{norm}: scale, shift"] = Work(2 * video * size + 2 * per_pixel, others=2 * video)
    for attention, keys in (("attn1", tokens), ("attn2", text)):
        found[f"{attention}: attention"] = Work(2 * (video + keys * wan.dim) * size, 4 * keys * video) + Work(
            0, others=5 * tokens * keys * wan.heads
        )  # of a score: its scale, the largest, the difference, the exponential, the sum
    for path, linear in linears_of(block):
        rows = text if path in ("attn2.to_k", "attn2.to_v") else tokens
        held = sum(tensor.nbytes for tensor in linear.state_dict().values())
        k, n = linear.in_features, linear.out_features
        name = next(name for prefix, name in MODULES.items() if path.startswith(prefix))
        found[name] = found.get(name, Work(0)) + Work(rows * (k + n) * size + held, 2 * rows * k * n)
    return found


# -- parts of it, measured alone -----------------------------------------------------------------------------------------


@torch.inference_mode()
def parts_of(
    block: nn.Module, wan: Wan, tokens: int, dtype: torch.dtype, rounds: int, device: torch.device
) -> dict[tuple[str, str], tuple[Work, float]]:
    """Work and seconds of what one kernel hides, by the operation and the part's name, each measured alone: the two products
    of every attention, by torch over 512 queries and multiplied out; and quantizing the linears' activations."""
    size, head = dtype.itemsize, wan.dim // wan.heads
    wanted: list[tuple[str, str, Work, Call, float]] = []
    for attention, keys in (("attn1", tokens), ("attn2", TEXT_TOKENS)):
        rows = min(ROWS, tokens)
        heads = 1 if device.type == "cpu" else wan.heads  # scores stay in a CPU's cache, as in a fused attention
        q, k, p = (
            torch.randn(heads, a, b, device=device, dtype=dtype) for a, b in ((rows, head), (keys, head), (rows, keys))
        )
        times = tokens / rows * wan.heads / heads
        work = Work(size * (tokens + keys) * wan.dim, 2 * tokens * keys * wan.dim)
        name = f"{attention}: attention"
        wanted.append((name, "q k^T, alone", work, partial(torch.matmul, q, k.mT), times))
        wanted.append((name, "p v, alone", work, partial(torch.matmul, p, k), times))
    for path, linear in linears_of(block):
        if not isinstance(linear, MXLinear):
            continue
        rows = TEXT_TOKENS if path in ("attn2.to_k", "attn2.to_v") else tokens
        dual = linear.weight_dual_scale is not None
        x = torch.randn(rows, linear.in_features, device=device, dtype=torch.bfloat16 if dual else dtype)
        calls = steps([linear], x).get(QUANTIZE)
        if calls is not None:
            name = next(name for prefix, name in MODULES.items() if path.startswith(prefix))
            packed: tuple[Tensor, ...] = calls[0]()  # pyright: ignore[reportAssignmentType]
            work = Work(x.nbytes + sum(tensor.nbytes for tensor in packed))
            wanted.append((name, "quantizing, alone", work, calls[0], 1))
    found: dict[tuple[str, str], tuple[Work, float]] = {}
    taken = alternate([[call] for *_, call, _ in wanted], rounds, timer(device))
    for (name, part, work, _, times), seconds in zip(wanted, taken, strict=True):
        before, so_far = found.get((name, part), (Work(0), 0.0))
        found[name, part] = (before + work, so_far + times * min(seconds))
    return found


def table(
    seconds: Mapping[str, float],
    work: Mapping[str, Work],
    parts: Mapping[tuple[str, str], tuple[Work, float]],
    best: Ceilings,
    peaks: tuple[float, float],
) -> tuple[Operation, ...]:
    """The operations, most time above the floor first, each followed by its parts; `OTHER` last.

    Args:
        seconds: of `seconds_of`.
        peaks: operations a second of linears' products, and of attentions'.
    """
    whole = sum(seconds.values())

    def row(name: str, taken: float, has: Work, part_of: str | None = None) -> Operation:
        floor = has.floor(best, peaks["attention" in (part_of or name)])
        return Operation(name, taken, taken / whole, has.nbytes, has.products + has.others, floor, part_of)

    rows = [row(name, seconds.get(name, 0.0), has) for name, has in work.items()]
    found = []
    for each in sorted(rows, key=lambda row: row.floor - row.seconds):
        found.append(each)
        inner = [(part, *held) for (name, part), held in parts.items() if name == each.name]
        found += [row(part, taken, has, each.name) for part, has, taken in inner]
        if inner and "attention" in each.name:
            left = each.seconds - sum(taken for *_, taken in inner)
            found.append(row("softmax and the rest", left, Work(0, others=work[each.name].others), each.name))
    return (*found, row(OTHER, seconds[OTHER], Work(0)))


def share_of(operations: Iterable[Operation], names: Sequence[str]) -> float:
    """Of those operations together."""
    return sum(each.share for each in operations if each.name in names)
