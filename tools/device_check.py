"""What somebody with a GPU or an NPU runs before anything else: whether mxdit is right there, how fast, and a report to send.

    python tools/device_check.py [--device cuda] [--budget 480] [--output device_check.json]

In at most ``--budget`` seconds: the environment; `mxdit conformance`; attention, by each method, against float64 and torch's;
norms and GELU; `mxdit bench gemm` on Wan2.2-A14B's products; one of its blocks at 4,096 and 32,760 tokens by `mxdit bench
pipeline`; and clips of the bundled model. Each part is a process of its own and gets a share of the time that is left, so that
a crash, a hang or a device context that is lost costs that part only. The report is written anew after each of them; it has
versions, results, times, and what failing parts printed, with the Python lines at which they crashed or were when their time
was over.

``--device`` is the first CUDA device or NPU where none is named. ``--quick`` has the same parts in sizes for a CPU.
Exit code 0: all is right; 1: something is not, or was not run; 2: no device is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxdit.conformance import cases

PASSED, FAILED, CRASHED, TIMED_OUT, NOT_RUN = "passed", "failed", "crashed", "timed out", "not run"
GRACE = 5  # seconds that a killed process has to go; one that waits for a driver may not
SPEAKING = {
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}  # what is aborted prints where it was, and loses no line
LEAST = 1.0  # seconds: with less nothing is begun
TAIL = 20_000  # characters: what is aborted lists all modules that it has loaded
JSON = "{json}"  # in a command: the file that it writes; one without it prints JSON
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SHAPES = ("19800,5120,15360", "32760,5120,5120", "32760,5120,13824", "32760,13824,5120", "512,5120,10240")


@dataclass(frozen=True)
class Part:
    """One process: arguments of Python's, and its share of the time, beside the shares of those after it."""

    name: str
    arguments: Sequence[str]
    share: float


def parts_of(device: str, quick: bool) -> list[Part]:
    to, cli = ("--device", device, "--json"), ("-m", "mxdit.cli")
    less = ["--quick", "--rounds", "1"] if quick else []
    clip = (*cli, "generate", "--method", "mxfp4", "--steps", "2" if quick else "8", "--output", "clip.mp4", *to)
    items = ["quantize mxfp4 uos rint"] if quick else items_of_conformance()
    shapes = [text for shape in (["64,256,128"] if quick else SHAPES) for text in ("--shape", shape)]
    found = [Part("environment", (*cli, "info", "--json"), 4)]  # and what a first import of everything takes
    found += [Part(f"conformance: {item}", (*cli, "conformance", "--only", item, *to, JSON), 4) for item in items]
    for method in ("exact", "int8"):
        command = (str(BENCHMARKS / "gpu_attention.py"), "--method", method, *less, *to, JSON)
        found.append(Part(f"attention: {method}", command, 3))
    found.append(Part("norms, GELU", (str(BENCHMARKS / "gpu_rowwise.py"), *less, *to, JSON), 3))
    found.append(Part("gemm", (*cli, "bench", "gemm", *shapes, "--rounds", "1" if quick else "5", *to, JSON), 5))
    name, forwards = ("TI2V-5B", "1") if quick else ("A14B", "3")
    ours = ("--mode", "mxfp4", "--attention", "int8")
    blocks: dict[str, Sequence[str]] = {"16": ours}
    if not quick:
        one = ("--mode", "mxfp4")
        blocks = {
            "4096": (),
            "32760": (),
            "32760, exact attention": (*one, "--attention", "exact"),
            "32760, int8 attention": ours,
            "32760, fused": (*one, "--fused"),
            "32760, compiled": (*one, "--compile"),
        }
    for tokens, modes in blocks.items():
        size = ("--block", name, "--tokens", tokens.partition(",")[0], "--rounds", forwards)
        found.append(Part(f"block, {tokens}", (*cli, "bench", "pipeline", *size, *modes, *to, JSON), 4))
    found.append(Part("generate", (*clip, *(["--frames", "5"] if quick else [])), 2))
    if not quick:
        found.append(Part("generate, our attention", (*clip, "--attention", "exact"), 2))
    return found


def items_of_conformance() -> list[str]:
    """What `--only` is given, which takes what has it anywhere in its name: each case has one of these."""
    kinds = dict.fromkeys(case.name.partition(" ")[0] for case in cases())
    return ["Wan block" if kind == "Wan" else kind for kind in kinds if kind != "dequantize"]  # as "quantize" takes it


