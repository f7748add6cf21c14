"""`mxdit quantize --lora`: what diffusers' `load_lora_weights` and `fuse_lora` give, and what is refused instead of dropped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, WanPipeline

import loras
import tiny
from command import mxdit_command
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.checkpoint.files import StoredTensor
from mxdit.checkpoint.folders import open_tensors
from mxdit.checkpoint.loras import MERGED, check_fits
from mxdit.errors import MXDiTError
from mxdit.integrations.lora_files import read_lora
from mxdit.models import SPECS
from tiny_families import flux

pytestmark = pytest.mark.slow

WAN = SPECS["WanTransformer3DModel"]
EXPERTS = ("transformer", "transformer_2")
ALL = [path for path, part in tiny.transformer().named_modules() if isinstance(part, torch.nn.Linear)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        made[dtype] = tmp_path_factory.mktemp("source") / "wan"
        tiny.pipeline(dtype=dtype).save_pretrained(made[dtype])
    return made


SMALL = [path for path in ALL if "blocks" in path]
HALF = {"dtype": torch.bfloat16}
FORMS: dict[str, Callable[[Path], Path]] = {
    "diffusers": lambda file: loras.save(file, loras.diffusers(loras.layers(paths=[*ALL]))),
    "diffusers, with biases": lambda file: loras.save(file, loras.diffusers(loras.layers(), bias=True)),
    "diffusers, older": lambda file: loras.save(
        file,
        {
            name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
            for name, tensor in loras.diffusers(loras.layers(paths=SMALL[:3])).items()
        },
    ),
    "peft's config": loras.peft_file,
    "ComfyUI": lambda file: loras.save(file, loras.original(loras.layers(), down="lora_A", up="lora_B")),
    "Lightning": lambda file: loras.save(file, loras.original(loras.layers(**HALF), alpha=3.0, bias=True)),
    # A whole difference of the head, as in Wan2.2-Distill-Loras: diffusers makes a product with the identity of it.
    "a difference": lambda file: loras.save(
        file,
        {
            **loras.original(loras.layers(), bias=True),
            "diffusion_model.head.head.diff": loras.layers(rank=64)["blocks.0.attn1.to_q"]["A"],
            "diffusion_model.head.head.diff_b": torch.linspace(-1, 1, 64),
        },
    ),
    "Kohya": lambda file: loras.save(file, loras.kohya(loras.layers(dtype=torch.float16), alpha=2.5)),
}


def fused(source: Path, out: Path, dtype: torch.dtype, files: dict[str, list[tuple[Path, float]]]) -> Path:
    """The source with LoRAs fused by diffusers and peft in this dtype, one after the other."""
    pipe: Any = WanPipeline.from_pretrained(source, torch_dtype=dtype)
    for component, given in files.items():
        for number, (file, scale) in enumerate(given):
            pipe.load_lora_weights(
                str(file), adapter_name=f"a{number}", load_into_transformer_2=component == "transformer_2"
            )
            pipe.fuse_lora([component], lora_scale=scale, adapter_names=[f"a{number}"])
            pipe.unload_lora_weights()  # which leaves what is fused; the next one's `set_adapter` would undo it
    pipe.save_pretrained(out)
    return out


def quantized(
    source: Path, out: Path, files: dict[str, list[tuple[Path, float]]], method: str = "mxfp4", **options: Any
) -> Path:
    given = {name: [(read_lora(file, WAN), scale) for file, scale in of] for name, of in files.items()}
    quantize_checkpoint(source, out, method, loras=given, **options).write()
    return out


def assert_same(a: Path, b: Path) -> None:
    for expert in EXPERTS:
        ours, theirs = open_tensors(a / expert), open_tensors(b / expert)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            mine, other = tensor.read(), theirs[name].read()
            assert mine.dtype is other.dtype and torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_as_diffusers_fuses_it_in_fp32(sources, tmp_path, form):
    """Bit for bit, whatever the source's dtype: a BF16 source is the same numbers in FP32."""
    file = form(tmp_path / "lora.safetensors")
    files = {"transformer": [(file, 0.7)]}
    for dtype, source in sources.items():
        theirs = fused(source, tmp_path / f"fused {dtype}", torch.float32, files)
        quantize_checkpoint(theirs, tmp_path / f"theirs {dtype}", "mxfp4").write()
        ours = quantized(source, tmp_path / f"ours {dtype}", files)
        assert_same(ours, tmp_path / f"theirs {dtype}")
        plain = quantized(source, tmp_path / f"plain {dtype}", {})
        with pytest.raises(AssertionError):  # or nothing was merged
            assert_same(ours, plain)


