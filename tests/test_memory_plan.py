"""Plans of memory: bytes counted right, peaks predicted, budgets kept, and pixels that stay the same."""

from __future__ import annotations

import importlib
import json
import mmap
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import mxdit
import tiny
from command import mxdit_command
from mxdit.backends import native
from mxdit.bench.memory import tensor_bytes
from mxdit.bench.processes import alone
from mxdit.checkpoint import quantize_checkpoint
from mxdit.config.encoders import encoder_config
from mxdit.errors import InputError
from mxdit.generation import loading, offload, pages
from mxdit.generation.directory import bundled, open_model
from mxdit.generation.footprint import weights_of
from mxdit.generation.loading import quantization
from mxdit.generation.plan import (
    BLOCKS,
    COMPILER,
    DROP,
    PRODUCT,
    PRODUCT_THREAD,
    STAY,
    SWAP,
    TILES,
    WHOLE,
    Planner,
    Policy,
    budget_of,
)
from mxdit.generation.recording import transformers_of
from mxdit.generation.request import Request
from mxdit.generation.work import Works, attention_bytes, live
from sampled import kept_of_attention
from tiny_families.wan import wan_inputs

pytestmark = pytest.mark.slow

SMALL = {"prompt": "a red seven moving left", "size": (16, 16), "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a tiny model in BF16."""
    folder = tmp_path_factory.mktemp("models")
    return {task: tiny.save(folder / task, task) for task in tiny.TASKS}


@pytest.fixture(scope="module")
def model(saved: dict[str, Path]) -> Path:
    return saved["t2v"]


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    quantize_checkpoint(model, model.parent / "packed", "mxfp4").write()
    return model.parent / "packed"


def only(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """Have every plan be of this policy."""
    monkeypatch.setattr(Planner, "policies", lambda _: iter([policy]))


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("12000MiB", 12000 << 20),
        ("1.5 gib", 3 << 29),
        ("2TiB", 2 << 40),
        (7, 7),
    ],
)
def test_sizes_of_memory(text, nbytes):
    assert budget_of(text) == nbytes


@pytest.mark.parametrize(
    "text", ["24", "", "GiB", "-1GiB", "0GiB", "24 apples", "24GiBs", "1e9B", "nan GiB", 0, -5, True, None, 1.5]
)
def test_what_is_no_size_is_refused(text, model):
    with pytest.raises(InputError, match="not a size of memory") as caught:
        budget_of(text)
    assert caught.value.field == "memory"


def test_two_ways_to_offload_are_refused(model):
    with pytest.raises(InputError, match="a plan of memory decides"):
        mxdit.Session.open(model, memory="1GiB", offload=True)


# -- weights -----------------------------------------------------------------------------------------------------------


MIXED = {"quant_method": "mxfp4", "layer_methods": {"mxfp8": ["blocks.0.*"]}}
MIXED_TEXT = {"quant_method": "mxfp8", "embedding": "mxfp4", "layer_methods": {"mxfp4": ["*.layer.0.*"]}}
DUAL_TEXT = {"quant_method": "mxfp4_dualscale", "embedding": "mxfp4_dualscale"}


