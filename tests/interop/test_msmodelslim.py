"""What msModelSlim 26.1.0 writes, read by us: its own values, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

import mxdit
import original
import peers
import tiny
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint
from mxdit.checkpoint.canonical import read_component
from mxdit.checkpoint.component import Component
from mxdit.checkpoint.sources import open_source
from mxdit.errors import CheckpointError, InputError

READABLE = {
    "dual": {"mxfp4_dualscale"},
    "dual-smoothed": {"mxfp4_dualscale"},
    "dual-calibrated": {"mxfp4_dualscale"},
    "dual-some-float": {"mxfp4_dualscale"},
    "dual-shards": {"mxfp4_dualscale"},
    "dual-ascendv1": {"mxfp4_dualscale"},
    "dual-and-mxfp8": {"mxfp4_dualscale", "mxfp8"},
    "single": {"mxfp4"},
    "single-smoothed": {"mxfp4"},
    "single-some-float": {"mxfp4"},
    "single-and-mxfp8": {"mxfp4", "mxfp8"},
    "w4a8": {"mxfp4"},
    "mxfp8": {"mxfp8"},
    "mxfp8-some-float": {"mxfp8"},
    "mxfp8-and-w4a8": {"mxfp4", "mxfp8"},
}
MIXED = [name for name, methods in READABLE.items() if len(methods) > 1]
NUMERIC = [name for name, methods in READABLE.items() if methods != {"mxfp8"}]  # whose older files hold values
VARIANTS = [*((name, "packed") for name in READABLE), *((name, "numeric") for name in NUMERIC)]
ATTENTION = (("to_q", "to_k", "to_v"), ("to_out.0",)), (("to_q",), ("to_k", "to_v"), ("to_out.0",))
SHARING = [  # linears of a block that are smoothed together
    *([f"blocks.1.attn{n}.{name}" for name in names] for n, groups in enumerate(ATTENTION, 1) for names in groups),
    ["blocks.1.ffn.net.0.proj"],
    ["blocks.1.ffn.net.2"],
]
ZEROS = "blocks.0.ffn.net.2.weight"  # its first row is zero, see `original.transformer`


@pytest.fixture(scope="session", params=VARIANTS, ids="-".join)
def made(request: pytest.FixtureRequest, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of msModelSlim's that we read whole, as it packs it and as older tools would have stored it."""
    name, variant = request.param
    if variant == "packed":
        return quantized / name
    return peers.numeric(quantized / name, tmp_path_factory.mktemp("numeric") / name)


def oracle(directory: Path, folder: str) -> dict[str, Tensor]:
    """msModelSlim's own values by our names: what it multiplies by, and its factors."""
    paths = {theirs.rpartition(".")[0]: ours.rpartition(".")[0] for ours, theirs in original.names(tiny.BLOCKS).items()}
    values = {}
    for name, value in load_file(directory / "oracle" / f"{folder}.safetensors").items():
        path, _, leaf = name.rpartition(".")
        values[f"{paths[path]}.{leaf}"] = value
    if ZEROS in values and bool(values[ZEROS][0].isnan().all()):
        # With dual scales it computes 0 / 0 for a group of zeros, in memory; its packer writes -0.
        values[ZEROS][0] = 0
    assert not any(value.isnan().any() for value in values.values())
    return values


def decoded(expert: Component) -> dict[str, Tensor]:
    """The weights of the quantized linears, and their factors, as our reader gives them."""
    values = {}
    for path, method in expert.methods.items():
        if method:
            read = {
                leaf: expert.parts.get(f"{path}.{leaf}") for leaf in ("weight", "weight_scale", "weight_dual_scale")
            }
            codes, scale, outer = (None if part is None else part.read() for part in read.values())
            values[f"{path}.weight"] = mxdit.decode(
                mxdit.Packed(codes, scale, None if outer is None else outer.squeeze(-1), method)
            )
            if f"{path}.mul_scale" in expert.parts:
                values[f"{path}.mul_scale"] = expert.parts[f"{path}.mul_scale"].read()
    return values


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_every_value_is_msmodelslims_own(base, made):
    source, under = open_source(made), open_source(base)
    assert set(source.components) == {"transformer", "transformer_2"} and not source.pipeline
    for folder, component in original.EXPERTS.items():
        expert = read_component(source.read(component), under.read(component))
        assert expert.faults == () and expert.lost == ()
        theirs = oracle(made, folder)
        assert_equal(decoded(expert), theirs)
        assert {m for m in expert.methods.values() if m} == READABLE[made.name]
        # Everything that it left float is the model's own, in BF16; biases of quantized layers are in FP32.
        float_tensors = original.transformer(component).state_dict()
        for name, part in expert.parts.items():
            if name in float_tensors and name not in theirs:
                assert torch.equal(part.read().float(), float_tensors[name].bfloat16().float()), name
                bias = name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in theirs
                assert part.info.dtype == (torch.float32 if bias else torch.bfloat16), name


