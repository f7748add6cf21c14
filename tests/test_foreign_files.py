"""Single files of ComfyUI's: read to the bit where their meaning is certain, refused by name where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

import foreign
import mxdit
import original
import tiny
from command import mxdit_command
from foreign import KINDS, LAYER, File
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.checkpoint.folders import open_tensors
from mxdit.checkpoint.sources import open_source
from mxdit.errors import CheckpointError, InputError, MXDiTError
from mxdit.models.families.wan import WAN

pytestmark = pytest.mark.slow

DECODED = [kind for kind in KINDS if kind != "mxfp8"]
PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` has the model's config.json and no weights; `KIND.safetensors` is the file, `KIND` the same in FP32."""
    root = tmp_path_factory.mktemp("foreign")
    original.transformer("transformer").save_config(root / "base")
    for index, kind in enumerate(KINDS):
        made = File(kind, header=kind in ("nvfp4", "float8_e5m2"))
        made.save(root / f"{kind}.safetensors", PREFIXES[index % 3])
        made.save_float(root / kind)
    return root


@pytest.mark.parametrize("kind", DECODED)
def test_what_is_decoded_is_quantized_as_its_floats_are(root, tmp_path, kind):
    quantize_checkpoint(root / f"{kind}.safetensors", tmp_path / "file", "mxfp4", base=root / "base").write()
    quantize_checkpoint(root / kind, tmp_path / "float", "mxfp4").write()
    assert (tmp_path / "file" / tiny.WEIGHTS).read_bytes() == (tmp_path / "float" / tiny.WEIGHTS).read_bytes()
    assert inspect_checkpoint(tmp_path / "file").clean


@pytest.mark.parametrize("kind", DECODED)
def test_every_value_is_that_of_the_format(root, kind):
    found = File(kind).values
    source = open_source(root / f"{kind}.safetensors")
    stored = type(source)(source.path, source.spec, source.components, False, described={"": root / "base"}).read("")
    ours = original.names(tiny.BLOCKS)
    for name, tensor in stored.tensors.items():
        made, want = tensor.read(), found[ours[name]]
        assert made.dtype is want.dtype and torch.equal(made, want), name
        assert torch.equal(torch.signbit(made), torch.signbit(want)), name
    assert stored.tensors.keys() == ours.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scaled", "cast e5m2", "float8_e4m3fn"])
def test_from_single_file_gives_what_the_floats_give(root, kind):
    config = mxdit.MXConfig("mxfp4_dualscale", ignored_layers=["blocks.1.ffn.*"])
    loaded = foreign.from_single_file(root / f"{kind}.safetensors", root / "base", config)
    assert tiny.same(loaded, tiny.load(root / kind, config))


@pytest.mark.slow
def test_from_single_file_of_nvfp4_and_mxfp8_by_the_layers_own_words(tmp_path):
    """The header is not handed on by diffusers, the tensors are."""
    for kind in ("nvfp4", "mxfp8"):
        made = File(kind)
        file = made.save(tmp_path / f"{kind}.safetensors", "model.diffusion_model.")
        floats = made.save_float(tmp_path / kind)
        config = mxdit.MXConfig("mxfp8", ignored_layers=["blocks.1.*"])
        loaded = foreign.from_single_file(file, floats, config)
        if kind == "nvfp4":
            assert tiny.same(loaded, tiny.load(floats, config))
            continue
        state = loaded.state_dict()
        for name, theirs in original.names(tiny.BLOCKS).items():
            path = theirs.removesuffix(".weight")
            if path in made.scales and path.startswith("blocks.0."):
                assert torch.equal(state[name], made.tensors[theirs].view(torch.uint8)), name
                assert torch.equal(state[f"{name}_scale"], made.scales[path]), name
            else:
                assert torch.equal(state[name], made.values[theirs].to(state[name].dtype)), name
        with pytest.raises(
            CheckpointError,
            match=r'quantized already; got mxfp8; expected a float layer.* to mxfp4.*MXConfig\("mxfp8"\)',
        ):
            foreign.from_single_file(file, floats, mxdit.MXConfig("mxfp4"))
    file = File("nvfp4", header=True).save(tmp_path / "header.safetensors")
    with pytest.raises(CheckpointError, match=r"says what this scales. diffusers drops the file's header"):
        foreign.from_single_file(file, floats, mxdit.MXConfig("mxfp4"))


