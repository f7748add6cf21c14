"""How fast the CUDA backend's four-bit linears are beside cuBLAS, by every route, and whether that is as fast as required.

In each round every call is made once: torch's bf16 linear, the whole linear (bf16 activations, quantized on the fly, to a bf16
result, bias included) by each route, and the parts of the int8 route. Times are the device's own, its cache emptied before each
call. Ratios are of the medians. Activations are gaussian, or "outliers": channels log-normal with sigma 1 and 0.5 % of them
times 50, so that fewer rows can be folded; "folds" is the share of (tile, tile) pairs that go by int8.

Results are checked in the same run: sampled rows and columns against the reference on the CPU, four-bit products bit for bit, the
others within docs/numerics.md section 8.1.

    python benchmarks/gpu_linear.py [--device cuda] [--quick] [--tiles] [--rounds 20] [--json FILE]

    --quick   the seed benchmark's product only (M=19800, K=5120, N=15360)
    --tiles   that product, whole, by the int8 route in several tilings, warps and stages, to choose `triton_matmul.INTEGERS`
              by; ratios are to the first one

Prints Markdown. Exits with 1 when a ratio misses what is required or a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdit.backends import cuda
from mxdit.bench.gemm import Linear, is_right
from mxdit.bench.record import report
from mxdit.bench.shapes import A14B, SEED
from mxdit.bench.timing import Call, Times, alternate, timer
from mxdit.errors import MXDiTError
from mxdit.layers import MXLinear

REQUIRED_SEED, REQUIRED = 1.4, 1.3  # times cuBLAS's bf16, by the default route
GAUSSIAN, OUTLIERS = "gaussian", "outliers"
TILINGS = (  # rows, columns, K at once, warps, stages
    (128, 128, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 64, 8, 4), (128, 128, 128, 4, 3), (128, 64, 128, 4, 4), (128, 256, 128, 8, 3),
    (256, 128, 128, 8, 3), (256, 128, 128, 16, 3), (64, 128, 128, 4, 4),
)  # fmt: skip


@dataclass
class Row:
    """One call, and how it compares."""

    product: str
    x: str
    call: str
    times: Times
    operations: int
    ratio: float
    required: float | None = None
    right: bool | None = None
    folds: float | None = None

    @property
    def ok(self) -> bool:
        return self.right is not False and (self.required is None or self.ratio >= self.required)


@contextmanager
def by(route: str) -> Iterator[None]:
    """Products go that way inside."""
    before = os.environ.get(cuda.VARIABLE)
    os.environ[cuda.VARIABLE] = route
    try:
        yield
    finally:
        os.environ.pop(cuda.VARIABLE) if before is None else os.environ.update({cuda.VARIABLE: before})


def activations(m: int, k: int, kind: str, device: torch.device) -> Tensor:
    """(M, K) bf16."""
    x = torch.randn(m, k, device=device)
    if kind == OUTLIERS:
        x *= torch.randn(k, device=device).exp()
        x *= torch.where(torch.rand(k, device=device) < 0.005, 50.0, 1.0)
    return x.bfloat16()


def share_that_folds(a_base: Tensor, w_base: Tensor, tile_m: int, tile_n: int) -> float:
    """Of all pairs of a tile of rows and a tile of columns, those where every row has a base in every group."""
    shares = [
        torch.stack([part.all() for part in (base > 0).split(size)]).float().mean()
        for base, size in ((a_base, tile_m), (w_base, tile_n))
    ]
    return float(shares[0] * shares[1])


def routed(route: str, layer: MXLinear, x: Tensor) -> Tensor:
    with by(route):
        return layer(x)


@torch.inference_mode()
def measure(m: int, k: int, n: int, kind: str, required: float | None, device: torch.device, rounds: int) -> list[Row]:
    """All rows of one product."""
    from mxdit.backends import triton_codec, triton_matmul

    linear, x = Linear(k, n, device), activations(m, k, kind, device)
    plain, single, dual = linear.plain[0], linear.mode("mxfp4")[0], linear.mode("mxfp4_dualscale")[0]
    codes, scale = torch.ops.mxdit.quantize(x, "mxfp4", "uos", "rint")
    weight, weight_scale = single.weight, single.weight_scale
    a_base, w_base = triton_codec.fold(codes, scale, k)[1], triton_codec.fold(weight, weight_scale, k)[1]
    folds = share_that_folds(a_base, w_base, triton_matmul.INTEGERS["tile_m"], triton_matmul.INTEGERS["tile_n"])
    routes = ["int8", "bf16"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= cuda.BLACKWELL:
        routes.append("fp4")
    calls: dict[str, Call] = {"torch bf16": partial(F.linear, x, plain.weight, plain.bias)}
    for route in routes:
        calls[f"mxfp4, {route}"] = partial(routed, route, single, x)
        calls[f"mxfp4_dualscale, {route}"] = partial(routed, route, dual, x)
    calls["quantize x"] = partial(torch.ops.mxdit.quantize, x, "mxfp4", "uos", "rint")
    calls["fold x"] = partial(triton_codec.fold, codes, scale, k)
    calls["fold w"] = partial(triton_codec.fold, weight, weight_scale, k)
    for method in ("mxfp8", "w4a8", "w4a16", "w8a16"):
        calls[method] = partial(linear.mode(method)[0], x)
    right = {
        name: is_right(layer, call(), x)
        for name, call in calls.items()
        if (layer := _layer(name, linear, single, dual))
    }
    seconds = alternate([[call] for call in calls.values()], rounds, timer(device))
    times = {name: Times.of(taken) for name, taken in zip(calls, seconds, strict=True)}
    baseline = times["torch bf16"].median
    return [
        Row(
            f"M={m} K={k} N={n}",
            kind,
            name,
            taken,
            0 if name.split()[0] in ("quantize", "fold") else 2 * m * n * k,
            baseline / taken.median,
            required if name == "mxfp4, int8" else None,
            right.get(name),
            folds if name.endswith("int8") else None,
        )
        for name, taken in times.items()
    ]


def _layer(name: str, linear: Linear, single: MXLinear, dual: MXLinear) -> MXLinear | None:
    """What a call is a whole linear of."""
    if name in ("mxfp8", "w4a8", "w4a16", "w8a16"):
        return linear.mode(name)[0]
    return {"mxfp4": single, "mxfp4_dualscale": dual}.get(name.partition(",")[0])


@torch.inference_mode()
def tilings(m: int, k: int, n: int, device: torch.device, rounds: int) -> list[Row]:
    """The int8 product of that size in each of `TILINGS`; one that does not compile or fit is said on stderr."""
    from triton.errors import TritonError

    from mxdit.backends import triton_matmul

    layer, x = Linear(k, n, device).mode("mxfp4")[0], activations(m, k, GAUSSIAN, device)
    before, rows = dict(triton_matmul.INTEGERS), []
    for tile_m, tile_n, width, warps, stages in TILINGS:
        triton_matmul.INTEGERS.update(tile_m=tile_m, tile_n=tile_n, step=width, num_warps=warps, num_stages=stages)
        triton_matmul.FLOATS.update(tile_m=min(128, tile_m), tile_n=min(128, tile_n))
        name = f"{tile_m} x {tile_n} x {width}, {warps} warps, {stages} stages"
        try:
            right = is_right(layer, routed("int8", layer, x), x)
            times = Times.of(alternate([[partial(routed, "int8", layer, x)]], rounds, timer(device))[0])
            rows.append(Row(f"M={m} K={k} N={n}", GAUSSIAN, name, times, 2 * m * n * k, 1.0, None, right))
        except (TritonError, RuntimeError) as error:  # of the compiler, of ptxas, of the driver
            print(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    triton_matmul.INTEGERS.update(before)
    triton_matmul.FLOATS.update(tile_m=before["tile_m"], tile_n=before["tile_n"])
    for row in rows:
        row.ratio = rows[0].times.median / row.times.median
    return rows


def show(rows: Sequence[Row]) -> None:
    print("| product | x | call | median ms | min | IQR | TFLOP/s | x bf16 | required | folds | right |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for row in rows:
        t, flops = row.times, row.operations / row.times.median / 1e12
        cells = [
            row.product,
            row.x,
            row.call,
            f"{t.median * 1e3:.3f}",
            f"{t.minimum * 1e3:.3f}",
            f"{t.spread * 1e3:.3f}",
        ]
        cells += [
            f"{flops:.0f}" if flops else "-",
            f"{row.ratio:.2f}",
            "-" if row.required is None else f"{row.required}",
        ]
        cells += ["-" if row.folds is None else f"{row.folds:.0%}", {True: "yes", False: "NO", None: "-"}[row.right]]
        print(f"| {' | '.join(cells)} |" + ("" if row.ok else " **missed**"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    reason = cuda.why_not(device.index or 0)
    if reason:
        print(f"error: the CUDA backend does not answer here: {reason}", file=sys.stderr)
        return 2
    print(f"{cuda.about(device.index or 0)}\n")
    rows: list[Row] = []
    if args.tiles:
        rows = tilings(*SEED, device, args.rounds)
    else:
        products = [(*SEED, REQUIRED_SEED)]
        if not args.quick:
            for clip in ("480p", "720p"):
                for m, layer in A14B.gemms(A14B.tokens(clip)):
                    products.append((m, layer.k, layer.n, None if layer.on_text else REQUIRED))
        for m, k, n, required in dict.fromkeys(products):
            rows += measure(m, k, n, GAUSSIAN, required, device, args.rounds)
        rows += measure(*SEED, OUTLIERS, None, device, args.rounds)
    show(rows)
    if args.json:
        settings: dict[str, Any] = {"rounds": args.rounds, "quick": args.quick, "tiles": args.tiles}
        figures = [asdict(row) | {"ok": row.ok} for row in rows]
        args.json.write_text(json.dumps(report("gpu_linear", args.device, settings, figures), indent=1) + "\n")
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MXDiTError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