@pytest.mark.parametrize("method, options", [("mxfp8", {}), ("mxfp4_dualscale", {"dtype": torch.float16})])
def test_several_on_both_experts(sources, tmp_path, method, options):
    one, two = loras.made(tmp_path / "one.safetensors"), loras.made(tmp_path / "two.safetensors", seed=1, rank=7)
    files = {"transformer": [(one, 1.0), (two, -0.3)], "transformer_2": [(two, 0.45)]}
    theirs = fused(sources[torch.float32], tmp_path / "fused", torch.float32, files)
    quantize_checkpoint(theirs, tmp_path / "theirs", method, **options).write()
    ours = quantized(sources[torch.float32], tmp_path / "ours", files, method, **options)
    assert_same(ours, tmp_path / "theirs")


def test_fp32_is_nearer_to_the_sum_than_bf16(sources, tmp_path):
    """diffusers rounds the product and the sum of a BF16 model to BF16 each; one rounding, of the FP32 sum, is nearer."""
    file = loras.made(tmp_path / "lora.safetensors")
    files = {"transformer": [(file, 0.7)]}
    source = sources[torch.bfloat16]
    half = open_tensors(fused(source, tmp_path / "half", torch.bfloat16, files) / "transformer")
    whole = quantized(source, tmp_path / "ours", files, overrides={"transformer": None})
    mine, before = open_tensors(whole / "transformer"), open_tensors(source / "transformer")
    errors = {"ours": 0.0, "theirs": 0.0}
    for path, of in loras.layers().items():
        exact = before[f"{path}.weight"].read().double() + 0.7 * (of["B"].double() @ of["A"].double())
        for name, tensors in (("ours", mine), ("theirs", half)):
            errors[name] += float((tensors[f"{path}.weight"].read().double() - exact).square().sum())
    assert 0 < errors["ours"] < errors["theirs"] / 2


def test_it_is_written_down_and_everybody_tolerates_it(sources, tmp_path, monkeypatch, capsys):
    file = loras.made(tmp_path / "style.safetensors")
    code, out, err = mxdit_command(
        monkeypatch, capsys, "quantize", sources[torch.bfloat16], tmp_path / "out", "--method", "mxfp4", "--json",
        "--lora", f"transformer={file}:0.5", "--lora", f"transformer_2={file}", "--lora", f"transformer={file}:-1e-1",
    )  # fmt: skip
    assert code == 0, err
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    noted = [{"file": "style.safetensors", "sha256": digest, "scale": scale} for scale in (0.5, -0.1)]
    assert next(expert["config"][MERGED] for expert in json.loads(out)["experts"]) == noted
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())[MERGED] == noted
    quantized(
        sources[torch.bfloat16],
        tmp_path / "same",
        {"transformer": [(file, 0.5), (file, -0.1)], "transformer_2": [(file, 1.0)]},
    )
    assert_same(tmp_path / "out", tmp_path / "same")
    inspection = inspect_checkpoint(tmp_path / "out")
    assert inspection.clean and list(inspection.components[0].loras) == noted
    assert inspection.to_dict()["experts"][1]["loras"] == [{**noted[0], "scale": 1.0}]
    code, out, _ = mxdit_command(monkeypatch, capsys, "inspect", tmp_path / "out")
    assert f"merged: file style.safetensors scale 0.5 sha256 {digest}" in out
    # diffusers keeps it, and so do other layouts
    tiny.load(tmp_path / "out/transformer").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())[MERGED] == noted
    convert_checkpoint(tmp_path / "out", tmp_path / "omni", "vllm-omni").write()
    assert [dict(lora) for lora in inspect_checkpoint(tmp_path / "omni").components[0].loras] == noted


