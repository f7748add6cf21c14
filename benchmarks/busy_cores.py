"""What products cost while other programs use the cores, beside what they cost alone, in one run.

A neighbour is a loop that never ends, one pinned to each core this process may use. Neighbours are stopped and continued
by signals, so that bursts of calls alone and beside them alternate. A linear runs whole: BF16 activations, quantized on the
way; torch's own linear stands beside it.

    python benchmarks/busy_cores.py [--seconds 0.2] [--rounds 5] [--neighbours 1] [--threads 2]

Prints Markdown. Alone is the median of all calls; beside neighbours it is the mean, for what neighbours cost falls on few
calls. A core with one neighbour gives half of its time, so that 2 is the least ratio to be had. It says what the machine
did before the run: on a machine that is busy already, alone is not alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

import mxdit
from mxdit.backends import native
from mxdit.backends.threads import usable_threads
from mxdit.bench.modes import CARRIERS, baseline
from mxdit.layers import MXLinear

PRODUCTS = (
    (80, 256, 256),
    (512, 256, 256),
    (16, 5120, 5120),
    (512, 5120, 5120),
)  # M, K, N: the bundled model's and Wan's
POLICIES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LOOP = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
SETTLE = 0.05  # seconds after a signal, before calls count


@contextmanager
def neighbours(each: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """That many on each core, stopped."""
    started = []
    try:
        for core in sorted(os.sched_getaffinity(0)) * each:
            started.append(subprocess.Popen([sys.executable, "-S", "-c", LOOP, str(core)]))
            started[-1].send_signal(signal.SIGSTOP)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def burst(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, for at least that long."""
    taken, end = [], time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return taken


def linears(m: int, k: int, n: int) -> dict[str, Callable[[], object]]:
    """The same product by torch and by mxdit."""
    name = baseline("cpu")
    weight, bias, x = torch.randn(n, k).bfloat16(), torch.randn(n).bfloat16(), torch.randn(m, k).bfloat16()
    own = [tensor.to(CARRIERS[name]) for tensor in (x, weight, bias)]
    calls: dict[str, Callable[[], object]] = {f"torch {name}": partial(F.linear, *own)}
    for method in ("mxfp4", "mxfp8"):
        calls[method] = partial(MXLinear.from_weight(weight, bias, method=method), x)
    return calls


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a burst")
    parser.add_argument("--rounds", type=int, default=5, help="bursts of each kind")
    parser.add_argument("--neighbours", type=int, default=1, help="on each core")
    parser.add_argument("--threads", type=int, help="instead of torch's own number")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    set_here = ", ".join(f"{name}={os.environ[name]}" for name in POLICIES if name in os.environ) or "none"
    print(
        f"{cores} cores, {usable_threads()} threads, {given.neighbours} neighbours a core; load before the run {load:.1f};"
    )
    print(
        f"mxdit {mxdit.__version__}, path {native.selected()}, torch {torch.__version__}; of {', '.join(POLICIES)}: {set_here}\n"
    )
    print(
        "| M, K, N | by | alone, median us | beside neighbours, mean us | times | their median us |\n|---|---|---:|---:|---:|---:|"
    )
    with neighbours(given.neighbours) as others:
        for product in PRODUCTS:
            calls = linears(*product)
            alone: dict[str, list[float]] = {name: [] for name in calls}
            beside: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(given.rounds):
                for name, call in calls.items():
                    for taken, to_send in ((alone, signal.SIGSTOP), (beside, signal.SIGCONT)):
                        for other in others:
                            other.send_signal(to_send)
                        time.sleep(SETTLE)
                        taken[name] += burst(call, given.seconds)
                    for other in others:
                        other.send_signal(signal.SIGSTOP)
            for name in calls:
                one, many = statistics.median(alone[name]), statistics.fmean(beside[name])
                times = f"{one * 1e6:.0f} | {many * 1e6:.0f} | {many / one:.1f} | {statistics.median(beside[name]) * 1e6:.0f}"
                print(f"| {', '.join(map(str, product))} | {name} | {times} |", flush=True)


if __name__ == "__main__":
    main()
