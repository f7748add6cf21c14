"""A session whose blocks are compiled: as good as an eager one, kept on the disk, bounded, and refused where it cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import loras
import tiny
from command import mxdit_command
from mxdit.checkpoint import quantize_checkpoint
from mxdit.config.loras import LoraFile
from mxdit.errors import InputError, ModelError
from mxdit.generation import compiling
from mxdit.generation.directory import open_model
from mxdit.generation.plan import BLOCKS, DROP, SWAP, Planner, Policy
from mxdit.generation.session import Session
from mxdit.models import SPECS
from tiny_families import tiny_of

pytestmark = pytest.mark.slow

SMALL: Any = {"prompt": "a red seven", "size": (16, 16), "frames": 5, "steps": 4}
ARGS = ("--prompt", "a red seven", "--size", "16x16", "--frames", 5, "--steps", 4)
OPTIONS: Any = {"method": "mxfp4", "dtype": torch.float32}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def fresh(kept, monkeypatch):
    """As in a process of its own, with what others of this file left on the disk."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setenv(compiling.CACHE, str(kept))
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "wan")


def latents(session: Session, **fields: Any) -> tuple[np.ndarray, torch.Tensor, int | None]:
    """(frames, last latents, graphs that were compiled) of a run."""
    seen = []
    result = session.run(session.request(**SMALL | fields), on_latents=lambda _, x: seen.append(x.clone()))
    made = result.compile_seconds
    return result.frames, seen[-1], None if made is None else len(made)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_as_good_as_eager_and_kept_for_the_next_process(model, kept):
    eager, floats = Session.open(model, **OPTIONS), Session.open(model, dtype=torch.float32)
    first = Session.open(model, **OPTIONS, compile=True)
    frames, last, graphs = latents(first)
    assert graphs == 1, "of all blocks of both experts"
    exactly, no_bits = latents(eager)[1], latents(floats)[1]
    # Sums in FP32 differ in their last bits, and a code is another one where a value lies between two: 0 seen, and 0.0145 for
    # what four bits cost themselves.
    assert apart(last, exactly) < apart(exactly, no_bits) / 10
    assert latents(first)[2] == 0 and counters["stats"]["unique_graphs"] == 2  # and that of the trial
    assert any(kept.iterdir()) and not counters["graph_break"]

    torch.compiler.reset()
    counters.clear()
    second = Session.open(model, **OPTIONS, compile=True)
    again, _, graphs = latents(second)
    assert (
        graphs == 1
        and counters["inductor"]["fxgraph_cache_hit"] == 2
        and not counters["inductor"]["fxgraph_cache_miss"]
    )
    assert np.array_equal(again, frames)


def test_no_more_graphs_than_activations_sizes_and_adapters(model, tmp_path, monkeypatch):
    """Graphs as torch traces them, run without inductor: to the bit what eager blocks give."""
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda _: lambda graph, inputs: graph)
    monkeypatch.setattr(compiling, "prepare", lambda device: None)  # nothing is compiled
    eager, session = Session.open(model, **OPTIONS), Session.open(model, **OPTIONS, compile=True)

    def made(**fields: Any) -> int:
        frames, last, graphs = latents(session, **fields)
        expected, exactly, _ = latents(eager, **fields)
        assert torch.equal(last, exactly) and np.array_equal(frames, expected)
        assert graphs is not None
        return graphs

    policy = {"mxfp8": [0, 3], "bf16": [2], "of": 4}
    monkeypatch.setattr(compiling, "_made", 0)
    assert made() == 1 and made(activation_steps=policy) == 2 and compiling._made == 3
    assert made(activation_steps=policy) == made() == 0
    sizes = [made(size=size) for size in ((16, 32), (32, 32), (32, 16), (16, 48))]
    assert sum(sizes) <= 3 and sizes[-1] == 0, "one for every axis that varies, and no more"
    files = [loras.made(tmp_path / f"{n}.safetensors", seed=n) for n in range(2)]
    assert [made(loras=[LoraFile(files[n], 0.8, "transformer")]) for n in (0, 1)] == [1, 1]
    assert made() == 1 and made() == 0, "without the adapters that are there"
    monkeypatch.setattr(compiling, "_made", compiling.ROOM)
    assert made() == 2 and made() == 0, "all were let go: of blocks that have adapters and of those that never had"
    assert not counters["graph_break"]