@pytest.mark.parametrize(
    "task, stored, experts, text",
    [
        ("t2v", False, None, None),
        ("i2v", False, None, None),
        ("i2v", True, "mxfp8", None),
        *(
            ("t2v", stored, experts, text)
            for stored in (False, True)
            for experts, text in (
                ("mxfp4", "mxfp8"),
                ("mxfp4_dualscale", DUAL_TEXT),
                (MIXED, MIXED_TEXT),
            )
        ),
    ],
)
def test_weights_are_counted_as_they_are_held(task, stored, experts, text, saved, tmp_path):
    path = saved[task]
    if stored:
        encoders = {} if text is None else {"text_encoder": encoder_config(text, "text_encoder")}
        quantize_checkpoint(path, tmp_path / "packed", experts, encoders=encoders).write()
        session = mxdit.Session.open(tmp_path / "packed")
    else:
        asked = {"keys": experts} if isinstance(experts, dict) else {"method": experts}
        session = mxdit.Session.open(path, **asked, components={"text_encoder": text} if text else None)
    configs, pipeline = {**session.configs, **session.encoders}, session.load()
    bare = tmp_path / "bare"
    shutil.copytree(session.model.path, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    clean = list(pages._clean())
    for name in ("text_encoder", "vae", "transformer", "transformer_2"):
        dtype = torch.float32 if name == "vae" else torch.bfloat16
        module = pipeline.components[name]
        found = weights_of(session.model, name, configs.get(name), dtype)
        assert found.total == tensor_bytes(module), name
        mapped = sum(
            t.nbytes
            for t in {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}.values()
            if any(low <= t.data_ptr() < high for low, high in clean)
        )
        assert found.mapped == mapped, name
        assert weights_of(open_model(bare), name, configs.get(name), dtype).total == found.total, name
        if name.startswith("transformer"):
            held = [tensor_bytes(block) for block in module.blocks]
            assert (found.blocks, found.block) == (sum(held), max(held)), name


@pytest.mark.parametrize("text", [None, "mxfp8", {"quant_method": "mxfp8", "embedding": "mxfp4"}])
def test_wo_in_fp16_and_a_table_stored_twice_are_counted_as_they_are_held(text, saved, tmp_path):
    shutil.copytree(saved["t2v"], tmp_path / "twice")
    file = tmp_path / "twice" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, file, {"format": "pt"})
    components = {"text_encoder": text} if text else None
    session = mxdit.Session.open(tmp_path / "twice", components=components, dtype=torch.float16)
    others = [name for name in session.model.parts if name != "text_encoder"]
    read = loading.read(session.model, "t2v", {}, dtype=torch.float16, encoders=session.encoders, without=others)
    found = weights_of(session.model, "text_encoder", session.encoders.get("text_encoder"), torch.float16)
    assert found.total == tensor_bytes(read.components["text_encoder"])


# -- what is computed --------------------------------------------------------------------------------------------------


def test_live_tensors_are_counted_while_they_live():
    def call() -> torch.Tensor:
        a = torch.empty(1000, device="meta")  # 4000 bytes
        b = a + 1  # and 4000
        del a
        view = b.view(10, 100)[1:]  # none
        c = view.to(torch.bfloat16)  # and 1800
        b.mul_(2)
        return c + 0  # and 1800: b, c and this

    assert live(call).peak == 8000 and live(lambda: torch.empty(10, device="meta")).peak == 40


@pytest.mark.parametrize("channels, rows", [(16, 256), (16, 427), (96, 71), (96, 72)])
def test_a_small_convolution_holds_its_input_once_for_each_place_of_the_kernel(channels, rows):
    x, weight = torch.empty(1, channels, 3, rows, 8), torch.empty(4, channels, 3, 3, 3)
    none, one = [0] * 3, [1] * 3
    unfolds = torch._C._select_conv_backend(x, weight, None, one, none, one, False, none, 1, None).name == "Slow3d"
    x, weight = x.to("meta"), weight.to("meta")
    result = 4 * 4 * (rows - 2) * 6
    beside = result * weight[0].numel() // 4 if unfolds else x.nbytes
    assert live(lambda: nn.functional.conv3d(x, weight)).peak == result + beside


def test_attention_holds_no_scores():
    q = torch.empty(1, 2, 4096, 64, device="meta", dtype=torch.bfloat16)
    for call in (
        lambda: nn.functional.scaled_dot_product_attention(q, q, q),
        lambda: nn.functional.scaled_dot_product_attention(query=q, key=q, value=q),
    ):
        assert live(call).peak == q.nbytes


@pytest.mark.skipif(not native.paths(), reason="without native kernels")
@pytest.mark.parametrize("method", ["exact", "int8"])
def test_kernels_of_attention_keep_no_more_than_is_counted(method):
    """The plan counts what fp32 units keep, others half of it or less."""
    keys, width = 2**17, 128  # beyond 32 MiB malloc gives nothing out again that was freed before
    kept, counted = alone(kept_of_attention, keys, width, method), attention_bytes(keys, width, width)
    assert set(kept) == set(native.paths())
    assert all(counted / 8 < nbytes < counted + PRODUCT_THREAD for nbytes in kept.values()), (counted, kept)
    if method == "exact":  # nothing is counted that no path keeps
        assert max(kept.values()) > 0.7 * counted, (counted, kept)
    q, k = (torch.empty(1, 1, tokens, width, dtype=torch.bfloat16, device="meta") for tokens in (1, keys))
    assert live(lambda: nn.functional.scaled_dot_product_attention(q, k, k)).kept == counted


