"""What `mxdit bench` measures: sizes and arithmetic that are known, results that are checked, and the command as a user meets
it. No test asserts a time."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mxdit
import tiny
from command import mxdit_command
from mxdit.backends import carrier
from mxdit.bench import gemm, memory, operations, pipeline, profiling, timing, totals
from mxdit.bench.ceilings import Ceilings
from mxdit.bench.modes import CARRIERS, MODES, baseline
from mxdit.bench.operations import Work
from mxdit.bench.plot import gemm as draw
from mxdit.bench.processes import TIDY, alone
from mxdit.bench.products import Product, products
from mxdit.bench.shapes import A14B, MINI, PUBLISHED, SEED, TI2V_5B
from mxdit.bench.standins import block_inputs, make_checkpoint, quantized, random_block, skeleton
from mxdit.bench.timing import Times, alternate
from mxdit.bench.variants import variants
from mxdit.checkpoint import quantize_checkpoint
from mxdit.errors import BackendError, InputError
from sampled import taken

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DOCS = Path(__file__).parent.parent / "docs"


# -- timing --------------------------------------------------------------------------------------------------------------


def test_times_are_median_minimum_and_interquartile_range():
    assert Times.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Times(3.0, 1.0, 2.0, 5)
    assert Times.of([2.0]) == Times(2.0, 2.0, 0.0, 1)


def test_calls_alternate_and_copies_take_turns():
    seen: list[str] = []
    calls = [[lambda n=n: seen.append(n) for n in names] for names in (["a0", "a1"], ["b"])]
    times = alternate(calls, 3, lambda call: (call(), time.sleep(0.02))[1] or 1.0)
    assert times == [(1.0, 1.0, 1.0)] * 2
    assert seen[:6] == ["a0", "b", "a1", "b", "a0", "b"] and len(seen) > 6  # rounds that do not count came first


# -- products ------------------------------------------------------------------------------------------------------------


def test_products_are_those_of_the_document():
    found = {(p.m, p.k, p.n) for p in products([A14B], ["480p", "720p"], Fraction(1))}
    for m in (32760, 75600):
        assert {(m, 5120, 5120), (m, 5120, 13824), (m, 13824, 5120), (m, 5120, 15360)} <= found
    assert SEED in found and SEED == (19800, 5120, 15360)
    assert {(m, 5120, 5120) for m in (1, 4, 16, 32, 512)} <= found
    assert len(found) == 8 + 1 + 5  # the text's 512 tokens are a small M


def test_only_video_tokens_are_scaled():
    scaled = products([TI2V_5B], ["480p"], Fraction(1, 8))
    assert {p.m for p in scaled if p.full > 512} == {round(TI2V_5B.tokens("480p") / 8), 19800 // 8}
    assert {p.m for p in scaled if p.full <= 512} == {1, 4, 16, 32, 512}


@pytest.mark.parametrize("k, n", [(64, 96), (576, 64)])  # 576: one group of 512 and a part of another
def test_every_method_is_measured_and_right(k, n):
    (rows,) = gemm.run([Product("test", 5, k, n, 5)], list(MODES), CPU, 2)
    native = len(gemm.usable(CPU)) - 1
    assert [row.method for row in rows] == [baseline("cpu"), *MODES, *(list(MODES) * native)]
    assert all(row.right for row in rows[1:]) and rows[0].ratio == 1
    for row in rows[1 : 1 + len(MODES) * native]:
        assert set(row.parts) == ({"whole"} if MODES[row.method][1] == "bf16" else {"quantize", "matmul", "whole"})
        whole = row.parts["whole"]
        assert whole.times.rounds == 2 and whole.operations == 2 * 5 * k * n
        assert row.ratio == rows[0].parts["whole"].times.median / whole.times.median
    assert json.dumps([row.to_dict() for row in rows])


def test_bytes_are_operands_and_results_once():
    (rows,) = gemm.run([Product("test", 4, 64, 32, 4)], ["mxfp4"], CPU, 1)
    x, out, codes, weight, bias = 4 * 64 * 2, 4 * 32 * 2, 4 * (32 + 2), 32 * (32 + 2), 32 * 2
    size = CARRIERS[rows[0].method].itemsize
    assert rows[0].parts["whole"].nbytes == size * (4 * 64 + 64 * 32 + 32 + 4 * 32)
    parts = {name: part.nbytes for name, part in rows[1].parts.items()}
    if parts.keys() > {"whole"}:
        assert parts["quantize"] == x + codes and parts["matmul"] == codes + weight + bias + out
    assert parts["whole"] == x + weight + bias + out


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_result_is_seen(mode):
    linear, x = gemm.Linear(64, 32, CPU), torch.randn(6, 64).bfloat16()
    layer = linear.mode(mode)[0]
    got = layer(x)
    assert gemm.is_right(layer, got, x)
    got[-1, -1] *= 1.05
    assert not gemm.is_right(layer, got, x)


def test_what_is_too_large_for_the_reference_is_said(monkeypatch):
    monkeypatch.setitem(gemm.REFERENCE_LIMIT, "cpu", 1)
    (rows,) = gemm.run([Product("test", 2, 64, 32, 2)], ["mxfp4"], CPU, 1)
    assert not rows[-1].parts and rows[-1].ratio is None and "too large" in rows[-1].note


def test_an_accelerator_is_measured_by_its_events_and_its_own_layout_by_its_own_kernels(npu):
    (rows,) = gemm.run([Product("test", 5, 512, 64, 5)], list(MODES), torch.device("npu:0"), 2)
    assert [row.method for row in rows] == ["bf16", *MODES, *MODES]
    by = {(row.method, row.backend.split()[0]): row for row in rows}
    assert by["mxfp4_dualscale", "ascend"].right and set(by["mxfp4_dualscale", "ascend"].parts) == {"whole"}
    assert "own layout, nz" in by["mxfp4_dualscale", "reference"].note
    assert by["mxfp4", "ascend"].right and by["mxfp4", "reference"].right
    with pytest.raises(TypeError, match="not a stream"):
        npu.npu.Event(enable_timing=True).record(None)


def test_caches_that_the_system_hides_are_left_out(monkeypatch, tmp_path):
    for index, size in (("index0", "64K"), ("index1", None)):
        folder = tmp_path / "sys/devices/system/cpu/cpu0/cache" / index
        folder.mkdir(parents=True)
        (folder / "type").write_text("Unified\n")
        (folder / "level").write_text("2\n" if size else "3\n")
        if size:
            (folder / "size").write_text(size)
    monkeypatch.setattr(timing, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert timing.caches() == {"L2": 64 << 10} and timing.last_cache() == 64 << 10


def test_the_plot_is_a_picture(tmp_path):
    (rows,) = gemm.run([Product("test", 2, 64, 32, 2)], ["mxfp4", "w4a16"], CPU, 1)
    draw(tmp_path / "a.png", rows, Ceilings(1e9, 1e11, 5e10, 64), "test")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- memory --------------------------------------------------------------------------------------------------------------


def test_memory_that_is_taken_and_given_back_is_seen():
    anon, rss = alone(taken, environment=TIDY)  # elsewhere earlier tests may have left memory that is taken again
    assert anon > 60 << 20 and rss >= anon


def test_only_what_measures_memory_changes_the_allocator():
    assert alone(os.getenv, "MALLOC_MMAP_THRESHOLD_") is None
    assert alone(os.getenv, "MALLOC_MMAP_THRESHOLD_", environment=TIDY) == "131072"


def test_a_killed_process_is_an_error():
    with pytest.raises(BackendError, match="killed"):
        alone(os._exit, 9)


def test_one_tensor_under_two_names_counts_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert memory.tensor_bytes(model) == 4 * (64 + 8 + 8)


def test_published_sizes_are_those_of_the_document():
    text = (DOCS / "wan22.md").read_text()
    for name, sizes in totals.PUBLISHED.items():
        (row,) = re.findall(rf"^\| {name} \|.*$", text.split("## Sizes")[1], re.MULTILINE)
        cells = [float(cell) for cell in re.findall(r"\| ([\d.]+)(?: GiB)?(?= \|)", row)]
        assert list(sizes.values()) == cells[-5:]
    assert {64.3, 26.0, 18.5} == set(totals.PUBLISHED_WHOLE.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_of_made_up_blocks_come_near_the_document(name):
    """The arithmetic alone, with a block's bytes as the formats say; what a load measures differs by FP32 tables."""
    wan, bits = PUBLISHED[name], {"bf16": 16, "mxfp8": 8.25, "mxfp4": 4.25, "mxfp4_dualscale": 4.3125}
    weights = sum(layer.count * layer.k * layer.n for layer in wan.layers)
    outside = 2 * sum(p.numel() for key, p in skeleton(wan, 1).named_parameters() if not key.startswith("blocks"))
    measured = {}
    for method, width in bits.items():
        block = int(weights * width / 8)
        for how in ("", " online", " offline"):
            row = memory.ExpertMemory(method + how, 0, 110, 100, 0, 0, block + outside, block, 0, 0, 0.0)
            measured[method + how] = row
    found = totals.add_up(name, wan, list(bits)[1:], measured)
    assert (
        len(found) == 1 + 2 * 4
    )  # BF16; three methods online and offline, one of them with and without leading blocks
    for total in found:
        assert total.expert == sum(line.count * line.each for line in total.lines)
        assert math.isclose(total.expert / 2**30, total.published, rel_tol=0.005)
        assert total.loading == total.expert + 10 and total.both == total.one + (wan.experts - 1) * total.expert
        for nbytes, published in ((total.both, total.published_both), (total.one, total.published_one)):
            assert published is None or math.isclose(nbytes / 2**30, published, rel_tol=0.01)