@pytest.mark.slow
def test_from_single_file_with_mxfp8_in_some_layers(tmp_path):
    """MXFP8 in the first block, NVFP4 in the second: the one is kept, the other quantized again."""
    eight, four = File("mxfp8"), File("nvfp4")
    second = {name: tensor for name, tensor in four.tensors.items() if name.startswith("blocks.1.")}
    mixed = File("mxfp8")
    mixed.tensors = {name: t for name, t in eight.tensors.items() if not name.startswith("blocks.1.")} | second
    file = mixed.save(tmp_path / "mixed.safetensors")
    config = mxdit.MXConfig("mxfp4", layer_methods={"mxfp8": ["blocks.0.*"]})
    floats = four.save_float(tmp_path / "four")
    loaded, wanted = foreign.from_single_file(file, floats, config).state_dict(), tiny.load(floats, config).state_dict()
    for name, theirs in original.names(tiny.BLOCKS).items():
        path = theirs.removesuffix(".weight")
        if path in eight.scales and path.startswith("blocks.0."):
            assert torch.equal(loaded[name], eight.tensors[theirs].view(torch.uint8))
            assert torch.equal(loaded[f"{name}_scale"], eight.scales[path])
        elif path in eight.scales:
            assert torch.equal(loaded[name], wanted[name]) and torch.equal(
                loaded[f"{name}_scale"], wanted[f"{name}_scale"]
            )
    for keys in ({"quant_method": "mxfp4"}, {"quant_method": "mxfp8", "layer_methods": {"mxfp4": ["blocks.0.ffn.*"]}}):
        with pytest.raises(
            CheckpointError, match=r"blocks.0.*quantized already; got mxfp8; expected a float layer, .* mxfp4"
        ):
            foreign.from_single_file(file, floats, mxdit.MXConfig(**keys))
    convert_checkpoint(file, tmp_path / "packed", "packed", base=floats).write()
    (expert,) = inspect_checkpoint(tmp_path / "packed").components
    assert not expert.faults and expert.linears == {"mxfp8": 10, "float": 16}
    stored = open_tensors(tmp_path / "packed")
    assert torch.equal(
        stored["blocks.1.attn1.to_q.weight"].read(), four.values["blocks.1.self_attn.q.weight"].bfloat16()
    )


def test_mxfp8_becomes_packed_with_the_very_codes_and_scales(root, tmp_path):
    made = File("mxfp8")
    convert_checkpoint(root / "mxfp8.safetensors", tmp_path / "packed", "packed", base=root / "base").write()
    stored = open_tensors(tmp_path / "packed")
    for name, theirs in original.names(tiny.BLOCKS).items():
        path = theirs.removesuffix(".weight")
        if path in made.scales:
            assert torch.equal(stored[name].read(), made.tensors[theirs].view(torch.uint8))
            assert torch.equal(stored[f"{name}_scale"].read(), made.scales[path])
        else:
            assert torch.equal(stored[name].read(), made.tensors[theirs])
    assert len(made.scales) == tiny.BLOCKS * tiny.LINEARS
    model = tiny.load(tmp_path / "packed")
    weight = mxdit.decode(model.blocks[0].attn1.to_q.packed())
    assert torch.equal(weight, made.values[f"{LAYER}.weight"])
    assert inspect_checkpoint(tmp_path / "packed").clean