def test_under_a_plan_of_memory(model, tmp_path, monkeypatch):
    quantize_checkpoint(model, tmp_path / "packed", "mxfp4").write()
    options: Any = {"dtype": torch.float32, "compile": True}
    expected, _, _ = latents(Session.open(tmp_path / "packed", **options))
    monkeypatch.setattr(Planner, "policies", lambda _: iter([Policy(DROP, SWAP)]))
    session = Session.open(tmp_path / "packed", **options, memory="1TiB")
    frames, _, graphs = latents(session)
    assert np.array_equal(frames, expected) and graphs == 0


# -- refused -------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_no_weight_is_read(monkeypatch, capsys, tmp_path, model):
    monkeypatch.setattr("mxdit.generation.loading.load", None)
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "empty"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(InputError, match=r"no-such-compiler.*needs a C\+\+ compiler") as caught:
            Session.open(model, compile=True).load()
        assert caught.value.field == "compile"
        code, _, said = mxdit_command(
            monkeypatch, capsys, "generate", model, *ARGS, "--compile", "-o", tmp_path / "a.mp4"
        )
    assert code == 2 and "--compile: torch.compile does not work here" in said and not (tmp_path / "a.mp4").exists()


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, model):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"cannot be kept here.*{compiling.CACHE} names another"):
        Session.open(model, compile=True).load()


def test_torch_s_own_place_among_temporary_files_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for named in (None, f"{gettempdir()}/torchinductor_me"):
        monkeypatch.delenv(compiling.CACHE) if named is None else monkeypatch.setenv(compiling.CACHE, named)
        assert compiling._place() == tmp_path / "mxdit" / "compiled"
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "mine"))
    assert compiling._place() == tmp_path / "mine"


def test_blocks_that_come_and_go_are_not_compiled(model):
    with pytest.raises(InputError, match="are not compiled") as caught:
        Session.open(model, offload=True, compile=True)
    assert caught.value.field == "compile"
    opened = open_model(model)
    for compiled in (False, True):
        planner = Planner(opened, "t2v", dict.fromkeys(opened.components), torch.bfloat16, "cuda", compiled=compiled)
        ways = {policy.transformers for policy in planner.policies()}
        assert SWAP in ways and (BLOCKS in ways) is not compiled


def test_a_block_that_is_no_single_graph():
    """HiDream's experts look at how many tokens each of them got."""
    own = tiny_of(SPECS["HiDreamImageTransformer2DModel"])
    model = own.transformer()
    compiling.compile_blocks([model])
    said = pytest.raises(ModelError, match=r"HiDream.*cannot be compiled.*Leave compile out")
    with torch.no_grad(), said, compiling.listening([model]):
        model(**own.inputs(model))


def test_the_command(monkeypatch, capsys, model, tmp_path):
    args = ("generate", model, *ARGS, "--method", "mxfp4", "--dtype", "fp32", "--json", "-o", tmp_path / "a.mp4")
    level = compiling.logger.level
    with monkeypatch.context() as alone:
        alone.setattr(logging.getLogger(), "handlers", [])  # pytest's, beside which the command would add none
        code, shown, said = mxdit_command(monkeypatch, capsys, *args, "--compile")
    said = " ".join(said.split())  # lines are folded
    assert "compiling WanTransformerBlock, graph 1: this step takes longer" in said and "compiled graph 1 in " in said
    compiling.logger.setLevel(level)
    assert code == 0 and len(json.loads(shown)["compile_seconds"]) == 1
    code, shown, _ = mxdit_command(monkeypatch, capsys, *args)
    assert code == 0 and json.loads(shown)["compile_seconds"] is None
