"""`mxdit conformance`: every case on every CPU path; what is broken is found, counted, and shown by a program that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mxdit
from command import mxdit_command
from mxdit import conformance
from mxdit.backends import native
from mxdit.conformance.acceptance import acceptance
from mxdit.conformance.calls import Call
from mxdit.conformance.case import Case, generator
from mxdit.conformance.compare import Finding, compare
from mxdit.numerics.codec import _codes, _pack, decode_blocks, encode
from mxdit.numerics.formats import FORMATS
from mxdit.numerics.scales import level_one_scale
from native_cases import product_bounds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_threaded")]
CASES = {case.name: case for case in conformance.cases()}
DUAL = FORMATS["mxfp4_dualscale"]


class Broken(TorchDispatchMode):
    """One op of mxdit answers otherwise: `instead` gets its arguments and makes the answer."""

    def __init__(self, op: str, instead: Callable[..., Any]) -> None:
        super().__init__()
        self.op, self.instead = getattr(torch.ops.mxdit, op).default, instead

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.instead if func is self.op else func)(*args, **(kwargs or {}))


# -- the cases ---------------------------------------------------------------------------------------------------------


class Remembered(Call):
    """A call that asks the reference once, however many paths are compared with it. The reference is the slow side."""

    @cached_property
    def _expected(self) -> tuple[torch.Tensor, ...]:
        return super().expected()

    def expected(self) -> tuple[torch.Tensor, ...]:
        return self._expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_passes_on_every_path(case):
    if isinstance(case, Case):
        calls = [Remembered(call.op, call.args) for call in case.calls(generator(case.name))]
        case = Case(case.name, lambda numbers: iter(calls))
    for path in native.paths() or [native.REFERENCE]:  # another test fails where the library could have been built
        with native.using(path):
            result = case.run()
        assert result.verdict == conformance.PASS, f"{path}: {result.reason}\n{result.reproducer}"
        assert result.elements > 1000 and result.reproducer is None
        assert json.loads(json.dumps(result.to_dict()))["name"] == case.name


def calls_of(prefix: str) -> Iterator[Call]:
    for name, case in CASES.items():
        if name.startswith(prefix) and isinstance(case, Case):
            yield from case.calls(generator(name))


def test_names_are_unique_and_numbers_depend_on_nothing_else():
    assert len(CASES) == len(conformance.cases())
    for name in ("quantize mxfp8 ocp rint: every fp16", "matmul w4a8 mxfp4: K = 96"):
        first = list(calls_of(name))
        torch.rand(7)
        for one, other in zip(first, calls_of(name), strict=True):
            for a, b in zip(one.args.values(), other.args.values(), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if isinstance(a, torch.Tensor) else a == b


def test_every_bf16_pattern_is_a_maximum_and_stands_below_others():
    for name, width in (("quantize mxfp4 uos rint: every bf16", 32), ("quantize mxfp4_dualscale rint: every bf16", 64)):
        first, beside, _ = (call.args["x"] for call in calls_of(name))
        blocks = first.view(65536, width)
        own = blocks.view(torch.int16).gather(1, (torch.arange(65536) % width)[:, None])
        assert len(own.unique()) == 65536
        own = own.view(torch.bfloat16)
        assert bool((blocks.abs().nan_to_num(0, 0) <= own.abs()).all(1)[own[:, 0].isfinite()].all())
        below = beside.view(-1, 32)
        assert len(below[:, 1:].flatten().view(torch.int16).unique()) == 65536
        finite = below.isfinite().all(1)
        assert bool((below[:, 1:].abs() <= below[:, :1].abs())[finite].all())


def test_what_is_held_to_equality_has_one_right_result():
    """The sums fit fp32 in every order; else a device could differ without being wrong."""
    checked = 0
    for call in (*calls_of("matmul w4a4"), *calls_of("linear w4a4")):
        args = call.args
        if call.op == "linear":
            fmt, rule = ("mxfp4", args["rule"]) if args["w_dual"] is None else (DUAL.name, None)
            a = encode(args["x"], fmt, rule, "rint", args["mul_scale"])
            codes, scale, a_outer, w_scale, w_outer = a.codes, a.scale, a.outer, args["w_scale"], args["w_dual"]
        elif call.op == "matmul":
            codes, scale, a_outer, w_scale, w_outer = args["a"], args["a_scale"], None, args["w_scale"], None
        else:
            codes, scale, a_outer, w_scale, w_outer = (args[key] for key in ("a", "a_l1", "a_l0", "w_l1", "w_l0"))
        left, right = decode_blocks(codes, scale, DUAL), decode_blocks(args["w"], w_scale, DUAL)
        bias = None if args["bias"] is None else args["bias"].float()
        _, _, exact = product_bounds(left, right, a_outer, w_outer, bias, call.expected()[0])
        assert bool(exact.all())
        checked += exact.numel()
    assert checked > 500_000


# -- what is broken is found -------------------------------------------------------------------------------------------

OPS = torch.ops.mxdit


def ties_away(x, fmt, rule, mode):
    return OPS.quantize(x, fmt, rule, "round")


def seven_for_uos(x, fmt, rule, mode):
    """Another scale for maxima from 7 to 7.25 times a power of two."""
    return OPS.quantize(x, fmt, "even7", mode)


def one_code(x, fmt, rule, mode):
    """Wrong for one number, where it is the maximum of its block."""
    codes, scale = OPS.quantize(x, fmt, rule, mode)
    wrong = ((x == 40.25) & (x == x.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1))).unflatten(
        -1, (-1, 2)
    )
    return codes ^ wrong.any(-1).to(torch.uint8), scale


def scale_of_zeros(x, fmt, rule, mode):
    codes, scale = OPS.quantize(x, fmt, rule, mode)
    return codes, scale.where((x != 0).unflatten(-1, (-1, 32)).any(-1), torch.tensor(127, dtype=torch.uint8))


def nan_codes(x, fmt, rule, mode):
    codes, scale = OPS.quantize(x, fmt, rule, mode)
    return torch.where((scale == 255).repeat_interleave(codes.shape[-1] // scale.shape[-1], -1), 0x88, codes), scale


def divided_by_six(x, mul_scale, mode):
    codes, _, l1 = OPS.quantize_dual(x, mul_scale, mode)
    x = x if mul_scale is None else x * mul_scale.to(x.dtype)
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % 512)).unflatten(-1, (-1, 512))
    return codes, groups.float().nan_to_num(0, 0, 0).abs().amax(-1) / 6, l1


def without_mul_scale(x, mul_scale, mode):
    return OPS.quantize_dual(x, None, mode)


def quotient_in_fp32(x, mul_scale, mode):
    """As the operator, but for the rounding of the quotient to x's dtype."""
    return dual_by(lambda x, l0: x.float() / l0, x, mul_scale, mode)


