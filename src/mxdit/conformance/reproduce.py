"""From a call that fails to a program of a few lines that does."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from mxdit.conformance.acceptance import Acceptance, acceptance
from mxdit.conformance.calls import Call
from mxdit.conformance.compare import BITS, Finding, bound, compare
from mxdit.errors import BackendError

_CLEARED = (
    "x",
    "codes",
    "a",
    "w",
    "mul_scale",
    "q",
    "k",
    "v",
)  # the arguments in which zeros take the place of what is not needed
_PARTS = 512  # into how many parts they are cut at most
_PRINTED = 1 << 14  # numbers that a program may spell out
_WORDS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def reproduce(name: str, call: Call, device: str) -> str | None:
    """A program that shows on the device what is wrong with the call, cut down to a part of it that still fails; None where
    no part fails that could be printed."""
    accepted = acceptance(call.kind, torch.device(device).type)
    raises = compare(call, device, accepted).message is not None

    def fails(part: Call) -> bool:
        """As the whole does: by an error, or by a wrong result."""
        try:
            finding = compare(part, device, accepted)
        except BackendError:
            return False  # the part is smaller than what the device takes
        return not finding.accepted(accepted) and (finding.message is not None) == raises

    small = shrink(call.flat(), fails)
    return _program(name, small, device, accepted) if small.numbers <= _PRINTED and fails(small) else None


def shrink(call: Call, fails: Callable[[Call], bool]) -> Call:
    """Drop parts of the axes of a flat call, by halves and less, while what is left fails; then put zeros in place of
    whatever is not needed."""
    for axis in call.axes:
        call = _drop(call, axis, fails)
    for name in _CLEARED:
        if call.args.get(name) is not None:
            call = _clear(call, name, fails)
    return call


def _drop(call: Call, axis: str, fails: Callable[[Call], bool]) -> Call:
    part = call.size(axis)
    while True:
        unit, start = call.unit(axis), 0
        part = max(unit, part // 2 // unit * unit)
        while start < call.size(axis) and part < call.size(axis):
            less = call.drop(axis, start, min(start + part, call.size(axis)))
            if fails(less):
                call = less
            else:
                start += part
        if part <= call.unit(axis):
            return call


def _clear(call: Call, name: str, fails: Callable[[Call], bool]) -> Call:
    total = part = call.args[name].numel()
    while part >= max(1, total // _PARTS):
        for start in range(0, total, part):
            less = call.without(name, start, start + part)
            if bool(call.args[name].flatten()[start : start + part].any()) and fails(less):
                call = less
        part //= 2
    return call


def _program(name: str, call: Call, device: str, accepted: Acceptance) -> str:
    finding = compare(call, device, accepted)
    lines = [textwrap.indent(f"{name}, on {device}: {_complaint(finding, accepted)}", "# ")]
    lines += ["import torch", "import mxdit", ""]
    lines += [f"{key} = {_literal(arg)}" for key, arg in call.args.items() if isinstance(arg, Tensor)]
    args = {key: _argument(key, arg, device) for key, arg in call.args.items()}
    if call.in_place:
        lines += [f"out = {args['x']}{'.clone()' if device == 'cpu' else ''}"]
        args["x"] = "out"
    returned = "" if call.in_place else f"{', '.join(call.outputs)} = "
    lines += [_filled(f"{returned}torch.ops.mxdit.{call.op}({', '.join(args.values())})")]
    if finding.message is None:
        for key, ours, theirs in zip(call.outputs, call.on(device), call.expected(), strict=True):
            got, expected = _literal(ours), _literal(theirs)
            if got != expected:
                lines += [textwrap.indent(f"got {got}", "# "), f"expected = {expected}"]
                lines += [_assertion(key, call, theirs, finding, accepted)]
    return "\n".join([*lines, ""])


def _complaint(finding: Finding, accepted: Acceptance) -> str:
    if finding.message:
        return finding.message
    counts = {"codes": finding.codes, "scales": finding.scales, "outputs": finding.outputs}
    return f"not {accepted.name}, {', '.join(f'{count} {key} differ' for key, count in counts.items() if count)}"


def _assertion(output: str, call: Call, expected: Tensor, finding: Finding, accepted: Acceptance) -> str:
    """The line of a program that fails as the call does."""
    error = f"({output}.cpu().double() - expected.double()).abs()"
    if output == "out" and finding.wrong and accepted.equal < 1:
        return _filled(f"assert bool(({error} <= {_literal(bound(call, expected, accepted))}).all()), {output}")
    if output == "out" and accepted.mean < math.inf:
        return f"assert bool({error}.sum() <= {accepted.mean} * expected.double().abs().sum()), {output}"
    bits = f".view({BITS[expected.dtype]})" if call.signed_zeros and not bool(expected.isnan().any()) else ""
    return f"torch.testing.assert_close({output}.cpu(){bits}, expected{bits}, rtol=0, atol=0, equal_nan=True)"


def _literal(tensor: Tensor) -> str:
    """An expression whose value is the tensor, bit for bit, in hexadecimal where that is of use."""
    if tensor.dtype is torch.float64:
        return f"torch.tensor({tensor.tolist()}, dtype=torch.float64)"
    shape = ", ".join(map(str, tensor.shape))
    width, word = 2 * tensor.element_size(), _WORDS.get(tensor.dtype, tensor.dtype)
    runs = [(f"0x{value:0{width}X}", len(list(run))) for value, run in groupby(tensor.flatten().view(word).tolist())]
    if word is torch.uint8 and len(runs) > 64:
        words = bytes(tensor.flatten().tolist()).hex(" ", 4)
        text = f'torch.frombuffer(bytearray.fromhex("""{words}"""), dtype={word})'
    else:
        words = ", ".join(f"*[{text}] * {count}" if count > 3 else ", ".join([text] * count) for text, count in runs)
        text = f"torch.tensor([{words}], dtype={word})" + ("" if word is tensor.dtype else f".view({tensor.dtype})")
    return _filled(f"{text}.reshape({shape})")


def _argument(key: str, arg: object, device: str) -> str:
    if isinstance(arg, Tensor):
        return key if device == "cpu" else f'{key}.to("{device}")'
    return f'"{arg}"' if isinstance(arg, str) else str(arg)


def _filled(line: str) -> str:
    return textwrap.fill(line, 118, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