# -- stand-ins and the split ---------------------------------------------------------------------------------------------


def test_a_stand_in_loads_and_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name, MINI, 1, shard=3 << 20)
    a, b = (tiny.load(tmp_path / name) for name in ("a", "b"))
    assert len(a.blocks) == 1 and tiny.same(a, b)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    row = memory.load_transformer(memory.Variant("mxfp4 online", tmp_path / "a", "mxfp4"))
    report = mxdit.quantize_(a, "mxfp4")
    assert row.model == memory.tensor_bytes(a) and row.block < row.model and len(report.quantized) == tiny.LINEARS
    assert row.files > 2**20 and row.peak >= 0 and row.largest == 2 * 256 * 4096  # the text embedder


def test_the_profiler_s_split_finds_linears_and_attention():
    block, inputs = random_block(MINI), block_inputs(MINI, 40)
    for each in (block, quantized(block, "mxfp4", "mxfp4")):
        with torch.no_grad(), profiling.marked([each]), profile(activities=[ProfilerActivity.CPU]) as profiler:
            each(*inputs)
        events = list(profiler.events() or ())
        linear, attention, whole = profiling.split(events, "cpu")
        assert linear > 0 and attention > 0 and linear + attention < whole
        kind = "aten::linear" if each is block else "mxdit::linear"
        assert sum(event.name == kind for event in events) == tiny.LINEARS
        assert linear <= sum(e.cpu_time_total for e in events if e.name in profiling.LINEARS) / 1e6 + 1e-9