def test_mxfp8_beside_other_kinds_and_outside_the_blocks(root, tmp_path):
    """What is in another kind, or where mxdit quantizes nothing, is decoded and written in BF16."""
    made = File("mxfp8")
    other = File("scaled").values[f"{LAYER}.weight"]
    for path, weight in ((LAYER, other), ("head.head", torch.full((64, 64), 3.0))):
        made.tensors.pop(f"{path}.weight_scale", None)
        made.tensors[f"{path}.weight"] = torch.full(weight.shape, 3.0).to(torch.float8_e4m3fn)
    made.say(LAYER, format="float8_e4m3fn")
    made.tensors[f"{LAYER}.weight_scale"] = torch.tensor(0.1)
    made.say("head.head", format="mxfp8")
    made.tensors["head.head.weight_scale"] = foreign.tiled(torch.full((64, 2), 130, dtype=torch.uint8))
    for letter in "kv":  # layers that share an input have one method
        path = LAYER[:-1] + letter
        made.say(path, format="float8_e4m3fn")
        made.tensors[f"{path}.weight_scale"] = torch.tensor(0.1)
    file = made.save(tmp_path / "x.safetensors")
    convert_checkpoint(file, tmp_path / "packed", "packed", base=root / "base").write()
    stored = open_tensors(tmp_path / "packed")
    tenth = (torch.tensor(0.1) * 3).bfloat16()
    assert torch.equal(stored["blocks.0.attn1.to_q.weight"].read(), tenth.expand(64, 64))
    assert torch.equal(stored["proj_out.weight"].read(), torch.full((64, 64), 24.0).bfloat16())
    assert inspect_checkpoint(tmp_path / "packed").components[0].linears == {"float": 9, "mxfp8": 17}


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_what_a_file_is(monkeypatch, capsys, root, kind):
    file = root / f"{kind}.safetensors"
    code, out, err = mxdit_command(monkeypatch, capsys, "inspect", file, "--base", root / "base", "--json")
    said = json.loads(out)
    (expert,) = said["experts"]
    assert (code, err, said["clean"], said["path"], expert["layout"]) == (0, "", True, str(file), "comfyui")
    quantized = tiny.BLOCKS * tiny.LINEARS
    about = "\n".join(expert["about"])
    if kind == "mxfp8":
        assert expert["linears"] == {"float": 6, "mxfp8": quantized}
        assert "read exactly: 20 MXFP8 codes, 49 bfloat16, 20 scales of MXFP8" in about and "decoded" not in about
        assert expert["loaders"]["diffusers + mxdit"] == "the comfyui layout: mxdit convert --to packed"
    else:
        assert expert["linears"] == {"float": 6 + quantized}
        words = {"cast": "FP8 E4M3, cast", "cast e5m2": "FP8 E5M2, cast", "nvfp4": "NVFP4"}
        word = words.get(kind, f"FP8 {'E5M2' if 'e5m2' in kind else 'E4M3'}, scaled")
        assert f"decoded: {quantized} {word}" in about and "read exactly: 49 bfloat16" in about
        assert ("ignored: 20 scales of activations" in about) is ("cast" not in kind)
        assert expert["loaders"]["diffusers + mxdit"] == "the comfyui layout: mxdit quantize"
    code, out, _ = mxdit_command(monkeypatch, capsys, "inspect", file, "--base", root / "base")
    assert code == 0 and all(f"  {line}" in out.splitlines() for line in expert["about"]) and out.endswith("clean\n")


