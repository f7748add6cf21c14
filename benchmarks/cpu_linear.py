"""How fast the CPU kernels are beside torch, and whether that is as fast as required.

Calls of torch's baseline and of mxdit alternate, so that both see the same machine; where one takes long (large, block), a
round is one call of the baseline and one of every mode. Ratios are baseline over mxdit, of the medians and of the minima of
all rounds; the medians' is held against what is required. A linear runs whole: bf16 activations, quantized on the fly, to a
bf16 result, bias included. Weights rotate through copies that together exceed the last-level cache four times, so that they
come from memory; the mini model's, which fit, through one copy per block of it. Activations are gaussian, or "outliers":
channels log-normal with sigma 1 and 0.5 % of them times 50, so that the block scales of a row spread over many binades.

Results are checked in the same run: four-bit products on 32 rows, bit for bit, on every instruction set path against the
reference; the others against the exact product, to the rounding of the result.

    python benchmarks/cpu_linear.py [--case large small ...] [--quick] [--threads 2] [--json FILE]
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2  # before the case avx2

    large     M=2048 in the layer shapes of Wan2.2-A14B
    small     M=1, 4, 16, 32, where the weight's bytes are what counts
    quantize  bf16 to mxfp4, beside a copy of its input
    encoder   weights alone quantized, in the layer shapes of UMT5-XXL: M=512, all that Wan gives it, and M=1; beside bf16 and
              fp32
    vnni      the AVX512-VNNI path on one thread, beside fp32
    avx2      the AVX2 path on one thread: M=256 to 2048 beside fp32, M=1 beside ggml's MXFP4 where the package ggml-python is
              (ggml_product.py); seconds of the thread, not of the clock
    block     a whole Wan2.2-A14B block over 1024 tokens in every mode, and what its weights take
    mini      the layer shapes of the bundled mini model, as modules, and one of its blocks
    overhead  of one call, as modules

Prints Markdown. Exits with 1 when a ratio misses what is required or a result is wrong.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import ggml_product
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mxdit
from mxdit.backends import native
from mxdit.bench.modes import MODES
from mxdit.bench.shapes import A14B, MINI, TEXT_ENCODER, TEXT_TOKENS, Wan
from mxdit.bench.standins import block_inputs, quantized, random_block
from mxdit.bench.timing import Call, alternate, caches, rotated
from mxdit.layers import MXLinear

W4A4 = ("mxfp4", "mxfp4_dualscale")
GAUSSIAN, OUTLIERS = KINDS = ("gaussian", "outliers")
VNNI, AVX2 = "avx512vnni", "avx2"
SAMPLE = 32  # rows that are checked
COLUMNS = (
    "case", "mode", "x", "path, threads", "mxdit (min)", "against", "that (min)", "ratio", "of minima", "required", "",
)  # fmt: skip

Rounds = Callable[[int], int]  # from the full measure's rounds to this run's
Calls = list[Callable[[], object]]  # the same over different copies
Clock = Callable[[], float]
Measure = Callable[[str, Calls, list[tuple["Row", Calls]], int], list["Row"]]


@dataclass
class Row:
    """One comparison: what is compared, then seconds (bytes where there are no rounds)."""

    case: str
    mode: str
    x: str
    required: float | None  # of the ratio: at least, or for bytes at most
    equal: bool | None  # whether the results were right; None where none were checked
    against: str = ""
    path: str = ""
    threads: int = 0
    rounds: int = 0
    ours: float = 0.0
    ours_min: float = 0.0
    theirs: float = 0.0
    theirs_min: float = 0.0
    ratio: float = 0.0
    ratio_min: float | None = None
    ok: bool = True


# -- measuring -----------------------------------------------------------------------------------------------------------


def measure(
    against: str, baseline: Calls, ours: list[tuple[Row, Calls]], rounds: int, clock: Clock = time.perf_counter
) -> list[Row]:
    """Fill in the rows from rounds of one call of the baseline and one for each row."""

    def timed(call: Call) -> float:
        started = clock()
        call()
        return clock() - started

    theirs, *times = alternate([baseline, *(calls for _, calls in ours)], rounds, timed)
    for (row, _), mine in zip(ours, times, strict=True):
        row.against, row.path, row.threads, row.rounds = against, native.selected(), torch.get_num_threads(), rounds
        row.ours, row.ours_min = statistics.median(mine), min(mine)
        row.theirs, row.theirs_min = statistics.median(theirs), min(theirs)
        row.ratio, row.ratio_min = row.theirs / row.ours, row.theirs_min / row.ours_min
        row.ok = row.equal is not False and (row.required is None or row.ratio >= row.required)
    return [row for row, _ in ours]


def measure_pairs(
    against: str, baseline: Calls, ours: list[tuple[Row, Calls]], rounds: int, clock: Clock = time.perf_counter
) -> list[Row]:
    """The same with rounds of its own for each row: a short call is the faster, the more its predecessor was like it."""
    return [row for one in ours for row in measure(against, baseline, [one], rounds, clock)]


def everywhere(call: Callable[[], object]) -> list:
    """What a call returns on every instruction set path, and the reference's answer last."""
    answers = []
    for path in (*native.paths(), native.REFERENCE):
        with native.using(path):
            answers.append(call())
    return answers