def test_its_own_smoothing_goes_by_the_largest_inputs_and_weights(quantized):
    """What benchmarks/msmodelslim_recipe.py says of it."""
    for folder, component in original.EXPERTS.items():
        theirs, model = oracle(quantized / "dual-calibrated", folder), original.transformer(component).bfloat16()
        for paths in SHARING:
            weights = [model.get_parameter(f"{path}.weight").detach().float() for path in paths]
            inputs = torch.linspace(0, 2, weights[0].shape[1]).exp2().bfloat16().float()
            factors = inputs**0.9 / torch.cat(weights).abs().amax(0) ** 0.1
            for path in paths:
                torch.testing.assert_close(theirs[f"{path}.mul_scale"], 1 / factors, rtol=2**-6, atol=0)


def test_the_converted_directory_loads_and_computes_with_these_values(base, made, tmp_path):
    convert_checkpoint(made, tmp_path / "packed", "packed", base=base).write()
    for folder, component in original.EXPERTS.items():
        model = tiny.load(tmp_path / "packed" / component, dtype=torch.float32)
        theirs = oracle(made, folder)
        layers = {path: m for path, m in model.named_modules() if isinstance(m, mxdit.MXLinear)}
        assert {f"{path}.weight" for path in layers} == {name for name in theirs if name.endswith(".weight")}
        four = "mxfp8" if "w4a8" in made.name else "mxfp4"
        assert {layer.method for layer in layers.values()} == READABLE[made.name]
        assert all(layer.activation == ("mxfp8" if layer.method == "mxfp8" else four) for layer in layers.values())
        if READABLE[made.name] != {"mxfp8"}:
            mxdit.set_activation(model, "bf16")
        exact = original.transformer(component)
        for name, weight in theirs.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "weight":
                exact.get_parameter(name).data = weight * theirs.get(f"{path}.mul_scale", torch.ones(1))
        got, want = tiny.forward(model), tiny.forward(exact)
        tolerance = 0.1 if "mxfp8" in READABLE[made.name] else 0.02  # MXFP8 activations, or BF16 ones
        assert (got - want).norm() < tolerance * want.norm()


def test_the_pipeline_runs(base, quantized, tmp_path):
    convert_checkpoint(quantized / "dual-smoothed", tmp_path / "packed", "packed", base=base).write()
    pipe = WanPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    frames = tiny.generate(pipe)
    assert frames.shape == (1, 5, 16, 16, 3) and frames.std() > 0