def dual_by(quotient, x, mul_scale, mode):
    """The dual-level operator around another first quotient, given x and the level-0 scale of each of its numbers."""
    codes, l0, l1 = OPS.quantize_dual(x, mul_scale, mode)
    x, k = x if mul_scale is None else x * mul_scale.to(x.dtype), x.shape[-1]
    scale = l0.repeat_interleave(512, -1)[..., :k]
    t = torch.where(x == 0, x.float(), torch.where(scale == 0, torch.inf, quotient(x, scale).float()))
    blocks = torch.nn.functional.pad(t, (0, -k % 32)).view(-1, l1.shape[-1], 32)
    byte, reciprocal = level_one_scale(blocks.abs().amax(-1), DUAL)
    packed = _pack(_codes(blocks * reciprocal[..., None], DUAL.element, mode, x.dtype), k, DUAL)
    return packed.view(codes.shape), l0, byte.to(torch.uint8).view(l1.shape)


def unsigned_zeros(codes, scale, outer, fmt, dtype):
    return OPS.dequantize(codes, scale, outer, fmt, dtype) + 0.0


def without_bias(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out):
    return OPS.matmul(a, a_scale, w, w_scale, None, a_fmt, w_fmt, out)


def in_bf16(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out):
    left, right = decode_blocks(a, a_scale, FORMATS[a_fmt]), decode_blocks(w, w_scale, FORMATS[w_fmt])
    acc = sum(part(left, g).bfloat16() @ part(right, g).bfloat16().T for g in range(-(-left.shape[1] // 512)))
    return (acc if bias is None else acc + bias).to(out)


def cut_to_bf16(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out):
    """Cut instead of rounded to nearest."""
    wide = OPS.matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, torch.float32)
    return (wide.view(torch.int32) & -65536).view(torch.float32).to(out)


def part(x, group):
    return x[:, group * 512 : (group + 1) * 512]


def without_fma(a, w, a_l0, w_l0, a_l1, w_l1, bias, out):
    left, right = decode_blocks(a, a_l1, DUAL), decode_blocks(w, w_l1, DUAL)
    acc = torch.zeros(len(a), len(w)) + (0.0 if bias is None else bias.float())
    for g in range(w_l0.shape[1]):
        acc += (part(left, g) @ part(right, g).T) * (a_l0[:, g, None] * w_l0[:, g])
    return acc.to(out)


def last_group_missing(a, w, a_l0, w_l0, a_l1, w_l1, bias, out):
    groups = torch.arange(w_l0.shape[1]) < w_l0.shape[1] - 1
    return OPS.matmul_dual(a, w, a_l0, w_l0 * groups, a_l1, w_l1, bias, out)


def linear_without_mul_scale(x, w, w_scale, w_dual, mul_scale, *rest):
    return OPS.linear(x, w, w_scale, w_dual, None, *rest)


def no_mask(q, k, v, mask, scale, causal, method):
    return OPS.attention(q, k, v, None, scale, causal, method)


def no_causal(q, k, v, mask, scale, causal, method):
    return OPS.attention(q, k, v, mask, scale, False, method)


def products_in_bf16(q, k, v, mask, scale, causal, method):
    """Logits of rounded numbers, as fast-math or TF32 would have them."""
    return OPS.attention(q.bfloat16().to(q.dtype), k, v, mask, scale, causal, method)


def other_heads(q, k, v, mask, scale, causal, method):
    """Heads that share keys read them in turn, not side by side."""
    heads, sources = q.shape[2], k.shape[2]
    k, v = (x.repeat(1, 1, heads // sources, 1) for x in (k, v))
    return OPS.attention(q, k, v, mask, scale, causal, method)


def always_exact(q, k, v, mask, scale, causal, method):
    return OPS.attention(q, k, v, mask, scale, causal, "exact")


def no_eps(x, weight, eps, cos, sin, rounded):
    return OPS.rms_norm(x, weight, 0.0, cos, sin, rounded)


def rounded_once(x, weight, eps, cos, sin, rounded):
    return OPS.rms_norm(x, weight, eps, cos, sin, False)


def turned_back(x, weight, eps, cos, sin, rounded):
    return OPS.rms_norm(x, weight, eps, cos, None if sin is None else -sin, rounded)


def squares_in_order(x, weight, eps, cos, sin, rounded):
    """One sum in place of 32."""
    if cos is not None:
        return OPS.rms_norm(x, weight, eps, cos, sin, rounded)
    wide = x.float()
    out = wide / (wide.square().cumsum(-1)[..., -1:] / x.shape[-1] + eps).sqrt()
    return (out if weight is None else out * weight).to(x.dtype)


def not_in_place(x, *rest):
    pass


def by_erf(x):
    x.copy_(torch.nn.functional.gelu(x))


def positive_zeros(x):
    OPS.gelu_(x)
    x.copy_(x + 0.0)


def broken_down(*args):
    raise RuntimeError("kernel died\nat address 7")


def as_bf16(*args):
    return OPS.linear(*args).to(torch.bfloat16)


BROKEN = {
    "ties away from zero": ("quantize", ties_away, "quantize mxfp4 uos rint: every bf16", "codes"),
    "ties away in fp16": ("quantize", ties_away, "quantize mxfp4 uos rint: every fp16", "codes"),
    "a scale rule's threshold": ("quantize", seven_for_uos, "quantize mxfp4 uos floor: every bf16", "scales"),
    "a threshold in fp32": ("quantize", seven_for_uos, "quantize mxfp4: fp32", "scales"),
    "one number": ("quantize", one_code, "quantize mxfp4 ocp round: every bf16", "codes"),
    "zeros": ("quantize", scale_of_zeros, "quantize mxfp8: special blocks", "scales"),
    "codes of NaN": ("quantize", nan_codes, "quantize mxfp8: special blocks", "codes"),
    "level 0": ("quantize_dual", divided_by_six, "quantize mxfp4_dualscale: K = 5120", "scales"),
    "no multipliers": (
        "quantize_dual",
        without_mul_scale,
        "quantize mxfp4_dualscale rint with mul_scale: every bf16",
        "codes",
    ),
    "no rounding of the quotient": (
        "quantize_dual",
        quotient_in_fp32,
        "quantize mxfp4_dualscale rint: every bf16",
        "codes",
    ),
    "signs of zero": ("dequantize", unsigned_zeros, "dequantize mxfp4: every code", "outputs"),
    "no bias": ("matmul", without_bias, "matmul w4a4 mxfp4: K = 96", "outputs"),
    "no bias, eight bits": ("matmul", without_bias, "matmul w8a8 mxfp8: K = 96", "outputs"),
    "sums in bf16": ("matmul", in_bf16, "matmul w8a8 mxfp8: Wan's K and 576", "outputs"),
    "no FMA": ("matmul_dual", without_fma, "matmul w4a4 mxfp4_dualscale: Wan's K and 576", "outputs"),
    "a group left out": ("matmul_dual", last_group_missing, "matmul w4a4 mxfp4_dualscale: Wan's K and 576", "outputs"),
    "a linear's multipliers": ("linear", linear_without_mul_scale, "linear w4a16 mxfp4_dualscale: K = 96", "outputs"),
    "a single-scale linear's": ("linear", linear_without_mul_scale, "linear w4a4 mxfp4: K = 96", "outputs"),
    "a mask": ("attention", no_mask, "attention exact: bf16", "outputs"),
    "keys that come later": ("attention", no_causal, "attention exact: fp16", "outputs"),
    "attention's products in bf16": ("attention", products_in_bf16, "attention exact: fp32", "outputs"),
    "shared heads": ("attention", other_heads, "attention exact: fp32", "outputs"),
    "another method": ("attention", always_exact, "attention int8: fp32", "outputs"),
    "eps": ("rms_norm", no_eps, "rms_norm: fp32", "outputs"),
    "a rounding before the weight": ("rms_norm", rounded_once, "rms_norm: bf16", "outputs"),
    "the way that heads are turned": ("rms_norm", turned_back, "rms_norm: fp16", "outputs"),
    "the order of squares": ("rms_norm", squares_in_order, "rms_norm: fp32", "outputs"),
    "a norm in place": ("rms_norm_", not_in_place, "rms_norm_: bf16", "outputs"),
    "another GELU": ("gelu_", by_erf, "gelu_: bf16", "outputs"),
    "signs of zero in GELU": ("gelu_", positive_zeros, "gelu_: fp16", "outputs"),
    "multipliers before eight bits": ("linear", linear_without_mul_scale, "linear w4a8 mxfp4: K = 96", "outputs"),
}


@pytest.mark.parametrize(("op", "instead", "name", "figure"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_counted_and_shown(op, instead, name, figure):
    with Broken(op, instead):
        result = CASES[name].run()
    assert result.verdict == conformance.FAIL and getattr(result, figure) > 0, result
    if figure == "outputs" and instead not in (unsigned_zeros, positive_zeros):
        assert result.ulps > 0
    assert result.reproducer is not None
    assert_shows(result.reproducer, AssertionError, op, instead)
    assert name in result.reproducer and "0x" in result.reproducer and f"torch.ops.mxdit.{op}(" in result.reproducer
    assert len(result.reproducer) < 20_000 and max(map(len, result.reproducer.splitlines())) < 160


def assert_shows(program: str, error: type[Exception], op: str, instead: Callable[..., Any]) -> None:
    """The program fails while the op is broken, and runs when it is right."""
    with Broken(op, instead), pytest.raises(error):
        exec(program, {})
    exec(program, {})


def test_an_op_that_raises_fails_and_the_others_go_on():
    with Broken("matmul", broken_down):
        result = CASES["matmul w8a8 mxfp8: K = 96"].run()
    assert (result.verdict, result.reason) == (conformance.FAIL, "RuntimeError: kernel died\nat address 7")
    assert result.reproducer is not None and "RuntimeError: kernel died\n# at address 7\n" in result.reproducer
    assert_shows(result.reproducer, RuntimeError, "matmul", broken_down)
    with Broken("linear", as_bf16):
        result = CASES["linear w8a8 mxfp8: K = 96"].run()
    assert result.verdict == conformance.FAIL and "torch.bfloat16 instead of" in result.reason
    with Broken("linear", broken_down):
        result = CASES["Wan block mxfp4, mxfp4 activations"].run()
    assert result.verdict == conformance.FAIL and "kernel died" in result.reason


def test_what_a_device_refuses_is_neither_right_nor_wrong():
    def no_single_rows(*args):
        if len(args[0]) == 1:
            raise mxdit.BackendError("no single rows", where="here", got="M=1")
        return OPS.matmul(*args)

    with Broken("matmul", no_single_rows):
        result = CASES["matmul w4a4 mxfp4: K = 96"].run()
        assert (result.verdict, result.reproducer) == (conformance.REFUSED, None)
        assert result.reason == "6 of 12 calls: here: no single rows; got M=1" and result.elements == 6 * 48 * 80

    def wrong_besides(*args):
        return torch.zeros_like(no_single_rows(*args))

    with Broken("matmul", wrong_besides):
        result = CASES["matmul w4a4 mxfp4: K = 96"].run()
    assert result.verdict == conformance.FAIL and result.reproducer is not None  # not cut down to a single row
    with Broken("matmul", wrong_besides), pytest.raises(AssertionError):
        exec(result.reproducer, {})

    def refuses(*args):
        raise mxdit.BackendError("not this layer")

    with Broken("linear", refuses):
        result = CASES["Wan block mxfp8, mxfp8 activations"].run()
    assert result.verdict == conformance.REFUSED and result.reason.endswith("not this layer")


def test_a_block_shows_the_linear_that_is_wrong():
    def wrong_in_the_middle(x, w, *rest):
        out = OPS.linear(x, w, *rest)
        return torch.cat([out[..., :5], out[..., 5:6] * 1.25, out[..., 6:]], -1) if x.shape[-1] == 576 else out

    for name in ("Wan block mxfp4_dualscale, mxfp4 activations", "Wan block mxfp4, bf16 activations"):
        with Broken("linear", wrong_in_the_middle):
            result = CASES[name].run()
        assert result.verdict == conformance.FAIL and result.outputs > 0
        assert result.reproducer is None or "torch.ops.mxdit.linear(" in result.reproducer
        with Broken("quantize_dual", divided_by_six), Broken("quantize", ties_away):
            result = CASES[name].run()
        assert result.verdict == conformance.FAIL and result.codes + result.scales > 0
        assert result.reproducer is not None and "torch.ops.mxdit.quantize" in result.reproducer


def test_without_diffusers_the_block_is_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    result = CASES["Wan block mxfp4, mxfp4 activations"].run()
    assert result.verdict == conformance.SKIPPED and result.reason.startswith("diffusers is not installed, or ")


# -- what an NPU is granted --------------------------------------------------------------------------------------------


def tally(prefix: str, device: str) -> dict[str, tuple[Finding, bool]]:
    """What the cases' calls find here, and whether that would be accepted of such a device, by kind."""
    found: dict[str, Finding] = {}
    for call in calls_of(prefix):
        found[call.kind] = found.get(call.kind, Finding()) + compare(call, "cpu", acceptance(call.kind, device))
    return {kind: (finding, finding.accepted(acceptance(kind, device))) for kind, finding in found.items()}


def test_quotients_that_are_one_unit_off_are_granted_to_an_npu_alone():
    def one_unit_off(x, l0):
        exact = x.float() / l0
        signs = 2.0 * torch.randint(0, 2, exact.shape) - 1
        off = torch.nextafter(exact, signs * torch.inf)
        return torch.where(exact.abs() < 2.0**-126, exact * 0.0, off).to(x.dtype)

    def operator(x, mul_scale, mode):
        return dual_by(one_unit_off, x, mul_scale, mode)

    for prefix in ("quantize mxfp4_dualscale rint: every bf16", "quantize mxfp4_dualscale: "):
        with Broken("quantize_dual", operator):
            ((finding, accepted),) = tally(prefix, "npu").values()
            assert finding.codes > 0 and not finding.wrong and accepted
            ((_, accepted),) = tally(prefix, "cuda").values()
            assert not accepted
    for instead in (quotient_in_fp32, divided_by_six):
        with Broken("quantize_dual", instead):
            ((_, accepted),) = tally("quantize mxfp4_dualscale: K = 5120", "npu").values()
            assert not accepted


def test_a_level_1_scale_may_move_only_where_a_quotient_decides():
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[:, 0] = 6.0  # level 0 is 1, and what is left of x is x
    x[:, 32] = torch.tensor([2.0, 2.5])
    for row, accepted in ((0, True), (1, False)):

        def smaller(x, mul_scale, mode, row=row):
            codes, l0, l1 = OPS.quantize_dual(x, mul_scale, mode)
            l1[row, 1] -= 1
            return codes, l0, l1

        with Broken("quantize_dual", smaller):
            call = Call("quantize_dual", {"x": x, "mul_scale": None, "round_mode": "rint"})
            finding = compare(call, "cpu", acceptance("dual codes", "npu"))
        assert finding.scales == 1 and (finding.wrong == 0) == accepted


def test_another_order_of_a_sum_is_granted_to_an_npu_alone():
    with Broken("matmul_dual", without_fma):
        prefix = "matmul w4a4 mxfp4_dualscale: Wan"
        ((finding, accepted),) = tally(prefix, "npu").values()
        assert finding.outputs > 0 and finding.ulps == 1 and accepted
        ((_, accepted),) = tally(prefix, "cuda").values()
        assert not accepted
    for instead in (last_group_missing, lambda *args: OPS.matmul_dual(*args) * 1.0079):
        with Broken("matmul_dual", instead):
            assert not any(accepted for _, accepted in tally(prefix, "npu").values())

    def bias_first(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out):
        """The bias in the accumulator before the products, 64 of which are added at a time."""
        left, right = decode_blocks(a, a_scale, FORMATS[a_fmt]), decode_blocks(w, w_scale, FORMATS[w_fmt])
        acc = torch.zeros(len(a), len(w)) + (0.0 if bias is None else bias.float())
        for first in range(0, left.shape[1], 64):
            acc += left[:, first : first + 64] @ right[:, first : first + 64].T
        return acc.to(out)

    with Broken("matmul", bias_first):
        found = tally("matmul w4a4 mxfp4: Wan", "npu")
        assert found["product + bias in fp32"][0].outputs > 0 and all(accepted for _, accepted in found.values())
        assert not tally("matmul w4a4 mxfp4: Wan", "cuda")["product + bias in fp32"][1]
        assert all(accepted for _, accepted in tally("matmul w8a8 mxfp8: Wan", "npu").values())
    for instead in (cut_to_bf16, without_bias):
        with Broken("matmul", instead):
            assert not tally("matmul w4a4 mxfp4: Wan", "npu")["product + bias"][1]
    with Broken("matmul", in_bf16):
        assert not tally("matmul w8a8 mxfp8: Wan", "npu")["fp8 product"][1]


def test_codes_under_a_scale_of_nan_are_granted_to_an_npu_alone():
    with Broken("quantize", nan_codes):
        ((finding, accepted),) = tally("quantize mxfp8: special", "npu").values()
        assert finding.codes == 0 and accepted
        ((finding, accepted),) = tally("quantize mxfp8: special", "cuda").values()
        assert finding.codes > 0 and not accepted


def test_an_emulated_npu_passes_or_refuses(npu):
    for name, case in CASES.items():
        if name.endswith("K = 96"):
            result = case.run("npu")
            expected = conformance.REFUSED if "w4a8 mxfp4:" in name else conformance.PASS
            assert result.verdict == expected, f"{result.reason}\n{result.reproducer}"
    with Broken("matmul", without_bias):
        result = CASES["matmul w4a4 mxfp4: K = 96"].run("npu")
    assert result.reproducer is not None and 'bias.to("npu")' in result.reproducer
    assert_shows(result.reproducer, AssertionError, "matmul", without_bias)


def test_what_a_backend_leaves_to_the_reference_is_skipped(npu):
    """Ascend's has no attention, norm, GELU or decoding; that the reference agrees with itself is no pass."""
    left = [name for name in CASES if name.startswith(("attention", "rms_norm", "gelu_", "dequantize"))]
    for name in left:
        result = CASES[name].run("npu")
        assert (result.verdict, result.elements) == (conformance.SKIPPED, 0)
        assert result.reason == f"the device's backend has no {name.split()[0].strip(':')}: the reference answers"
    assert {CASES[name].calls(generator(name)).__next__().op for name in left} == {
        "attention",
        "rms_norm",
        "rms_norm_",
        "gelu_",
        "dequantize",
    }


def test_the_table_in_the_docs_is_the_table_in_the_code():
    text = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text()
    from mxdit.conformance import acceptance as module

    names = {row.name for row in vars(module).values() if isinstance(row, module.Acceptance)}
    table = text[text.index("### 8.1") : text.index("## 9.")]
    assert names and all(f"| `{name}` |" in table for name in names)
    for kind in (*module._EVERYWHERE, *module._GRANTED["npu"]):
        assert f"| {kind} |" in table, kind


# -- the command -------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    return mxdit_command(monkeypatch, capsys, "conformance", *args)


def test_what_was_found_is_in_the_file_whatever_comes_after(monkeypatch, capsys, tmp_path):
    class Ended(BaseException):
        pass

    def ends(*args):
        raise Ended

    with Broken("matmul_dual", ends), pytest.raises(Ended):
        command(monkeypatch, capsys, "--only", "K = 96", "--json", tmp_path / "cpu.json")
    found = json.loads((tmp_path / "cpu.json").read_text())["items"]
    assert found[0]["name"] == "matmul w4a4 mxfp4: K = 96" and found[0]["verdict"] == conformance.PASS


def test_a_table_a_file_and_code_0(monkeypatch, capsys, tmp_path):
    file = tmp_path / "cpu.json"
    code, out, _ = command(monkeypatch, capsys, "--only", "w8a8", "--json", file)
    assert code == 0
    names = [name for name in CASES if "w8a8" in name]
    assert len(names) == 4 and all(f"\n{name} " in out for name in names)
    assert (
        f"mxdit {mxdit.__version__}" in out and f"torch {torch.__version__}" in out and "torch_npu not installed" in out
    )
    assert "4 items on cpu: 4 pass, 0 fail, 0 refused, 0 skipped" in out
    figures = json.loads(file.read_text())
    assert figures["schema"] == 1 and figures["seconds"] > 0
    assert [item["name"] for item in figures["items"]] == names
    assert all(item["accepted"] == ["sum"] and item["elements"] > 1000 for item in figures["items"])
    assert figures["totals"] == {
        **{"items": 4, "pass": 4, "fail": 0, "refused": 0, "skipped": 0},
        "elements": sum(item["elements"] for item in figures["items"]),
    }
    where = figures["environment"]
    assert (where["device"], where["packages"]["mxdit"]) == ("cpu", mxdit.__version__)
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_prints_its_program_and_exits_with_1(monkeypatch, capsys, tmp_path):
    with Broken("matmul", without_bias):
        code, out, _ = command(monkeypatch, capsys, "--only", "K = 96", "--json", tmp_path / "cpu.json")
    assert code == 1
    items = json.loads((tmp_path / "cpu.json").read_text())["items"]
    failed = [item for item in items if item["verdict"] == "fail"]
    assert [item["name"] for item in failed] == [
        name for name in CASES if "K = 96" in name and "dual" not in name and "matmul" in name
    ]
    for item in failed:
        assert item["reproducer"] in out and f"fail: {item['name']}: not {item['accepted'][0]}: " in out
        assert_shows(item["reproducer"], AssertionError, "matmul", without_bias)


def test_who_answered_is_said(monkeypatch, capsys, path):
    code, out, _ = command(monkeypatch, capsys, "--only", "dequantize mxfp8")
    assert code == 0
    if path == "reference":
        assert "reference (torch) answers: plain torch" in out
        assert "cpu (native) does not answer: the reference was chosen" in out
    else:
        assert f"cpu (native) answers: path {path}" in out


BAD = {
    "a device that is not here": (["--device", "npu"], "--device"),
    "a device that is none": (["--device", "gpu"], "--device"),
    "a device without data": (["--device", "meta"], "--device"),
    "no such item": (["--only", "mxfp5"], "--only"),
    "a file in no directory": (["--json", "none/a.json"], "does not exist"),
    "a file that is a directory": (["--json", "."], "is a directory"),
    "a file on a file system that takes none": (["--json", "/proc/a.json"], "cannot be written"),
}


@pytest.mark.parametrize(("args", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_code_2_before_any_work(monkeypatch, capsys, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Case, "run", None)
    code, out, err = command(monkeypatch, capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_device_whose_backend_refuses_everything_is_no_device(monkeypatch, capsys):
    def refuses(*args):
        raise mxdit.BackendError("no kernels here", where="cpu")

    with Broken("quantize", refuses):
        code, out, err = command(monkeypatch, capsys)
    assert (code, out, err) == (2, "", "error: cpu: no kernels here\n")