def test_two_files_and_a_base_make_a_pipeline(monkeypatch, capsys, tmp_path):
    base = tiny.save(tmp_path / "base")
    for component in original.EXPERTS.values():
        shutil.rmtree(base / component)
        original.transformer(component).save_config(base / component)
        File("scaled", component).save(tmp_path / f"{component}.safetensors", "diffusion_model.")
    files = [f"{component}={tmp_path / component}.safetensors" for component in original.EXPERTS.values()]
    args = ("quantize", *files, tmp_path / "out", "--method", "mxfp4", "--base", base)
    code, _, err = mxdit_command(monkeypatch, capsys, *args)
    assert code == 0, err
    pipe = WanPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert all(mxdit.report_of(model).quantized for model in (pipe.transformer, pipe.transformer_2))
    assert torch.equal(
        pipe.transformer_2.patch_embedding.bias, original.transformer("transformer_2").bfloat16().patch_embedding.bias
    )
    code, out, _ = mxdit_command(monkeypatch, capsys, "inspect", *files, "--base", base, "--json")
    assert code == 0 and [e["component"] for e in json.loads(out)["experts"]] == list(original.EXPERTS.values())
    code, _, err = mxdit_command(
        monkeypatch, capsys, "quantize", files[0], tmp_path / "z", "--method", "mxfp4", "--base", base
    )
    assert code == 2 and "the base has other experts" in err and "transformer=FILE transformer_2=FILE" in err
    for given in ([files[0], files[0]], [files[0], str(base)], [str(base), str(base)]):
        code, _, err = mxdit_command(monkeypatch, capsys, "quantize", *given, tmp_path / "z", "--method", "mxfp4")
        assert code == 2 and "more than one source" in err
    assert not (tmp_path / "z").exists()


# -- the model's size --------------------------------------------------------------------------------------------------

PUBLISHED = {
    "Wan2.1-T2V-1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan2.2-T2V-A14B": {},
    "Wan2.2-I2V-A14B": {"in_channels": 36},
    "Wan2.2-TI2V-5B": {
        "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48,
    },
    "Wan2.1-I2V-14B": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
}  # fmt: skip


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_size_is_known_by_its_shapes(config):
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    shapes = {}
    for name, tensor in model.state_dict().items():
        theirs = WAN.to_original(name)
        assert theirs is not None and WAN.from_original(theirs) == name
        shapes[theirs] = tuple(tensor.shape)
    found = WAN.original_config(WAN.original_sizes(shapes), shapes)
    assert found.pop("_class_name") == "WanTransformer3DModel"
    wanted = {key: value for key, value in model.config.items() if not key.startswith("_")}
    assert found == wanted | {"patch_size": list(wanted["patch_size"])}


def test_another_size_asks_for_a_base(root, tmp_path):
    with pytest.raises(CheckpointError, match=r"not the sizes of a published one. .*--base DIR"):
        quantize_checkpoint(root / "cast.safetensors", tmp_path / "out", "mxfp4")
    shutil.copy(root / "cast.safetensors", tmp_path)
    original.save(tmp_path / "wan")
    for base in (root / "base", root / "cast", tmp_path / "wan" / "high_noise_model"):
        plan = quantize_checkpoint(root / "cast.safetensors", tmp_path / "out", "mxfp4", base=base)
        assert [part.component for part in plan.components] == [""] and not plan.carried
    with pytest.raises(CheckpointError, match="misshapen tensor"):
        tiny.transformer(ffn_dim=512).save_config(tmp_path / "other")
        quantize_checkpoint(root / "cast.safetensors", tmp_path / "out", "mxfp4", base=tmp_path / "other")


# -- what is refused ---------------------------------------------------------------------------------------------------

WEIGHT = f"{LAYER}.weight"


def drop(*leaves: str) -> Callable[[File], Any]:
    return lambda made: [made.tensors.pop(name) for name in list(made.tensors) if name.rpartition(".")[2] in leaves]


def put(name: str, tensor: Any) -> Callable[[File], Any]:
    return lambda made: made.tensors.update(
        {name: tensor if isinstance(tensor, torch.Tensor) else torch.tensor(tensor)}
    )


def byte(name: str, value: int) -> Callable[[File], Any]:
    return lambda made: made.tensors[name].view(torch.uint8).view(-1).fill_(value)


def say(path: str, **said: Any) -> Callable[[File], Any]:
    return lambda made: made.say(path, **said)