def spread(count: int, of: int) -> Tensor:
    """Indices of that many rows, first and last included."""
    return torch.linspace(0, of - 1, min(count, of)).long()


# -- a linear ------------------------------------------------------------------------------------------------------------


class Linears:
    """One (K, N) linear and what mxdit makes of it, in rotating copies."""

    def __init__(self, k: int, n: int, dtype: torch.dtype = torch.bfloat16, count: int | None = None) -> None:
        self.k, self.n, self.count = k, n, count
        self.source = nn.Linear(k, n, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
        self.source.weight.normal_(std=0.02)
        self.source.bias.normal_()
        self.plain = rotated(copy.deepcopy(self.source).to(dtype), count)
        self.packed: dict[str, list[MXLinear]] = {}

    def mode(self, name: str) -> list[MXLinear]:
        """The copies in that mode; those that differ in the activation only share their weights."""
        method, activation = MODES[name]
        if method not in self.packed:
            first = MXLinear.from_weight(self.source.weight, self.source.bias, method=method)
            self.packed[method] = rotated(first, self.count)
        layers = [copy.copy(layer) for layer in self.packed[method]]
        for layer in layers:
            layer.activation = activation
        return layers

    def compare(
        self,
        case: str,
        m: int,
        wanted: Iterable[tuple[str, str, float | None]],
        rounds: int,
        *,
        how: Measure = measure_pairs,
        modules: bool = False,
    ) -> list[Row]:
        """M rows in each (mode, kind of activations, ratio required); `modules`: called as modules, with their overhead."""
        xs = {kind: activations(kind, m, self.k) for kind in KINDS}
        case, ours = f"{case}, M={m}, ({self.k}, {self.n})", []
        for mode, kind, required in wanted:
            layers, x = self.mode(mode), xs[kind]
            row = Row(case, mode, kind, required, is_right(layers[0], x))
            ours.append((row, [partial(layer, x) if modules else operator(layer, x) for layer in layers]))
        dtype = self.plain[0].weight.dtype
        x = xs[GAUSSIAN].to(dtype)
        baseline: Calls = [
            partial(other, x) if modules else partial(F.linear, x, other.weight, other.bias) for other in self.plain
        ]
        return how(f"torch {str(dtype).removeprefix('torch.')} linear", baseline, ours, rounds)


def activations(kind: str, m: int, k: int) -> Tensor:
    x = torch.randn(m, k)
    if kind == OUTLIERS:
        x *= torch.randn(k).exp() * torch.where(torch.rand(k) < 0.005, 50.0, 1.0)
    return x.bfloat16()


def operator(layer: MXLinear, x: Tensor) -> Callable[[], Tensor]:
    """A call of torch.ops.mxdit.linear on what the layer holds."""
    outer = None if layer.weight_dual_scale is None else layer.weight_dual_scale.squeeze(-1)
    rule = layer.rule if layer.activation == "mxfp4" else "ocp"
    weight = (layer.weight, layer.weight_scale, outer, None, layer.bias)
    return partial(torch.ops.mxdit.linear, x, *weight, layer.scheme, rule, "packed")


def is_right(layer: MXLinear, x: Tensor) -> bool:
    """Whether sampled rows of the whole result are what the module's docstring says."""
    rows, columns = spread(SAMPLE, len(x)), spread(256, layer.out_features)
    got = operator(layer, x)()[rows]
    if layer.activation == "mxfp4":
        return all(torch.equal(got, answer) for answer in everywhere(operator(layer, x[rows])))
    weight = mxdit.decode(mxdit.Packed(layer.weight[columns], layer.weight_scale[columns], None, layer.method))
    left = x[rows] if layer.activation == "bf16" else mxdit.decode(mxdit.encode(x[rows], "mxfp8"))
    exact = left.double() @ weight.double().T + layer.bias[columns].double()
    return torch.allclose(got[:, columns].double(), exact, rtol=torch.finfo(got.dtype).eps, atol=1e-4)


# -- a block -------------------------------------------------------------------------------------------------------------


def compare_blocks(
    wan: Wan, tokens: int, required: float | None, rounds: int, how: Measure = measure_pairs
) -> list[Row]:
    """A block of random weights over that many tokens, in every mode; and what the weights take."""
    plain = random_block(wan)
    x, text, temb, rotary = block_inputs(wan, tokens)
    few = (x[:, :SAMPLE], text[:, :SAMPLE], temb, tuple(part[:, :SAMPLE] for part in rotary))

    case, linears = f"block, d={wan.dim}", [m for m in plain.modules() if isinstance(m, nn.Linear)]
    size = sum(linear.weight.nbytes for linear in linears)
    ours, weights = [], []
    for mode in MODES:
        block = quantized(plain, *MODES[mode])
        row = Row(f"{case}, M={tokens}", mode, "the block's", required, None)
        if mode in W4A4:
            *answers, expected = everywhere(partial(block, *few))
            row.equal = all(torch.equal(answer, expected) for answer in answers)
            mine = sum(buffer.nbytes for buffer in block.buffers())
            numbers = {"ours": mine, "theirs": size, "ratio": mine / size, "ok": mine <= 0.28 * size}
            weights.append(Row(f"{case}: weights", mode, "", 0.28, None, "bfloat16", **numbers))
        ours.append((row, [partial(block, x, text, temb, rotary)]))
    return how("the block in bfloat16", [partial(plain, x, text, temb, rotary)], ours, rounds) + weights


# -- the cases -----------------------------------------------------------------------------------------------------------


def large(rounds: Rounds) -> list[Row]:
    wanted = [(mode, kind, least) for mode, least in (("mxfp4", 1.3), ("mxfp4_dualscale", 1.2)) for kind in KINDS]
    wanted += [("mxfp8", GAUSSIAN, 0.9), ("w4a16", GAUSSIAN, 0.9)]
    shapes = dict.fromkeys((layer.k, layer.n) for layer in (*A14B.layers, A14B.qkv))
    return [row for shape in shapes for row in Linears(*shape).compare("linear", 2048, wanted, rounds(20), how=measure)]


def small(rounds: Rounds) -> list[Row]:
    wanted = [(mode, kind, 3.0) for mode in W4A4 for kind in KINDS]
    linears = Linears(A14B.dim, A14B.dim)
    return [row for m in (1, 4, 16, 32) for row in linears.compare("linear", m, wanted, rounds(100))]


def encoder(rounds: Rounds) -> list[Row]:
    wanted = [(mode, GAUSSIAN, None) for mode in ("w8a16", "w4a16")]
    d, f = TEXT_ENCODER["d_model"], TEXT_ENCODER["d_ff"]
    rows = []
    for k, n in ((d, d), (d, f), (f, d)):
        for dtype in (torch.bfloat16, torch.float32):
            linears = Linears(k, n, dtype)
            for m, full in ((TEXT_TOKENS, 20), (1, 60)):
                rows += linears.compare("encoder", m, wanted, rounds(full), how=measure)
    return rows


def quantize(rounds: Rounds) -> list[Row]:
    m, k = 8192, A14B.dim
    inputs = rotated(activations(GAUSSIAN, m, k))
    sample, encode = spread(SAMPLE, m), partial(torch.ops.mxdit.quantize, fmt="mxfp4", rule="uos", round_mode="rint")
    codes, scale = (part[sample] for part in encode(inputs[0]))
    answers = everywhere(partial(encode, inputs[0][sample]))
    equal = all(torch.equal(codes, c) and torch.equal(scale, s) for c, s in answers)
    baseline: Calls = [partial(torch.zeros_like(x).copy_, x) for x in inputs]
    row = Row(f"quantize, M={m}, K={k}", "mxfp4", GAUSSIAN, 0.75, equal)
    return measure("copy of the input", baseline, [(row, [partial(encode, x) for x in inputs])], rounds(100))


def vnni(rounds: Rounds) -> list[Row]:
    if VNNI not in native.paths():
        return []
    threads, linears = torch.get_num_threads(), Linears(A14B.dim, A14B.dim, torch.float32)
    torch.set_num_threads(1)
    with native.using(VNNI):
        rows = linears.compare("linear", 512, [("mxfp4", kind, 2.0) for kind in KINDS], rounds(20))
    torch.set_num_threads(threads)
    return rows


def avx2(rounds: Rounds) -> list[Row]:
    if AVX2 not in native.paths():
        return []
    threads, linears = torch.get_num_threads(), Linears(A14B.dim, A14B.dim, torch.float32)
    how = partial(measure_pairs, clock=time.thread_time)
    torch.set_num_threads(1)
    with native.using(AVX2):
        wanted = [("mxfp4", kind, 2.0) for kind in KINDS]
        rows = [row for m in (256, 512, 2048) for row in linears.compare("linear", m, wanted, rounds(10), how=how)]
        rows += beside_ggml(linears, rounds(200), how)
    torch.set_num_threads(threads)
    return rows


def beside_ggml(linears: Linears, rounds: int, how: Measure) -> list[Row]:
    """One row of activations, the same codes on both sides; nothing where there is no ggml."""
    if not ggml_product.found():
        print("ggml-python is not installed: M=1 is not compared with ggml", file=sys.stderr)
        return []
    x = activations(GAUSSIAN, 1, linears.k)
    layers = linears.mode("mxfp4")
    products = [ggml_product.Product(layer.weight, layer.weight_scale, x) for layer in layers]
    exact = x.double() @ mxdit.decode(mxdit.Packed(layers[0].weight, layers[0].weight_scale, None, "mxfp4")).double().T
    error = float((products[0]() - exact).norm() / exact.norm())  # of activations in eight bits
    row = Row(
        f"linear, M=1, ({linears.k}, {linears.n})", "mxfp4", GAUSSIAN, 1.0, is_right(layers[0], x) and error < 0.01
    )
    return how(ggml_product.name(), list(products), [(row, [operator(layer, x) for layer in layers])], rounds)


def block(rounds: Rounds) -> list[Row]:
    return compare_blocks(A14B, 1024, None, rounds(7), measure)


def mini(rounds: Rounds) -> list[Row]:
    wanted = [(mode, kind, 1.0) for mode in MODES for kind in KINDS if mode in W4A4 or kind == GAUSSIAN]
    rows = []
    for m, layer in MINI.gemms(MINI.tokens("64 x 64")):
        linears = Linears(layer.k, layer.n, count=MINI.blocks)
        rows += linears.compare("mini", m, wanted, rounds(400), modules=True)
    return rows + compare_blocks(MINI, 80, 1.0, rounds(200))


def overhead(rounds: Rounds) -> list[Row]:
    wanted = [(mode, GAUSSIAN, None) for mode in MODES]
    return Linears(64, 64, count=1).compare("overhead", 1, wanted, rounds(2000), modules=True)


CASES = {case.__name__: case for case in (large, small, encoder, quantize, vnni, avx2, block, mini, overhead)}


# -- what is printed -----------------------------------------------------------------------------------------------------


def machine(threads: int) -> dict:
    info = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in (info.read_text() if info.is_file() else "").splitlines())
    told = {key.strip(): value.strip() for key, _, value in lines}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": told.get("model name") or platform.machine(),
        "family": f"{told.get('cpu family', '?')}, {told.get('model', '?')}",
        "flags": [
            flag
            for flag in (told.get("flags") or told.get("Features", "")).split()
            if re.match(r"avx|amx|fma$|asimd|i8mm|sve", flag)
        ],
        "cores": os.cpu_count(),
        "caches": caches(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "path": native.selected(),
        "paths": native.paths(),
        "mxdit": mxdit.__version__,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def caption(about: dict, quick: bool) -> str:
    sizes = ", ".join(f"{level} {size >> 10} KiB" for level, size in about["caches"].items()) or "caches unknown"
    parts = [
        "{date}: {cpu} (family, model {family}), {cores} cores, ".format(**about) + sizes,
        "; load {load} before the run; {threads} threads; mxdit {mxdit}, path {path}".format(**about),
        f" of {', '.join(about['paths'])}; torch {about['torch']}, capability {about['torch_capability']}.",
        f" Flags: {' '.join(about['flags'])}.",
    ]
    if "amx" not in about["paths"]:
        parts.append(f"\nThere is no AMX path here: what is required of one is held against {about['path']}.")
    if VNNI not in about["paths"]:
        parts.append(f"\nThere is no {VNNI} path here: the case vnni is left out.")
    if quick:
        parts.append("\n**Quick: a twentieth of the rounds. This is not the full measure.**")
    return "".join(parts)


def table(rows: list[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        verdict = "wrong result" if row.equal is False else "missed" if not row.ok else "ok" if row.required else ""
        if row.rounds:
            path, bound = f"{row.path}, {row.threads}", "at least"
            ours, theirs = (
                f"{milliseconds(value)} ({milliseconds(least)}) ms"
                for value, least in ((row.ours, row.ours_min), (row.theirs, row.theirs_min))
            )
        else:
            path, bound = "", "at most"
            ours, theirs = (f"{value / 1e6:.3g} MB" for value in (row.ours, row.theirs))
        ratio, of_minima = (f"{value:.3f}" if value else "" for value in (row.ratio, row.ratio_min))
        limit = "" if row.required is None else f"{bound} {row.required:g}"
        lines.append((row.case, row.mode, row.x, path, ours, row.against, theirs, ratio, of_minima, limit, verdict))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rounds: a look, not the measure")
    parser.add_argument("--threads", type=int, default=2, help="of torch and mxdit alike (default: 2)")
    parser.add_argument("--json", type=Path, help="write the numbers and the machine there as well")
    args = parser.parse_args()
    if native.selected() == native.REFERENCE:
        parser.error(f"nothing to measure: {native.why_not()}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about, started, rows = machine(args.threads), time.monotonic(), []
    print(caption(about, args.quick), end="\n\n", flush=True)
    for name in args.case:
        rows += CASES[name](lambda full: max(1, full // 20) if args.quick else full)
        print(f"{name}: done after {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(table(rows))
    about["seconds"] = round(time.monotonic() - started)
    checks, missed = [row.equal for row in rows if row.equal is not None], sum(not row.ok for row in rows)
    print(f"\n{sum(checks)} of {len(checks)} checked results right, {missed} rows not ok, {about['seconds']} s.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"quick": args.quick, "machine": about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