def run(part: Part, limit: float, scratch: Path) -> dict[str, Any]:
    """What became of it: JSON that it left, even if it did not end well, and then what it printed last."""
    result, printed, errors = (scratch / name for name in ("result.json", "stdout", "stderr"))
    result.unlink(missing_ok=True)
    command = [sys.executable, *(str(result) if text == JSON else text for text in part.arguments)]
    started, code = time.monotonic(), None
    with printed.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=scratch, env=os.environ | SPEAKING, start_new_session=True
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            # It says where it is, and goes, and so do its children.
            for last in (signal.SIGABRT, signal.SIGKILL) if code is None else (signal.SIGKILL,):
                with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    os.killpg(process.pid, last)
                    process.wait(GRACE)
    status = TIMED_OUT if code is None else CRASHED if code < 0 else FAILED if code else PASSED
    found = {"part": part.name, "status": status, "exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    found |= {"limit": round(limit, 1), "command": part.arguments, "result": None}
    with suppress(OSError, ValueError):
        found["result"] = json.loads((printed if JSON not in part.arguments else result).read_text())
    if status != PASSED:
        found |= {file.name: file.read_text(errors="replace")[-TAIL:] for file in (printed, errors)}
    return found


def check(parts: Sequence[Part], budget: float, output: Path, device: str) -> bool:
    """Run them, and write and print what was found. Returns whether all is right."""
    ends, kind = time.monotonic() + budget, device.partition(":")[0]
    report: dict[str, Any] = {"schema": 1, "device": device, "budget": budget, "date": time.strftime("%F %T%z")}
    report |= {"nvidia_smi": nvidia_smi(), "parts": []}
    print(f"{len(parts)} parts on {device}, {budget:.0f} s at most; {output} has what is known after each", flush=True)
    with tempfile.TemporaryDirectory(prefix="mxdit-check-", ignore_cleanup_errors=True) as folder:
        for at, part in enumerate(parts):
            limit = (ends - time.monotonic()) * part.share / sum(later.share for later in parts[at:])
            found = {"part": part.name, "status": NOT_RUN, "seconds": 0.0}
            if limit >= LEAST:
                found = run(part, limit, Path(folder))
            backend = next((b for b in (found.get("result") or {}).get("backends", ()) if b["device"] == kind), None)
            if backend and backend["why_not"]:  # then the reference would pass everything in its place
                found |= {"status": FAILED, "stderr": f"{backend['name']} does not answer: {backend['why_not']}"}
            report["parts"].append(found)
            unfinished = output.with_name(f".{output.name}.partial")
            unfinished.write_text(json.dumps(report, indent=1) + "\n")
            unfinished.replace(output)
            said = in_short(found, kind)
            print(f"{found['status']:<10} {found['seconds']:>6.1f} s  {part.name:<24}  {said}", flush=True)
    return all(found["status"] == PASSED for found in report["parts"])


def nvidia_smi() -> str | None:
    """Driver, clocks, limits and what the GPUs are busy with, but nothing of whose they are; None where nobody says so."""
    command = ["nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE,UTILIZATION,MEMORY"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return None


def in_short(found: dict[str, Any], kind: str) -> str:
    """Who answers, ratios to torch's by method, counts of a conformance's items, what is wrong, and what a part that failed said
    last."""
    result, ratios = found.get("result") or {}, {}
    said = [b["about"] for b in result.get("backends", ()) if b["device"] == kind and b["about"]]
    for row in result.get("rows", ()):
        if row.get("ratio") not in (None, 1.0) and "reference" not in row.get("backend", ""):  # torch's own has 1
            ratios.setdefault(row.get("mode") or row["method"], []).append(row["ratio"])
    said += [f"{name} x {min(values):.2f} to {max(values):.2f}" for name, values in ratios.items()]
    said += [f"{count} {name}" for name, count in result.get("totals", {}).items() if name != "elements" and count]
    wrong = [row for row in result.get("rows", ()) if row.get("right") is False]
    said += [f"{len(wrong)} of {len(result['rows'])} wrong"] if wrong else []
    lines = found.get("stderr", "").strip().splitlines()
    where = [i + 1 for i, line in enumerate(lines[:-1]) if line.startswith("Current thread")]  # of what was aborted
    said += [lines[(where or [-1])[-1]].strip()] if lines else []
    return ", ".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, npu, cuda:1, ...")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all")
    parser.add_argument("--quick", action="store_true", help="small sizes, as for a CPU")
    parser.add_argument("--output", type=Path, default=Path("device_check.json"))
    args = parser.parse_args(arguments)
    found = torch.accelerator.current_accelerator(check_available=True)  # loads torch_npu where that is installed
    device = args.device or (str(found) if found is not None and found.type in ("cuda", "npu") else None)
    if device is None:
        print("error: torch sees no CUDA device and no NPU; name another with --device", file=sys.stderr)
        return 2
    for last in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(last, lambda *_: sys.exit(1))  # so that a part's process goes, too
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # nobody asked for dumps
    return 0 if check(parts_of(device, args.quick), args.budget, args.output, device) else 1


if __name__ == "__main__":
    sys.exit(main())