def test_a_component_alone_and_another_family(tmp_path):
    tiny.transformer(seed=4).save_pretrained(tmp_path / "one")
    file = loras.made(tmp_path / "lora.safetensors")
    quantize_checkpoint(tmp_path / "one", tmp_path / "out", "mxfp4", loras={"": [(read_lora(file, WAN), 1.0)]}).write()
    pipe = flux.flux_pipeline("t2i").to(torch.float32)
    pipe.save_pretrained(tmp_path / "flux")
    made = loras.layers(pipe.transformer)
    state = loras.diffusers(made)
    state |= {f"transformer.{path}.alpha": torch.tensor(6.0) for path in made}
    file = loras.save(tmp_path / "flux.safetensors", state)
    given = {"transformer": [(read_lora(file, SPECS["FluxTransformer2DModel"]), 0.5)]}
    quantize_checkpoint(tmp_path / "flux", tmp_path / "ours", "mxfp4", loras=given).write()
    pipe = FluxPipeline.from_pretrained(tmp_path / "flux", torch_dtype=torch.float32)
    pipe.load_lora_weights(str(file), adapter_name="a")
    pipe.fuse_lora(["transformer"], lora_scale=0.5)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    quantize_checkpoint(tmp_path / "fused", tmp_path / "theirs", "mxfp4").write()
    ours, theirs = open_tensors(tmp_path / "ours/transformer"), open_tensors(tmp_path / "theirs/transformer")
    assert all(torch.equal(tensor.read(), theirs[name].read()) for name, tensor in ours.items())


def test_matrices_are_read_when_their_layer_passes(tmp_path, monkeypatch):
    """And no others: what diffusers converts is not read by that."""
    file, read = loras.save(tmp_path / "lora.safetensors", loras.original(loras.layers(), alpha=3.0)), list[str]()
    plain = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self: read.append(self.name) or plain(self))
    layer = read_lora(file, WAN).layers["blocks.1.ffn.net.2"]
    read.clear()
    down = layer.down.read()
    assert [name.rpartition("diffusion_model.")[2] for name in read] == ["blocks.1.ffn.2.lora_down.weight"]
    assert torch.equal(down, loras.layers()["blocks.1.ffn.net.2"]["A"] * 0.75)


# -- what it refuses ---------------------------------------------------------------------------------------------------

Q = "blocks.0.attn1.to_q"
Damage = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def changed(name: str, tensor: torch.Tensor | None) -> Damage:
    return lambda state: {k: v for k, v in {**state, name: tensor}.items() if v is not None}