def test_what_attention_keeps_is_planned_on_a_cpu_alone(packed):
    """Of products' scratch 35 MiB are planned in any case, and attention works in the same buffer."""
    for device, more in (("cpu", attention_bytes(2**17, 64, 64) - PRODUCT), ("cuda", 0)):
        made = planner(packed, device)
        floors = []
        for kept in (PRODUCT, attention_bytes(2**17, 64, 64)):
            work = made._works.at(16, 16, 5)
            made._works._found[16, 16, 5] = replace(work, kept=kept)
            floors.append(made.plan((16, 16), 5, Policy()).floor)
        assert floors[1] - floors[0] == more


def test_a_compiler_is_planned_where_the_process_counts(packed):
    for device, more in (("cpu", COMPILER), ("cuda", 0)):
        plain, compiled = (planner(packed, device, compiled=compiled).floor for compiled in (False, True))
        assert compiled - plain == pytest.approx(more, abs=1 << 20)


def test_a_forward_without_data_takes_what_one_with_data_takes():
    real = tiny.transformer().bfloat16()
    inputs = {key: value for key, value in wan_inputs(real).items() if value is not None}
    with torch.device("meta"):
        empty = tiny.transformer().bfloat16()
    found = [
        live(lambda m=m, i=i: m(**i, return_dict=False)).peak
        for m, i in ((real, inputs), (empty, {key: value.to("meta") for key, value in inputs.items()}))
    ]
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize(
    "size, frames, tiles", [((272, 288), 5, (32 + 10) * (32 + 12) / (34 * 36)), ((272, 192), 17, (32 + 10) / 34)]
)
def test_the_vae_is_traced_in_part(size, frames, tiles, model):
    works = Works(open_model(model), "t2v", torch.bfloat16)
    work, vae = works.at(*size, frames), works._vae
    latents = torch.empty(1, 16, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8, device="meta")
    assert work.decode == pytest.approx(live(lambda: vae.decode(latents)).peak, rel=0.05)
    assert work.tiles == pytest.approx(tiles)
    vae.enable_tiling()
    assert work.decode_tiled == pytest.approx(live(lambda: vae.decode(latents)).peak, rel=0.05)


# -- choices -----------------------------------------------------------------------------------------------------------


def planner(path: Path, device: str = "cpu", method: str | None = None, compiled: bool = False) -> Planner:
    model = open_model(path)
    return Planner(model, "t2v", quantization(model, method, {}), torch.bfloat16, device, compiled=compiled)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cheapest_that_fits_is_chosen(packed, device):
    planned = planner(packed, device)
    plans = planned.plans((320, 320), 5, steps=10)
    assert {plan.policy.transformers for plan in plans} == ({STAY, SWAP} if device == "cpu" else {STAY, SWAP, BLOCKS})
    assert plans[0].policy == Policy(STAY, STAY, WHOLE) and plans[0].seconds == 0
    for plan in plans:
        chosen = planned.choose(plan.peak, (320, 320), 5, steps=10)
        assert chosen.peak <= plan.peak == chosen.budget and chosen.seconds <= plan.seconds
        assert all(chosen.seconds <= other.seconds for other in plans if other.peak <= plan.peak)
    least = min(plan.peak for plan in plans)
    with pytest.raises(InputError, match="320x320 and 5 frames do not fit") as caught:
        planned.choose(least - 1, (320, 320), 5)
    named = str(caught.value.expected).split()[2].rstrip(",")
    assert least <= budget_of(named) <= least + (2 << 20)
    assert planned.choose(budget_of(named), (320, 320), 5).peak <= budget_of(named)


def test_an_error_names_the_longest_clip_that_fits(packed):
    planned = planner(packed)
    fits = min(plan.peak for plan in planned.plans((256, 256), 9))
    with pytest.raises(InputError, match="at most 9 frames fit"):
        planned.choose(fits, (256, 256), 25)


