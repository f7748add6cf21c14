"""What `mxdit eval` is made of: SQNR by its definition, digests, the cache, names of modes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mxdit
import tiny
from mxdit import MXConfig
from mxdit.errors import ConfigError, InputError
from mxdit.evals import modes, probe
from mxdit.evals.cache import Cache, digest_of_experts, digest_of_files, place_of, stats_of
from mxdit.evals.probe import velocity_errors
from mxdit.generation.recording import repeat


def test_sqnr_is_what_its_definition_says(tmp_path):
    pipe = tiny.pipeline()
    call = {
        "step": 0,
        "expert": "transformer",
        "inputs": {
            "hidden_states": torch.randn(1, 16, 2, 8, 8).bfloat16(),
            "timestep": torch.tensor([999.0]),
            "encoder_hidden_states": torch.randn(1, 6, tiny.TEXT_DIM).bfloat16(),
        },
    }
    probe.capture_layers(pipe, [call], 20, tmp_path)
    captured = torch.load(tmp_path / "transformer-0.pt")
    assert len(captured) == tiny.LINEARS * tiny.BLOCKS
    x, y = captured["blocks.1.ffn.net.2"]
    assert x.shape == (20, 576) and y.shape == (20, 64) and captured["blocks.0.attn2.to_k"][0].shape == (6, 64)
    linear = pipe.transformer.blocks[1].ffn.net[2]
    assert torch.allclose(y, x.float() @ linear.weight.float().T + linear.bias.float(), atol=1e-5)
    mxdit.quantize_(pipe.transformer, "mxfp4")
    found = {layer["path"]: layer for layer in probe.layer_errors(pipe, [tmp_path, tmp_path])}
    layer = pipe.transformer.blocks[1].ffn.net[2]
    error = layer(x).float() - y
    expected = 10 * math.log10(float(y.square().sum() / error.square().sum()))
    assert found["blocks.1.ffn.net.2"]["sqnr_db"] == pytest.approx(expected, abs=1e-3)
    assert found["blocks.1.ffn.net.2"]["n"] == 40 and found["blocks.1.ffn.net.2"]["shape"] == [64, 576]


def test_an_error_is_relative_to_the_reference_s_norm():
    error, cosine = probe.compare(torch.tensor([6.0, 8.0]), torch.tensor([3.0, 4.0]))
    assert (error, cosine) == (pytest.approx(1.0), pytest.approx(1.0))
    error, cosine = probe.compare(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert (error, cosine) == (pytest.approx(math.sqrt(5) / 2), pytest.approx(0.0))


def test_an_exact_layer_and_a_silent_one_have_a_number():
    assert probe._decibels(1.0, 0.0) == probe._decibels(0.0, 0.0) == probe.SQNR_LIMIT
    assert probe._decibels(0.0, 1.0) == -probe.SQNR_LIMIT
    assert probe._decibels(100.0, 1.0) == pytest.approx(20)


def test_what_an_expert_computes_is_its_digest():
    digests = set()
    for config in (
        "mxfp4",
        {"quant_method": "mxfp4", "activation": "mxfp8"},
        {"quant_method": "mxfp4", "mxfp4_scale_alg": 0},
    ):
        model = tiny.transformer(seed=1)
        before = digest_of_experts({"transformer": model})
        assert before == digest_of_experts({"transformer": tiny.transformer(seed=1)})
        mxdit.quantize_(model, config)
        digests |= {before, digest_of_experts({"transformer": model})}
    assert len(digests) == 4
    for policy in ({"bf16": [0]}, {"bf16": [0], "of": 4}):
        model = tiny.transformer(seed=1)
        mxdit.quantize_(model, MXConfig.from_dict({"quant_method": "mxfp4", "activation_steps": policy}))
        digests.add(digest_of_experts({"transformer": model}))
    assert len(digests) == 6
    other = tiny.transformer(seed=1)
    other.register_to_config(eps=1e-3)  # the same weights, and another function
    assert digest_of_experts({"transformer": other}) not in digests


def test_repeated_calls_have_the_activations_of_their_step():
    calls = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = {
            "hidden_states": torch.randn(1, 16, 2, 8, 8, generator=generator),
            "timestep": torch.tensor([900.0 - 300 * step]),
            "encoder_hidden_states": torch.randn(1, 6, tiny.TEXT_DIM, generator=generator),
        }
        calls.append({"step": step, "timestep": 900.0 - 300 * step, "expert": "transformer", "inputs": inputs})
    for call in calls:
        call |= {"velocity": repeat(tiny.transformer(), call), "guidance_added": 0.0}

    def errors(activation: str, policy: dict[str, list[int]]) -> list[float]:
        model = tiny.transformer()
        keys = {"quant_method": "mxfp4", "activation": activation, "activation_steps": policy}
        mxdit.quantize_(model, MXConfig.from_dict(keys))
        found = velocity_errors(SimpleNamespace(transformer=model), calls, {"transformer": 1.0})
        assert {layer.activation for layer in model.modules() if isinstance(layer, mxdit.MXLinear)} == {activation}
        return [step["velocity_error"] for step in found["steps"]]

    four, eight = errors("mxfp4", {}), errors("mxfp8", {})
    assert all(a > b for a, b in zip(four, eight, strict=True))
    assert errors("mxfp4", {"mxfp8": [0, 2], "of": 3}) == [eight[0], four[1], eight[2]]


def test_a_file_that_was_replaced_is_seen(tmp_path):
    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "weights.bin"
    file.write_bytes(b"one")
    before, files = stats_of([tmp_path]), digest_of_files(tmp_path, ())
    assert stats_of([file]) == before and digest_of_files(tmp_path, ("vae",)) != files
    file.write_bytes(b"others")
    assert stats_of([tmp_path]) != before and digest_of_files(tmp_path, ()) != files


def test_an_entry_appears_whole_or_not_at_all(tmp_path):
    cache = Cache(tmp_path / "cache")

    def fails(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise InputError("no")

    with pytest.raises(InputError):
        cache.entry({"a": 1}, fails)
    assert not list(cache.root.iterdir())
    assert cache.figures({"a": 1}, lambda: [1, 2]) == [1, 2]
    assert cache.figures({"a": 1}, lambda: None) == [1, 2]
    assert cache.figures({"a": 2}, lambda: 3) == 3


def test_modes_are_named():
    assert [mode.name for mode in modes.choose(None)] == [mode.name for mode in modes.STANDARD]
    assert [mode.name for mode in modes.choose(["mxfp8", "mxfp4 w4*"])] == [
        "bf16", "mxfp8 online", "mxfp8 offline", "mxfp4 w4a8 online", "mxfp4 w4a16 online",
    ]  # fmt: skip
    assert [mode.name for mode in modes.choose(["bf16"], ['x={"quant_method": "mxfp8"}'])] == ["bf16", "x"]
    _, both = modes.choose([], ['x={"quant_method": "mxfp8", "fused": true}'])
    assert (both.method, both.keys, both.fused) == ("mxfp8", {}, True)
    with pytest.raises(InputError, match="Did you mean 'mxfp8 online'"):
        modes.choose(["mxfp8 onlin"])
    with pytest.raises(InputError, match="two modes of one name"):
        modes.choose(None, ['mxfp8 online={"quant_method": "mxfp8"}'])
    for text in ("x", "=y", 'x={"quant_method"', "x=nowhere"):
        with pytest.raises(InputError, match=r"^mode"):
            modes.choose(None, [text])
    for keys in (
        '{"quant_method": "mxfp4", "transformer": "mxfp8"}',
        '{"activation": "mxfp8"}',
        '{"quant_method": "mxfp4", "ignored": 1}',
        '{"quant_method": "fp4"}',
    ):
        with pytest.raises(ConfigError):
            modes.choose(None, [f"x={keys}"])
    for keys, said in {
        '{"quant_method": "mxfp4", "fused": "yes"}': "mode x fused: neither true nor false; got 'yes'",
        '{"attention": "exat"}': "mode x attention: unknown method of attention; got 'exat'",
        '{"attention": {"transformer_2": 8}}': "mode x attention: not a policy of attention; got 8",
    }.items():
        with pytest.raises(ConfigError, match=f"^{said}"):
            modes.choose(None, [f"x={keys}"])


def test_results_of_other_numbers_of_threads_are_not_mixed_on_a_cpu():
    where = {"device": "cpu", "device_name": "x", "backend": "cpu", "about": "avx2", "threads": 1}
    assert place_of(where) == place_of(dict(where)) != place_of({**where, "threads": 2})
    where["device"] = "cuda:0"
    assert place_of(where) == place_of({**where, "threads": 2}) != place_of({**where, "device": "cuda:1"})