NAN = torch.full((loras.RANK, 64), float("nan"))
REFUSED: dict[str, tuple[Damage, str]] = {
    "an unknown module": (
        lambda s: {k.replace("blocks.0.attn1.to_q", "blocks.7.attn1.to_q"): v for k, v in s.items()},
        "blocks.7.attn1.to_q: the LoRA changes a module that the model does not have",
    ),
    "no linear": (
        lambda s: {k.replace("blocks.0.attn1.to_q", "blocks.0.attn1.norm_q"): v for k, v in s.items()},
        "blocks.0.attn1.norm_q: the LoRA changes no linear; got RMSNorm",
    ),
    "a wrong shape": (changed(f"transformer.{Q}.lora_A.weight", torch.ones(loras.RANK, 65)), f"{Q}.lora_A.weight: .*expected .4, 64."),
    "no common rank": (changed(f"transformer.{Q}.lora_A.weight", torch.ones(3, 64)), f"{Q}: the two matrices have no common rank"),
    "a missing half": (changed(f"transformer.{Q}.lora_B.weight", None), f"{Q}.lora_B.weight"),
    "NaN": (changed(f"transformer.{Q}.lora_A.weight", NAN), f"transformer.{Q}.lora_A.weight: the LoRA holds infs or NaNs"),
    "inf": (changed(f"transformer.{Q}.lora_A.weight", NAN.nan_to_num(float("inf"))), "infs or NaNs"),
    "DoRA": (changed(f"transformer.{Q}.dora_scale", torch.ones(64)), f"transformer.{Q}.dora_scale: a DoRA"),
    "DoRA of peft": (changed(f"transformer.{Q}.lora_magnitude_vector", torch.ones(64)), "a DoRA"),
    "a leaf without meaning": (changed(f"transformer.{Q}.lora_E.weight", torch.ones(4)), f"{Q}.lora_E.weight: no tensor of a LoRA"),
    "another component": (changed("text_encoder.layers.0.q.lora_A.weight", torch.ones(4, 4)), "text_encoder.layers.0.q.lora_A.weight"),
    "an expert in the names": (changed(f"transformer_2.{Q}.lora_A.weight", torch.ones(4, 4)), f"transformer_2.{Q}.lora_A.weight: a tensor that is"),
    "nothing": (lambda s: {}, "the file holds no LoRA"),
    "peft's own prefix": (lambda s: {k.replace("transformer.", "base_model.model."): v for k, v in s.items()}, "base_model.model.* not the transformer's"),
    "no prefix": (lambda s: {k.removeprefix("transformer."): v for k, v in s.items()}, "not the transformer's"),
    "integers": (changed(f"transformer.{Q}.lora_A.weight", torch.ones(loras.RANK, 64, dtype=torch.int8)), "a dtype that no LoRA has"),
    "a checkpoint": (lambda s: {**tiny.transformer().state_dict()}, "not the transformer's"),
    "another family's": (
        lambda s: loras.diffusers(loras.layers(flux.flux_pipeline("t2i").transformer)),
        "transformer_blocks.0.*: the LoRA changes a module that the model does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, said", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_place_is_refused_by_name(sources, tmp_path, damage, said):
    state = damage(loras.diffusers(loras.layers(paths=[Q, "blocks.1.ffn.net.2"])))
    file = loras.save(tmp_path / "lora.safetensors", state)
    with pytest.raises(MXDiTError, match=said) as caught:
        quantized(sources[torch.float32], tmp_path / "out", {"transformer": [(file, 1.0)]})
    assert "lora.safetensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_bias_that_is_not_there(tmp_path):
    model = tiny.transformer()
    model.blocks[0].attn1.to_q.bias = None
    file = loras.save(tmp_path / "lora.safetensors", loras.diffusers(loras.layers(paths=[Q]), bias=True))
    with pytest.raises(MXDiTError, match=f"{Q}: the LoRA changes a bias that the linear does not have"):
        check_fits(read_lora(file, WAN), model)


DROPPED = {
    "a norm's difference": ("diffusion_model.blocks.0.self_attn.norm_q.diff", 64),
    "time_projection's bias alone": ("diffusion_model.time_projection.1.diff_b", 384),
    "a difference without a place": ("diffusion_model.blocks.0.diff", 64),
}


@pytest.mark.parametrize("name, size", DROPPED.values(), ids=DROPPED.keys())
def test_what_diffusers_drops_is_refused_unless_it_is_nothing(tmp_path, name, size):
    state = loras.original(loras.layers(), alpha=4.0)
    file = loras.save(tmp_path / "zeros.safetensors", {**state, name: torch.zeros(size)})
    assert len(read_lora(file, WAN).layers) == len(loras.layers())  # CausVid's norms, say: nothing is lost with them
    file = loras.save(tmp_path / "lora.safetensors", {**state, name: torch.arange(float(size))})
    with pytest.raises(MXDiTError, match=f"{name}: diffusers drops this tensor"):
        read_lora(file, WAN)


HEADERS = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "another rank": ({"r": 8}, "rank 8.*the rank 4"),
    "no alpha": ({"lora_alpha": None}, "alpha None"),
    "another kind": ({"peft_type": "LOHA"}, "peft_type"),
    "weights that were taken apart": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "other modules": ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    "a thing of tomorrow": ({"use_quantum": True}, "use_quantum"),
}


@pytest.mark.parametrize("keys, said", HEADERS.values(), ids=HEADERS.keys())
def test_a_config_that_is_not_understood_is_refused(tmp_path, keys, said):
    config = {f"transformer.{key}": value for key, value in {"r": 4, "lora_alpha": 4, **keys}.items()}
    state = loras.diffusers(loras.layers(paths=[Q]))
    file = loras.save(tmp_path / "lora.safetensors", state, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(MXDiTError, match=said):
        read_lora(file, WAN)
    with pytest.raises(MXDiTError, match="is no JSON"):
        read_lora(loras.save(file, state, {"lora_adapter_metadata": "{"}), WAN)


def test_a_family_without_loras_and_calibrated_weights(sources, tmp_path):
    file = loras.made(tmp_path / "lora.safetensors")
    with pytest.raises(MXDiTError, match="no LoRA for this family; got HunyuanVideo15Transformer3DModel"):
        read_lora(file, SPECS["HunyuanVideo15Transformer3DModel"])
    given: Any = {"transformer": [(read_lora(file, WAN), 1.0)]}
    calibrated: Any = {"transformer": {"blocks.0.attn1.to_q.weight": None}}
    with pytest.raises(MXDiTError, match="beside calibrated weights"):
        quantize_checkpoint(sources[torch.float32], tmp_path / "out", "mxfp4", loras=given, calibrated=calibrated)
    with pytest.raises(MXDiTError, match="component that the checkpoint does not have; got transformer_3"):
        quantize_checkpoint(
            sources[torch.float32], tmp_path / "out", "mxfp4", loras={"transformer_3": given["transformer"]}
        )


BAD = {
    "no transformer named": (["{lora}"], "expected transformer={lora} or transformer_2={lora}"),
    "no such file": (["transformer=none.safetensors"], "--lora none.safetensors: no such file"),
    "no such file, with a scale": (["transformer=none.safetensors:0.5"], "--lora none.safetensors: no such file"),
    "a scale that is none": (["transformer={lora}:big"], "the scale is no finite number; got 'big'"),
    "an infinite scale": (["transformer={lora}:inf"], "the scale is no finite number; got inf"),
    "a scale of NaN": (["transformer={lora}:nan"], "the scale is no finite number; got nan"),
    "no scale behind the colon": (["transformer={lora}:"], "the scale is no finite number; got ''"),
    "another transformer": (["transformer_3={lora}"], "it is not said which transformer"),
    "no safetensors": (["transformer=" + __file__], "not a safetensors file"),
}


@pytest.mark.parametrize("given, said", BAD.values(), ids=BAD.keys())
def test_bad_options_are_one_line_and_code_2(monkeypatch, capsys, sources, tmp_path, given, said):
    file = loras.made(tmp_path / "lora.safetensors")
    args = [word for text in given for word in ("--lora", text.format(lora=file))]
    code, out, err = mxdit_command(
        monkeypatch, capsys, "quantize", sources[torch.float32], tmp_path / "out", "--method", "mxfp4", *args
    )
    assert code == 2 and out == "" and err.count("\n") == 1 and said.format(lora=file) in err
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_colon_of_the_files_own(monkeypatch, capsys, tmp_path):
    tiny.transformer(seed=4).save_pretrained(tmp_path / "one")
    file = loras.made(tmp_path / "a=b" / "v1:0.5")
    args = ("quantize", tmp_path / "one", tmp_path / "out", "--method", "mxfp4", "--json", "--lora", f"{file}")
    code, out, err = mxdit_command(monkeypatch, capsys, *args)
    assert code == 0, err
    noted = json.loads(out)["experts"][0]["config"][MERGED]
    assert [(lora["file"], lora["scale"]) for lora in noted] == [("v1:0.5", 1.0)]


def test_a_changed_lora_is_another_plan(sources, tmp_path):
    """An interrupted run must not go on with the shards of another LoRA of the same name."""
    file = loras.made(tmp_path / "lora.safetensors")
    plans = []
    for seed in (0, 1):
        loras.made(file, seed=seed)
        given = {"transformer": [(read_lora(file, WAN), 1.0)]}
        plans.append(quantize_checkpoint(sources[torch.float32], tmp_path / "out", "mxfp4", loras=given))
    assert plans[0].to_dict() != plans[1].to_dict()
    assert file in plans[0].components[0].reads and file not in plans[0].components[1].reads