@pytest.mark.parametrize("name", NUMERIC)
def test_packed_and_numeric_files_convert_to_the_same_bytes(base, quantized, tmp_path, name):
    older = peers.numeric(quantized / name, tmp_path / "numeric")
    written = []
    for source in (quantized / name, older):
        destination = tmp_path / f"from {source.name}"
        convert_checkpoint(source, destination, "packed", base=base).write()
        files = sorted(destination.glob("transformer*/*"))
        written.append({str(file.relative_to(destination)): file.read_bytes() for file in files})
    assert written[0] == written[1] and len(written[0]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dual-float-smoothed", r"blocks\.0\.attn1\.to_q\.mul_scale: a float layer was smoothed.*--fallback-from-base"),
        ("dual-mxfp8-smoothed", r"blocks\.0\.attn1\.to_q\.mul_scale: mxfp8 is not smoothed.*--fallback-from-base"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_by_name(base, quantized, tmp_path, name, message):
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(quantized / name, tmp_path / "packed", "packed", base=base)
    found = inspect_checkpoint(quantized / name, base)
    assert not found.clean and len(found.components) == 2 and all(component.faults for component in found.components)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("dual-float-smoothed", ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v", "blocks.1.ffn.net.2")),
        ("dual-mxfp8-smoothed", ("blocks.0.",)),
        ("public", ("blocks.0.",)),
    ],
)  # fmt: skip
def test_the_base_gives_what_has_no_place(base, quantized, tmp_path, name, kept):
    lossy = name == "public"  # its marks of quantized attention
    if lossy:
        with pytest.raises(
            InputError, match=r"4 things would be lost.*2 marks of.*MXFP4_DYNAMIC.*4 rotations.*--allow-loss"
        ):
            convert_checkpoint(quantized / name, tmp_path / "p", "packed", base=base, fallback_from_base=True)
    plan = convert_checkpoint(
        quantized / name, tmp_path / "packed", "packed", base=base, fallback_from_base=True, allow_loss=lossy
    )
    plan.write()
    assert inspect_checkpoint(tmp_path / "packed").clean
    source = open_source(tmp_path / "packed")
    for folder, component in original.EXPERTS.items():
        theirs = {n: v for n, v in oracle(quantized / name, folder).items() if not n.startswith(kept)}
        expert = read_component(source.read(component))
        assert_equal(decoded(expert), theirs)
        for path, tensor in original.transformer(component).state_dict().items():
            if path.startswith(kept):
                assert torch.equal(expert.parts[path].read(), tensor.bfloat16()), path
        assert torch.isfinite(tiny.forward(tiny.load(tmp_path / "packed" / component))).all()


@pytest.mark.parametrize(("name", "to"), [(name, to) for name in MIXED for to in ("packed", "sglang")])
def test_each_layer_of_a_mixture_keeps_its_method(base, quantized, tmp_path, name, to):
    convert_checkpoint(quantized / name, tmp_path / "out", to, base=base, allow_loss=to == "sglang").write()
    main = max(READABLE[name], key=lambda method: name.startswith("mxfp8") == (method == "mxfp8"))
    source = open_source(tmp_path / "out")
    for folder, component in original.EXPERTS.items():
        expert = read_component(source.read(component))
        assert expert.faults == () and expert.quantization is not None
        assert_equal(decoded(expert), oracle(quantized / name, folder))
        assert expert.quantization.quant_method == main
        (others,) = expert.quantization.layer_methods.values()
        assert others == tuple(path for path, method in expert.methods.items() if method not in (None, main))
    with pytest.raises(InputError, match="vllm-omni has one method for a transformer"):
        convert_checkpoint(quantized / name, tmp_path / "vllm", "vllm-omni", base=base)


def test_the_public_recipe_becomes_a_mixture(base, quantized, tmp_path):
    """Blocks in MXFP8, the rest in MXFP4; only what its quantized attention leaves in the files has no place."""
    with pytest.raises(
        InputError, match=r"4 things would be lost.*2 marks of.*MXFP4_DYNAMIC.*4 rotations.*--allow-loss"
    ):
        convert_checkpoint(quantized / "public", tmp_path / "packed", "packed", base=base)
    convert_checkpoint(quantized / "public", tmp_path / "packed", "packed", base=base, allow_loss=True).write()
    assert inspect_checkpoint(tmp_path / "packed").clean
    convert_checkpoint(tmp_path / "packed", tmp_path / "slim", "modelslim").write()
    source = open_source(tmp_path / "packed")
    for folder, component in original.EXPERTS.items():
        expert = read_component(source.read(component))
        assert_equal(decoded(expert), oracle(quantized / "public", folder))
        assert all(method == "mxfp8" for path, method in expert.methods.items() if path.startswith("blocks.0."))
        theirs, ours = stored(quantized / "public" / folder), stored(tmp_path / "slim" / folder)
        attention = {name for name in theirs[0] if name.endswith(("q_rot", "k_rot"))}
        assert len(attention) == 4 and ours[0].keys() == theirs[0].keys() - attention
        assert all(torch.equal(as_bytes(ours[0][name]), as_bytes(theirs[0][name])) for name in ours[0])
        assert {name: theirs[1][name] for name in ours[0]} == {name: ours[1][name] for name in ours[0]}
        assert torch.isfinite(tiny.forward(tiny.load(tmp_path / "packed" / component))).all()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("low_noise_model", "low_noise_model: one expert of the cascade is missing"),
        ("high_noise_model/quant_model_description_w4a4_mxfp4.json", "no description of the quantized model"),
        ("high_noise_model/quant_model_weight_w4a4_mxfp4.safetensors", "no weights"),
    ],
)
def test_half_a_directory_is_refused(base, quantized, tmp_path, gone, message):
    copy = tmp_path / "copy"
    shutil.copytree(quantized / "single", copy)
    shutil.rmtree(copy / gone) if (copy / gone).is_dir() else (copy / gone).unlink()
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(copy, tmp_path / "packed", "packed", base=base)