def test_each_measure_takes_what_it_says_from_its_phase(packed):
    planned = planner(packed, "cuda")
    weights, size = planned.weights, ((16, 16), 5)

    def phases(*policy: str) -> dict[str, int]:
        return {phase.name: sum(phase.weights.values()) for phase in planned.plan(*size, Policy(*policy)).phases}

    text, experts = weights["text_encoder"].total, [weights[name].total for name in ("transformer", "transformer_2")]
    whole, dropped, swapped, blocks = phases(STAY), phases(DROP), phases(STAY, SWAP), phases(STAY, BLOCKS)
    assert whole["VAE"] == sum(w.total for w in weights.values())
    assert dropped["text"] == whole["text"] and dropped["VAE"] == whole["VAE"] - text
    assert swapped["text"] == whole["text"] - sum(experts)
    assert swapped["steps of transformer"] == whole["VAE"] - experts[1]
    one = weights["transformer"]
    assert blocks["steps of transformer"] == blocks["VAE"] + one.block == whole["VAE"] - 2 * one.blocks + one.block


def test_what_cannot_be_done_is_not_planned(model, packed):
    assert SWAP in planner(model, method="mxfp4").refused() and SWAP not in planner(packed).refused()
    assert SWAP not in planner(model, "cuda", "mxfp4").refused()
    assert all(plan.transformers == STAY for plan in planner(model, method="mxfp4").policies())


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, packed."""
    folder = tmp_path_factory.mktemp("trained") / "packed"
    quantize_checkpoint(bundled("t2v"), folder, "mxfp4").write()
    return folder


@pytest.fixture(scope="module")
def clips(trained: Path) -> list[tuple[Request, np.ndarray]]:
    """Requests of it, and what they make where all is held."""
    plain = mxdit.Session.open(trained)
    requests = [plain.request(frames=5, steps=2, **more) for more in ({}, {"prompt": "a blue three moving up"})]
    return [(request, plain.run(request).frames) for request in requests]


@pytest.mark.parametrize("text", [STAY, DROP])
@pytest.mark.parametrize("transformers", [STAY, SWAP])
def test_pixels_are_the_same_however_the_bundled_model_is_held(text, transformers, trained, clips, monkeypatch):
    only(monkeypatch, Policy(text, transformers))
    session = mxdit.Session.open(trained, memory="1TiB")
    experts = transformers_of(session.load())
    done = {name: list[str]() for name in experts}
    name_of = {model: name for name, model in experts.items()}
    present: list[int] = []

    def spied(model: nn.Module) -> int:
        done[name_of[model]].append("released")
        held = mapped(model)
        assert sum(map(resident, held)) > 0
        released = pages.release(model)
        present.append(sum(map(resident, held)))
        return released

    monkeypatch.setattr(offload, "release", spied)
    for name, expert in experts.items():
        expert.register_forward_hook(lambda *_, name=name: done[name].append("ran"))
    for request, frames in (*clips, clips[0]):
        assert np.array_equal(session.run(request).frames, frames)
    assert (session.load().text_encoder is None) == (text == DROP)
    once = ["ran", "ran", *(["released"] if transformers == SWAP else [])]
    assert done == dict.fromkeys(experts, once * 3) and present == [0] * (6 if transformers == SWAP else 0)


def mapped(module: nn.Module) -> list[range]:
    """The whole pages of each of a module's tensors that lies in a mapped file."""
    clean, page = list(pages._clean()), mmap.PAGESIZE
    tensors = [t for t in module.buffers() if any(low <= t.data_ptr() < high for low, high in clean)]
    return [range(-(-t.data_ptr() // page), (t.data_ptr() + t.nbytes) // page) for t in tensors]


def resident(span: range) -> int:
    """How many of these pages the process has (Linux: Documentation/admin-guide/mm/pagemap.rst)."""
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(span.start * 8)
        return int((np.frombuffer(file.read(len(span) * 8), np.uint64) >> np.uint64(63)).sum())


@pytest.mark.parametrize("task", tiny.TASKS)
def test_tiles_differ_a_little_and_do_not_outlast_their_run(task, saved, monkeypatch):
    path = saved[task]
    plain = mxdit.Session.open(path)
    image = {"image": Image.new("RGB", (32, 272), "red")} if task == "i2v" else {}
    request = plain.request(**SMALL | {"size": (272, 32), "frames": 1, "steps": 1}, **image)
    expected = plain.run(request).frames
    session = mxdit.Session.open(path, memory="1TiB")
    only(monkeypatch, Policy(vae=TILES))
    tiled = session.run(request).frames.astype(int)
    assert 0 < np.abs(tiled - expected).mean() < 8
    only(monkeypatch, Policy())
    assert np.array_equal(session.run(request).frames, expected)


def test_a_later_run_that_needs_more_is_held_closer(packed, monkeypatch):
    plain, session = mxdit.Session.open(packed), mxdit.Session.open(packed, memory="1TiB")
    request = plain.request(**SMALL)
    expected, held = plain.run(request).frames, []
    for policy in (Policy(), Policy(STAY, SWAP), Policy(DROP), Policy(DROP, SWAP), Policy()):
        only(monkeypatch, policy)
        assert np.array_equal(session.run(request).frames, expected)
        assert session._held is not None
        held.append((session._held.policy.text, session._held.policy.transformers))
    assert held == [(STAY, STAY), (STAY, SWAP), (DROP, SWAP), (DROP, SWAP), (DROP, SWAP)]


def test_a_run_that_fails_leaves_the_session_usable(packed, monkeypatch):
    only(monkeypatch, Policy(DROP, SWAP, TILES))
    session = mxdit.Session.open(packed, memory="1TiB")
    request = session.request(**SMALL)
    expected = session.run(request).frames
    with pytest.raises(KeyError):
        session.run(request, lambda *_: {}["a caller's own fault"])
    assert np.array_equal(session.run(request).frames, expected)


def test_a_budget_that_is_too_small_is_told_before_anything_is_loaded(packed):
    session = mxdit.Session.open(packed, memory="100MiB")
    with pytest.raises(InputError, match="do not fit"):
        session.run(session.request(**SMALL))
    assert session._pipeline is None


def test_a_prompt_is_encoded_once(packed, monkeypatch):
    only(monkeypatch, Policy(DROP))
    session = mxdit.Session.open(packed, memory="1TiB")
    session.run(session.request(**SMALL))
    shutil.move(packed / "text_encoder", packed / "gone")
    try:
        session.run(session.request(**SMALL | {"steps": 1}))
        with pytest.raises(mxdit.CheckpointError):
            session.run(session.request(**SMALL | {"prompt": "blue"}))
    finally:
        shutil.move(packed / "gone", packed / "text_encoder")


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_are_given_back_and_read_again(trained):
    model = mxdit.Session.open(trained).load().transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = mapped(model)
    assert sum(map(resident, held)) == sum(map(len, held))
    assert pages.release(model) > 2 << 20
    assert sum(map(resident, held)) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pages_of_what_was_quantized_while_it_loaded_are_given_back(model):
    transformer = mxdit.Session.open(model, method="mxfp4").load().transformer
    starts = [tensor.data_ptr() for tensor in (*transformer.parameters(), *transformer.buffers())]
    page = mmap.PAGESIZE
    files = [range(a // page, b // page) for a, b in pages._clean() if any(a <= start < b for start in starts)]
    assert sum(map(len, files)) * page > sum(p.nbytes for p in transformer.parameters())
    assert sum(map(resident, files)) == 0


def test_pages_that_were_written_to_stay(packed):
    model = mxdit.Session.open(packed).load().transformer
    code = model.blocks[0].ffn.net[0].proj.weight
    code[0, 0] = 77  # of a mapping that is private: no file has it
    pages.release(model)
    assert code[0, 0] == 77


# -- an accelerator ----------------------------------------------------------------------------------------------------


@pytest.fixture
def npu_by_reference(npu: object) -> Iterator[None]:
    with native.using("reference"):
        yield


@pytest.mark.usefixtures("npu_by_reference")
@pytest.mark.parametrize("transformers, stored", [(STAY, True), (SWAP, False), (SWAP, True), (BLOCKS, False)])
def test_packed_weights_move_on_an_accelerator(transformers, stored, model, packed, monkeypatch):
    path, method = (packed, None) if stored else (model, "mxfp4")
    options = {"method": method, "dtype": torch.float32, "device": "npu"}
    plain = mxdit.Session.open(path, **options)
    request = plain.request(**SMALL)
    expected = plain.run(request).frames
    only(monkeypatch, Policy(DROP, transformers))
    session = mxdit.Session.open(path, memory="1TiB", **options)
    pipeline, there = session.load(request), list[tuple[str, ...]]()
    experts = transformers_of(pipeline)
    weight = {name: expert.blocks[1].ffn.net[0].proj for name, expert in experts.items()}
    for expert in experts.values():
        expert.blocks[0].register_forward_hook(
            lambda *_: there.append(
                tuple(name for name, layer in weight.items() if layer._buffers["weight"].device.type == "npu")
            )
        )
    assert np.array_equal(session.run(request).frames, expected)
    first, second = ("transformer",), ("transformer_2",)
    seen = {STAY: {first + second}, SWAP: {first, second}, BLOCKS: {()}}
    assert set(there) == seen[transformers]
    if transformers != STAY:
        assert all(layer._buffers["weight"].device.type == "cpu" for layer in weight.values())
    assert np.array_equal(session.run(request).frames, expected)


# -- the command line --------------------------------------------------------------------------------------------------


def test_info_shows_plans(packed, monkeypatch, capsys):
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", packed, "--memory", "--size", "16x16", "--frames", 5)
    assert code == 0 and "one at a time" in out and "16x16, 5 frames on cpu" in out
    options = ("--size", "16x16", "--frames", 5, "--device", "cuda", "--json")
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", packed, "--memory", "24GiB", *options)
    found = json.loads(out)["memory"]
    assert code == 0 and found["chosen"]["policy"] == {"text": STAY, "transformers": STAY, "vae": WHOLE}
    assert found["chosen"]["budget"] == 24 << 30 and len(found["plans"]) == 12
    assert all(p["peak"] == p["floor"] + max(phase["total"] for phase in p["phases"]) for p in found["plans"])
    code, _, err = mxdit_command(monkeypatch, capsys, "info", packed, "--memory", "1MiB", "--size", "16x16")
    assert code == 2 and "--memory" in err and "expected at least" in err
    code, _, err = mxdit_command(monkeypatch, capsys, "info", "--memory", "24GiB")
    assert code == 2 and "a plan is one of a model" in err


def test_generate_keeps_a_budget(packed, monkeypatch, capsys, tmp_path):
    video = tmp_path / "seven.mp4"
    options = ("--prompt", "red", "--size", "16x16", "--frames", 5, "--steps", 2, "-o", video)
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", packed, "--memory", "4GiB", *options)
    assert code == 0 and video.is_file() and "memory: text encoder resident" in err
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", packed, "--memory", "24 apples", *options)
    assert code == 2 and "not a size of memory" in err


# -- at any size -------------------------------------------------------------------------------------------------------


def test_a_model_of_any_size_is_made_and_run_beside_its_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    full_size = importlib.import_module("full_size")
    # In this process: a plan takes the process as it is, and a fresh one imports for many seconds.
    monkeypatch.setattr(full_size, "alone", lambda function, *arguments, environment: function(*arguments))

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["full_size.py", *map(str, arguments)])
        return full_size.main(), capsys.readouterr().out

    assert call("make", tmp_path / "tiny", "--scale", "tiny")[0] == 0
    assert "transformer is there" in call("make", tmp_path / "tiny", "--scale", "tiny")[1]
    code, out, _ = mxdit_command(monkeypatch, capsys, "inspect", tmp_path / "tiny")
    assert code == 0 and "7 mxfp4, 1 mxfp8 embedding" in out
    # Of a model this small nearly all is the libraries' own, of which the system maps more or less: no limit holds there.
    call("run", tmp_path / "tiny", "--size", "64x64", "--memory", "4GiB", "--json", tmp_path / "run.json")
    row = json.loads((tmp_path / "run.json").read_text())
    assert row["forwards"] == {"transformer": 2, "transformer_2": 2} and row["kept"]
    assert row["rss"] == pytest.approx(row["plan"]["peak"], rel=0.3)