def head(**said: Any) -> Callable[[File], Any]:
    return lambda made: made.header.update(_quantization_metadata=json.dumps(said))


def both(*edits: Callable[[File], Any]) -> Callable[[File], Any]:
    return lambda made: [edit(made) for edit in edits]


# kind, what happens to the file, what the error says; those of the data are found when it is written.
REFUSED: dict[str, tuple[str, Callable[[File], Any], str]] = {
    "a scaled weight without its scale": ("scaled", lambda m: m.tensors.pop(f"{LAYER}.scale_weight"), rf"{WEIGHT}: .*without its scale, in a file of scaled"),
    "a configured weight without its words and scale": ("float8_e4m3fn", lambda m: [m.tensors.pop(f"{LAYER}.{leaf}") for leaf in ("comfy_quant", "weight_scale")], rf"{WEIGHT}: .*without its scale, in a file of scaled ones; expected {LAYER}.weight_scale"),
    "the mark and no scales": ("scaled", drop("scale_weight"), r"without its scale, in a file of scaled ones; expected .*scale_weight"),
    "normalized, mark and scales gone": ("scaled", drop("scale_weight", "scaled_fp8"), r"was normalized, and its scale is not in the file; got magnitudes to 4\d\d; expected at most 224"),
    "normalized E5M2": ("scaled e5m2", drop("scale_weight", "scaled_fp8"), r"normalized.*expected at most 28672"),
    "a scale a row": ("scaled", put(f"{LAYER}.scale_weight", torch.ones(64, 1)), rf"{LAYER}.scale_weight: a scale that is not one number; got \(64, 1\)"),
    "a scale of integers": ("scaled", put(f"{LAYER}.scale_weight", 1), "not one number"),
    "a scale of zero": ("scaled", put(f"{LAYER}.scale_weight", 0.0), "not finite and positive; got 0.0"),
    "a scale that is NaN": ("float8_e4m3fn", put(f"{LAYER}.weight_scale", torch.nan), "not finite and positive; got nan"),
    "a scale over floats": ("scaled", put(WEIGHT, torch.ones(64, 64)), "a scaled weight that is not in FP8"),
    "E5M2 said to be E4M3": ("float8_e5m2", say(LAYER, format="float8_e4m3fn"), r"not in FP8; got \(64, 64\) float8_e5m2; expected FP8 E4M3"),
    "a code that is NaN": ("scaled", byte(WEIGHT, 0x7F), rf"{WEIGHT}: codes that mean infs or NaNs"),
    "an infinite E5M2": ("cast e5m2", byte(WEIGHT, 0x7C), "infs or NaNs"),
    "INT8": ("mxfp8", say(LAYER, format="int8_tensorwise"), rf"{LAYER}: a layer in a format that mxdit does not read; got 'int8_tensorwise'; expected float8_e4m3fn"),
    "rotated": ("mxfp8", say(LAYER, format="mxfp8", convrot=True), "says more than mxdit knows"),
    "blocks of another size": ("mxfp8", say(LAYER, format="mxfp8", group_size=64), "says more than mxdit knows"),
    "no format": ("mxfp8", say(LAYER), "does not read; got None"),
    "a list for a format": ("mxfp8", say(LAYER, format=["mxfp8"]), "does not read"),
    "no JSON": ("mxfp8", put(f"{LAYER}.comfy_quant", torch.zeros(4, dtype=torch.uint8)), "no valid JSON"),
    "no text": ("mxfp8", put(f"{LAYER}.comfy_quant", torch.zeros(4)), "not the text of a layer's configuration"),
    "the header says otherwise": ("mxfp8", head(layers={LAYER: {"format": "nvfp4"}}), "another format than the layer"),
    "a header without layers": ("mxfp8", head(format_version="1.0"), "lists no layers; got None"),
    "a layer that is not there": ("mxfp8", head(layers={"blocks.9.x": {"format": "nvfp4"}}), "blocks.9.x: a configuration of a layer that is not there"),
    "scales nobody explains": ("mxfp8", drop("comfy_quant"), "nothing in the file says what this scales"),
    "MXFP8 without scales": ("mxfp8", drop("weight_scale"), "the mxfp8 layer lacks its scales; expected .*weight_scale"),
    "MXFP8 with plain scales": ("mxfp8", put(f"{LAYER}.weight_scale", torch.ones(64, 2, dtype=torch.uint8)), r"another shape or dtype; got \(64, 2\) uint8; expected \(128, 4\) float8_e8m0fnu, in tiles"),
    "NVFP4 without its second scale": ("nvfp4", drop("weight_scale_2"), "the nvfp4 layer lacks its scales; expected .*weight_scale_2"),
    "NVFP4 that is smoothed": ("nvfp4", put(f"{LAYER}.pre_quant_scale", torch.ones(64)), "a smoothed layer"),
    "NVFP4 of half a block": ("nvfp4", put(WEIGHT, torch.zeros(64, 4, dtype=torch.uint8)), "last block is not full"),
    "a tensor more": ("cast", put("blocks.0.lora", torch.ones(2)), "blocks.0.lora: a tensor that the model has no place for"),
    "a tensor less": ("cast", lambda m: m.tensors.pop("patch_embedding.weight"), r"patch_embedding.weight: missing tensor. .*again\.$"),
    "a block less": ("cast", lambda m: [m.tensors.pop(n) for n in list(m.tensors) if n.startswith("blocks.1.")], "missing tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind, edit, match", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(root, tmp_path, kind, edit, match):
    made = File(kind)
    edit(made)
    file = made.save(tmp_path / "x.safetensors")
    run = convert_checkpoint if kind == "mxfp8" else quantize_checkpoint
    with pytest.raises(CheckpointError, match=match):
        run(file, tmp_path / "out", "packed" if kind == "mxfp8" else "mxfp4", base=root / "base").write()
    assert not [path for path in tmp_path.iterdir() if path != file]


@pytest.mark.parametrize("name", ["a code that is NaN", "normalized, mark and scales gone", "a scale of zero"])
def test_inspect_finds_faults_of_the_data(root, tmp_path, name):
    kind, edit, _ = REFUSED[name]
    made = File(kind)
    edit(made)
    (expert,) = inspect_checkpoint(made.save(tmp_path / "x.safetensors"), root / "base").components
    assert expert.faults and expert.faults[0].where.startswith("x.safetensors: blocks.")


def test_sources_that_are_refused(root, tmp_path):
    def fails(
        source: Any, error: type[MXDiTError], match: str, run: Any = quantize_checkpoint, to: str = "mxfp4"
    ) -> None:
        with pytest.raises(error, match=match):
            run(source, tmp_path / "out", to, base=root / "base")

    file = root / "cast.safetensors"
    (tmp_path / "x.pth").write_bytes(b"")
    fails(tmp_path / "x.pth", InputError, r"not a file that mxdit reads; expected .safetensors or .gguf. PyTorch .bin")
    fails({"transformer": root / "base"}, InputError, "no such file")
    fails({"vae": file}, InputError, "no such component; expected transformer or transformer_2")
    fails({"transformer": file, "transformer_2": file}, InputError, "one file for two components")
    fails(root / "mxfp8.safetensors", CheckpointError, "quantized already; .* mxdit convert")
    fails(file, CheckpointError, "is not quantized. mxdit quantize", convert_checkpoint, "packed")
    whole = File("cast")
    whole.tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in whole.tensors.items()}
    whole.tensors["first_stage_model.conv1.weight"] = torch.ones(2)
    whole.save(tmp_path / "whole.safetensors")
    fails(tmp_path / "whole.safetensors", CheckpointError, r"more than the model: 1 tensors do not begin with model\.")