def test_one_expert_at_the_root_belongs_to_the_only_one_of_the_base(quantized, tmp_path):
    """As msModelSlim writes TI2V-5B."""
    shutil.copytree(quantized / "mxfp8" / "high_noise_model", tmp_path / "root")
    whole = tiny.pipeline("t2v", torch.float32)
    WanPipeline(**{**whole.components, "transformer_2": None}, boundary_ratio=None).save_pretrained(tmp_path / "base")
    assert inspect_checkpoint(tmp_path / "root", tmp_path / "base").clean
    convert_checkpoint(tmp_path / "root", tmp_path / "packed", "packed", base=tmp_path / "base").write()
    pipe = WanPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    assert pipe.transformer_2 is None and isinstance(pipe.transformer.blocks[0].attn1.to_q, mxdit.MXLinear)
    alone = tmp_path / "base" / "transformer"  # or the expert itself is named as the base
    convert_checkpoint(tmp_path / "root", tmp_path / "alone", "packed", base=alone).write()
    names = {str(path.relative_to(tmp_path / "alone")) for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    assert names == {"config.json", f"{original.STEM}.safetensors"}


def test_the_base_may_be_in_wans_own_layout(base, quantized, tmp_path):
    plain = original.save(tmp_path / "original")
    for name, under in (("ours", base), ("theirs", plain)):
        convert_checkpoint(
            quantized / "dual-float-smoothed", tmp_path / name, "packed", base=under, fallback_from_base=True
        ).write()
    for component in original.EXPERTS.values():
        one, other = (tmp_path / name / component / f"{original.STEM}.safetensors" for name in ("ours", "theirs"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("to", ["vllm-omni", "sglang"])
@pytest.mark.parametrize("name", ["dual-some-float", "single-some-float", "mxfp8-some-float"])
def test_straight_there_or_by_way_of_packed(base, quantized, tmp_path, name, to):
    convert_checkpoint(quantized / name, tmp_path / "straight", to, base=base).write()
    convert_checkpoint(quantized / name, tmp_path / "packed", "packed", base=base).write()
    convert_checkpoint(tmp_path / "packed", tmp_path / "around", to).write()
    for file in sorted((tmp_path / "straight").glob("transformer*/*")):
        assert file.read_bytes() == (tmp_path / "around" / file.parent.name / file.name).read_bytes(), file.name
    reasons = {
        found.loaders[{"vllm-omni": "vLLM-Omni 0.30", "sglang": "SGLang 0.5.23"}[to]]
        for found in inspect_checkpoint(tmp_path / "straight").components
    }
    assert (reasons == {None}) == (to == "vllm-omni" or not name.startswith("dual"))


@pytest.mark.parametrize("name", READABLE)
def test_what_we_write_in_its_layout_is_what_it_wrote(base, quantized, tmp_path, name):
    convert_checkpoint(quantized / name, tmp_path / "packed", "packed", base=base).write()
    convert_checkpoint(tmp_path / "packed", tmp_path / "slim", "modelslim").write()
    for folder in original.EXPERTS:
        ours, theirs = (stored(directory / folder) for directory in (tmp_path / "slim", quantized / name))
        assert ours[0].keys() == theirs[0].keys()
        for tensor, value in theirs[0].items():
            if tensor.endswith(".mul_scale"):  # BF16, which our FP32 ones hold exactly
                value = value.float()
            assert ours[0][tensor].dtype == value.dtype and torch.equal(as_bytes(ours[0][tensor]), as_bytes(value)), (
                tensor
            )
        types = [{key: kind for key, kind in said.items() if key in theirs[0]} for said in (ours[1], theirs[1])]
        for said in types:  # its two savers differ in what they call the bias of a quantized layer
            said.update({key: "FLOAT" for key in said if key.endswith(".bias")})
        assert types[0] == types[1]
        if name != "mxfp8-and-w4a8":  # of two types its saver for Wan takes the last layer's, the other one the W4A8
            assert ours[1]["model_quant_type"] == theirs[1]["model_quant_type"]


def stored(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and description of one of its folders."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("quant_model_weight*.safetensors"):
        tensors.update(load_file(file))
    (description,) = folder.glob("quant_model_description*.json")
    return tensors, json.loads(description.read_text())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ["dual-smoothed", "dual-some-float"])
def test_its_followers_read_what_we_write_as_what_it_wrote(base, quantized, tmp_path, name):
    """vLLM-Omni's own merge tool, over its directory and over ours."""
    convert_checkpoint(quantized / name, tmp_path / "packed", "packed", base=base).write()
    convert_checkpoint(tmp_path / "packed", tmp_path / "slim", "modelslim").write()
    merged = []
    for way, source in (("theirs", quantized / name), ("ours", tmp_path / "slim")):
        out = peers.merged("merge_mxfp4_dualscale_checkpoint", base, source, tmp_path / f"merged {way}")
        merged.append(
            {
                component: load_file(out / component / f"{original.STEM}.safetensors")
                for component in original.EXPERTS.values()
            }
        )
        merged[-1]["configs"] = [
            json.loads((out / component / "config.json").read_text()) for component in original.EXPERTS.values()
        ]
    assert merged[0]["configs"] == merged[1]["configs"]
    for component in original.EXPERTS.values():
        theirs, ours = (of[component] for of in merged)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key].float(), ours[key].float()) for key in theirs)