def profiled(block: nn.Module, inputs: tuple[object, ...]) -> list[object]:
    with (
        torch.no_grad(),
        profiling.marked([block], inside=True),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        block(*inputs)
    return list(profiler.events() or ())


@pytest.mark.parametrize("dtype", CARRIERS.values(), ids=CARRIERS)
def test_every_operator_of_a_block_belongs_to_its_operation(dtype):
    block, (x, text, *others) = random_block(MINI).to(dtype), block_inputs(MINI, 40)
    for each, linear in ((block, "aten::linear"), (quantized(block, "mxfp4", "mxfp4"), "mxdit::linear")):
        events = profiled(each, (x.to(dtype), text.to(dtype), *others))
        seconds = operations.seconds_of(events, "cpu")
        assert seconds.keys() == {*operations.work_of(each, MINI, 40, dtype), operations.OTHER}
        in_linears, in_attention, whole = profiling.split(events, "cpu")
        assert math.isclose(sum(seconds.values()), whole) and min(seconds.values()) > 0
        for names, inside in ((operations.LINEARS, in_linears), (operations.ATTENTIONS, in_attention)):
            assert sum(seconds[name] for name in names) >= inside > 0  # with a dropout, and views of the result

        (root,) = (event for event in events if event.name == profiling.FORWARD)
        found: dict[str, list[str]] = {}
        for name, event in operations._named(root, ""):
            if event.name not in (
                "aten::to",
                "aten::type_as",
                "aten::chunk",
                "aten::unflatten",
                "aten::slice",
                "aten::unbind",
            ):
                assert event.name.endswith("::linear") <= (event.name == linear)
                found.setdefault(name, []).append(event.name.partition("::")[2])
        layout = ["permute"] * 3
        rotated = ["empty_like", "mul", "mul", "sub", "copy_", "mul", "mul", "add", "copy_"]
        attended = ["scaled_dot_product_attention", "permute", "flatten"]
        assert found == {
            "modulation table": ["add"],
            "norm1": ["layer_norm"],
            "norm1: scale, shift": ["add", "mul", "add"],
            "attn1: linears": ["linear"] * 4 + ["dropout"],
            "attn1: norms of q, k": ["rms_norm"] * 2,
            "attn1: rotary": rotated * 2 + layout,
            "attn1: attention": attended,
            "attn1: gate, residual": ["mul", "add"],
            "norm2": ["layer_norm"],
            "attn2: linears": ["linear"] * 4 + ["dropout"],
            "attn2: norms of q, k": ["rms_norm"] * 2 + layout,
            "attn2: attention": attended,
            "attn2: residual": ["add"],
            "norm3": ["layer_norm"],
            "norm3: scale, shift": ["add", "mul", "add"],
            "ffn: up": ["linear"],
            "ffn: GELU": ["gelu"],
            "ffn: down": ["linear"],
            "ffn: gate, residual": ["mul", "add"],
            operations.OTHER: ["dropout"],
        }


def test_floors_are_counted_as_by_hand():
    """3 video tokens and the text's 512; 8 features in 2 heads of 4, 16 in between."""
    wan = replace(MINI, dim=8, ffn=16, heads=2)
    block = random_block(wan)
    work = operations.work_of(block, wan, 3, torch.bfloat16)
    x, text, row = 3 * 8, 512 * 8, 4 * 8
    assert work["norm1"] == work["norm3"] == Work(2 * 2 * x, 0, 5 * x)
    assert work["norm2"] == Work(2 * 2 * x + 2 * row, 0, 7 * x)
    assert work["norm1: scale, shift"] == Work(2 * 2 * x + 2 * row, 0, 2 * x)
    assert work["attn1: gate, residual"] == Work(3 * 2 * x + row, 0, 2 * x) and work["attn2: residual"] == Work(
        144, 0, x
    )
    assert work["attn1: rotary"] == Work(2 * 2 * 2 * x + 3 * 4 * 4, 0, 2 * 12 * 6)  # 12 pairs of q and of k
    assert work["attn1: attention"] == Work(4 * 2 * x, 2 * 2 * 3 * 3 * 8, 5 * 3 * 3 * 2)
    assert work["attn2: attention"] == Work(2 * 2 * (x + text), 2 * 2 * 3 * 512 * 8, 5 * 3 * 512 * 2)
    assert work["ffn: GELU"] == Work(2 * 2 * 48, 0, 9 * 48)
    weight = 2 * (8 * 8 + 8)
    assert work["attn1: linears"] == Work(4 * (2 * 2 * x + weight), 4 * 2 * 3 * 64)
    assert work["attn2: linears"] == Work(2 * (2 * 2 * (x + text)) + 4 * weight, 2 * 2 * (3 + 512) * 64)
    assert work["ffn: up"] == Work(2 * (x + 48) + 2 * (128 + 16), 2 * 3 * 128)
    packed = operations.work_of(quantized(block, "mxfp4", "mxfp4"), wan, 3, torch.bfloat16)
    assert packed["ffn: up"] == Work(2 * (x + 48) + 128 // 2 + 16 + 2 * 16, 2 * 3 * 128)  # 16 rows have a scale each
    best = Ceilings(copy=100.0, bf16=50.0, fp32=20.0, size=64)
    assert [Work(*of).floor(best, 40.0) for of in ((300, 0, 0), (0, 80, 0), (100, 80, 60))] == [3.0, 2.0, 3.0]


def test_operations_are_sorted_by_what_is_above_their_floor_and_parts_count_once():
    best = Ceilings(copy=1.0, bf16=1.0, fp32=1.0, size=1)
    work = {"norm1": Work(1), "attn1: attention": Work(1, 6, 2), "ffn: up": Work(1, 8)}
    parts = {("attn1: attention", "q k^T, alone"): (Work(1, 3), 4.0)}
    rows = operations.table(
        {"norm1": 2.0, "attn1: attention": 9.0, "ffn: up": 4.0, "other": 1.0}, work, parts, best, (4, 2)
    )
    assert [(row.name, row.seconds, row.floor, row.part_of) for row in rows] == [
        ("attn1: attention", 9.0, 3.0, None),
        ("q k^T, alone", 4.0, 1.5, "attn1: attention"),
        ("softmax and the rest", 5.0, 2.0, "attn1: attention"),
        ("ffn: up", 4.0, 2.0, None),
        ("norm1", 2.0, 1.0, None),
        ("other", 1.0, 0.0, None),
    ]
    assert math.isclose(sum(row.share for row in rows if row.part_of is None), 1)
    assert operations.quickest([{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 3.0}]) == {"a": 1.0, "b": 1.0}


# -- the command ---------------------------------------------------------------------------------------------------------


def test_gemm_command(monkeypatch, capsys, tmp_path):
    code, out, _ = mxdit_command(
        monkeypatch, capsys, "bench", "gemm", "--shape", "3,64,32", "--method", "mxfp4", "--method", "w4a16",
        "--rounds", 2, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg",
    )  # fmt: skip
    assert code == 0 and "Ceilings of this run" in out and "NO" not in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["benchmark"] == "gemm" and figures["ceilings"]["bf16"] > 0 and figures["settings"]["scale"] == "1"
    assert {row["method"] for row in figures["rows"]} == {figures["settings"]["baseline"], "mxfp4", "w4a16"}
    assert (tmp_path / "a.svg").stat().st_size


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="libraries emulate bf16 on demand on x86 only"
)
def test_where_bf16_is_emulated_fp32_is_the_baseline_and_that_is_said(tmp_path):
    """In a process whose libraries take the CPU for one with AVX2 only."""
    wanted = [
        "bench",
        "gemm",
        "--shape",
        "3,64,32",
        "--method",
        "mxfp4",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "a.json"),
    ]
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", "from mxdit.cli import main; main()", *wanted]
    done = subprocess.run(command, env={**os.environ, **older}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Compared with FP32: torch emulates bfloat16 on this CPU" in done.stdout
    assert "x FP32" in done.stdout and "of FP32 peak" in done.stdout and "x BF16" not in done.stdout
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["settings"]["baseline"] == "fp32" and figures["ceilings"]["size"] == 512
    assert [row["method"] for row in figures["rows"]] == ["fp32", "mxfp4", "mxfp4"]


def test_only_a_cpu_has_a_slow_bf16(npu):
    assert baseline("npu") == baseline("cuda:1") == "bf16"
    assert carrier.note(torch.bfloat16, "npu") is None and carrier.note(torch.float32, "cpu") is None
    assert (carrier.note(torch.bfloat16, "cpu") is None) == (baseline("cpu") == "bf16")


@pytest.mark.parametrize("rounds", [1, 2])
def test_pipeline_command(monkeypatch, capsys, tmp_path, rounds):
    """One mode after the other and the first once more, or in turn."""
    small = ["--size", "32x32", "--frames", 5, "--steps", 3, "--mode", "w4a8", "--rounds", rounds]
    code, out, _ = mxdit_command(
        monkeypatch, capsys, "bench", "pipeline", "bundled", *small, "--json", tmp_path / "a.json"
    )
    assert code == 0 and "w4a8" in out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    again = [pipeline.AGAIN.format(baseline("cpu"))] if rounds == 1 else []
    assert [row["mode"] for row in rows] == [baseline("cpu"), "w4a8", *again] and rows[0]["ratio"] == 1
    assert all(row["linear"] > 0 and row["attention"] > 0 for row in rows)
    assert all(row["times"]["rounds"] == 2 * rounds for row in rows)


def test_a_block_is_split_by_operation(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(PUBLISHED, "A14B", MINI)  # a real one takes minutes
    wanted = ["--block", "A14B", "--tokens", 40, "--rounds", 2, "--mode", "mxfp4", "--mode", "w4a16"]
    code, out, _ = mxdit_command(monkeypatch, capsys, "bench", "pipeline", *wanted, "--json", tmp_path / "a.json")
    assert code == 0 and out.count("| operation ") == 3 and out.count("~ softmax and the rest") == 6
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["ceilings"].keys() == {"copy", "bf16", "fp32", "size"}
    for row in figures["rows"]:
        whole = [each for each in row["operations"] if each["part_of"] is None]
        parts = {(each["part_of"], each["name"].partition(",")[0]) for each in row["operations"] if each["part_of"]}
        assert row["peak"] > 0 and len(whole) == 20 and math.isclose(sum(each["share"] for each in whole), 1)
        assert all(each["floor"] > 0 and each["nbytes"] > 0 and each["flop"] > 0 for each in whole[:-1])
        assert [each["seconds"] - each["floor"] for each in whole[:-1]] == sorted(
            (each["seconds"] - each["floor"] for each in whole[:-1]), reverse=True
        )
        linear = sum(each["share"] for each in whole if each["name"] in operations.LINEARS)
        assert math.isclose(row["linear"], linear) and math.isclose(row["linear"] + row["attention"] + row["rest"], 1)
        hidden = {"q k^T", "p v", "softmax and the rest"}
        expected = {(name, part) for name in operations.ATTENTIONS for part in hidden}
        quantizing = {(name, "quantizing") for name in operations.LINEARS} if row["mode"] == "mxfp4" else set()
        assert parts == expected | quantizing


def test_a_checkpoint_is_measured_in_every_mode(tmp_path):
    source = tiny.save(tmp_path / "bf16")
    found = variants(source, False, ["mxfp4", "mxfp8"], tmp_path, lambda _: None)
    assert [v.name for v in found] == ["bf16", "mxfp4 online", "mxfp4 offline", "mxfp8 online", "mxfp8 offline"]
    assert [v.method for v in found] == [None, "mxfp4", None, "mxfp8", None]
    assert [v.path == source for v in found] == [True, True, False, True, False]
    sizes = {v.name: memory.weight_files(v.path) for v in found}
    assert sizes["bf16"] > sizes["mxfp8 offline"] > sizes["mxfp4 offline"] > 0
    assert [v.name for v in variants(found[2].path, True, ["mxfp8"], tmp_path, lambda _: None)] == ["as stored"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    quantize_checkpoint(tiny.save(root / "bf16"), root / "packed", "mxfp4").write()
    return root / "packed"


def test_memory_command(monkeypatch, capsys, tmp_path, packed):
    small = ["--size", "16x16", "--frames", 5, "--steps", 2, "--model", "none"]
    code, out, _ = mxdit_command(monkeypatch, capsys, "bench", "memory", packed, *small, "--json", tmp_path / "a.json")
    assert code == 0 and "as stored" in out
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    weights, expert = row["weights"], row["expert"]
    assert row["both"] == sum(weights.values()) and row["one"] == row["both"] - weights["transformer_2"]
    assert expert["model"] == weights["transformer"] and row["generating"] > 0 and row["rss"] > row["loading"]


def test_load_command(monkeypatch, capsys, tmp_path, packed):
    code, out, _ = mxdit_command(
        monkeypatch, capsys, "bench", "load", packed, "--rounds", 1, "--json", tmp_path / "a.json"
    )
    assert code == 0 and "as stored" in out
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["files"] == memory.weight_files(packed) and row["first"] > 0 and row["times"]["rounds"] == 1


BAD = {
    "a model that is not known": (["gemm", "--model", "B14"], "A14B or TI2V-5B"),
    "a clip that is not known": (["gemm", "--clip", "1080p"], "480p or 720p"),
    "a product that is none": (["gemm", "--shape", "1,2"], "M,K,N"),
    "an odd K": (["gemm", "--shape", "1,33,2"], "K even"),
    "a scale above one": (["gemm", "--scale", "2"], "1/8"),
    "a scale that is none": (["gemm", "--scale", "1/0"], "1/8"),
    "no rounds": (["gemm", "--rounds", "0"], "at least one round"),
    "a method that is not known": (["gemm", "--method", "fp4"], "mxfp4_dualscale"),
    "a picture of no kind": (["gemm", "--plot", "a.gif"], ".png"),
    "JSON of another name": (["gemm", "--json", "a.txt"], ".json"),
    "a device that is not here": (["gemm", "--device", "npu"], "--device"),
    "a directory that is not there": (["memory", "none"], "no such directory"),
    "a task that is none": (["load", "--task", "v2v"], "t2v or i2v"),
    "a scratch that is not there": (["load", "--scratch", "none"], "no such directory"),
    "one step": (["pipeline", "--steps", "1"], "at least 2"),
    "no tokens": (["pipeline", "--block", "A14B", "--tokens", "0"], "--tokens"),
    "a block of no model": (["pipeline", "--block", "mini"], "TI2V-5B"),
    "attention of a transformer for a block": (
        ["pipeline", "--block", "A14B", "--attention", '{"transformer_2": "int8"}'],
        "--attention: not a policy of attention; got 'transformer_2'",
    ),
    "attention in steps for a block": (["pipeline", "--block", "A14B", "--attention", "int8;0=exact"], "has no steps"),
    "attention of no such layer": (
        ["pipeline", "--attention", '{"transformer": "int8;attn9=exact"}'],
        "--attention layers 'attn9': the pattern matches nothing",
    ),
    "a size off the patches": (["memory", "--size", "20x16"], "multiple of 16"),
}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = mxdit_command(monkeypatch, capsys, "bench", *args)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0] and not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_is_refused_before_any_work(monkeypatch):
    from mxdit.cli import console
    from mxdit.cli.bench import options

    monkeypatch.setattr(console, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"matplotlib.*mxdit\[eval\]"):
        options.check_outputs(None, Path("a.png"))
