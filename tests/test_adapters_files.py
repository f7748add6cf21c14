"""Adapters' files as trainers write them: by whichever names, they are the same adapter beside quantized linears."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loras
import mxdit
import mxdit_models
import tiny
from adapted import lora
from mxdit.errors import FormatError
from mxdit.layers import linears_of
from mxdit.models.skeleton import skeleton_of
from mxdit.quantize.loras import check_layers, layers_of, named
from tiny_families import flux

pytestmark = pytest.mark.slow

ORIGINAL = {  # Wan's own names of the linears
    **{f"attn1.to_{name}": f"self_attn.{name}" for name in "qkv"},
    **{f"attn2.to_{name}": f"cross_attn.{name}" for name in "qkv"},
    **{"attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o"},
    **{"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"},
}
RANK = 4


def original(state: dict[str, Tensor], down: str, up: str, alpha: float | None = None) -> dict[str, Tensor]:
    """By Wan's names: ``blocks.0.self_attn.q.<down>.weight``, and an alpha of each linear."""
    found = {}
    for name, tensor in state.items():
        _, block, rest = name.removeprefix("transformer.").split(".", 2)
        path, part = rest.split(".lora_")
        stem = f"blocks.{block}.{ORIGINAL[path]}"
        found[f"{stem}.{down if part.startswith('A') else up}.weight"] = tensor
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def comfyui(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"diffusion_model.{name}": t for name, t in original(state, "lora_A", "lora_B").items()}


def lightning(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"diffusion_model.{name}": t for name, t in original(state, "lora_down", "lora_up", RANK / 2).items()}


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in original(state, "lora_down", "lora_up", RANK / 2).items():
        end = name.find(".lora_") if ".lora_" in name else name.find(".alpha")
        found[f"lora_unet_{name[:end].replace('.', '_')}{name[end:]}"] = tensor
    return found


def older_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for name, tensor in state.items()}


# The trainer whose names they are -> the same tensors by these, and what they count for there.
DIALECTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], float]] = {
    "PEFT": (dict, 1.0),
    "diffusers": (older_diffusers, 1.0),
    "ComfyUI": (comfyui, 1.0),
    "Lightning": (lightning, 0.5),
    "Kohya": (kohya, 0.5),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_dialect_is_the_same_adapter(dialect, dtype, tmp_path):
    by_name, weight = DIALECTS[dialect]
    pipe = tiny.pipeline()
    for model in (pipe.transformer, pipe.transformer_2):
        mxdit.quantize_(model, "mxfp4")
    plain = tiny.forward(pipe.transformer_2)
    state = {k: t.to(dtype) for k, t in lora(pipe.transformer_2, RANK, linears=ORIGINAL).items() if "proj_out" not in k}
    pipe.load_lora_weights(state, adapter_name="a", load_into_transformer_2=True)
    pipe.set_adapters("a", weight)
    want = tiny.forward(pipe.transformer_2)
    pipe.unload_lora_weights()

    file = tmp_path / f"{dialect}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in by_name(state).items()}, file)
    pipe.load_lora_weights(str(file), adapter_name="a", load_into_transformer_2=True)
    assert torch.equal(tiny.forward(pipe.transformer_2), want) and not torch.equal(want, plain)
    pipe.unload_lora_weights()
    mxdit.load_lora_weights(pipe, {"transformer_2": file}, "a")
    assert torch.equal(tiny.forward(pipe.transformer_2), want)
    assert pipe.get_list_adapters() == {"transformer_2": ["a"]}


def test_a_config_in_the_header_is_followed_as_diffusers_does(tmp_path):
    """Ranks and alphas by pattern, and rank-stabilized: to the bit what diffusers' own call gives, quantized or not."""
    file = loras.peft_file(tmp_path / "peft.safetensors")
    pipe = tiny.pipeline()
    mxdit.quantize_(pipe.transformer, "mxfp4")
    for component, model in (("transformer", pipe.transformer), ("transformer_2", pipe.transformer_2)):
        pipe.load_lora_weights(str(file), adapter_name="a", load_into_transformer_2=component == "transformer_2")
        want = tiny.forward(model)
        pipe.unload_lora_weights()
        plain = tiny.forward(model)
        mxdit.load_lora_weights(pipe, {component: file}, "a")
        assert torch.equal(tiny.forward(model), want) and not torch.equal(want, plain)
        pipe.unload_lora_weights()
        assert torch.equal(tiny.forward(model), plain)


def test_the_bundled_adapter_fits_both_experts():
    bundled = Path(mxdit_models.__file__).parent
    skeleton = skeleton_of(json.loads((bundled / "t2v" / "transformer" / "config.json").read_text()), "t2v")
    files = sorted((bundled / "burning").iterdir())
    assert [file.name for file in files] == ["transformer.safetensors", "transformer_2.safetensors"]
    assert sum(file.stat().st_size for file in files) < 1 << 20
    for file in files:
        state = named(load_file(file), "transformer")
        check_layers(layers_of(state, file.name), skeleton, file.name)
        assert len(state) == 2 * 40 and {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_flux_by_mxdit_s_verb(tmp_path):
    """FLUX.1's pipeline compares shapes of weights and would widen packed ones: refused there, and unchanged."""
    pipe = flux.flux_pipeline("t2i")
    model = pipe.transformer
    mxdit.quantize_(model, "mxfp4")
    family = flux.flux_inputs(model)
    found = dict(linears_of(model))
    paths = [path for path in found if path.endswith(("attn.to_q", "ff.net.2", "proj_mlp"))]
    generator = torch.Generator().manual_seed(0)
    state = {
        f"transformer.{path}.lora_{part}.weight": torch.randn(shape, generator=generator) / 8
        for path in paths
        for part, shape in (("A", (4, found[path].in_features)), ("B", (found[path].out_features, 4)))
    }
    with torch.no_grad():
        plain = model(**family, return_dict=False)[0]
        with pytest.raises(FormatError, match=r"call mxdit\.load_lora_weights"):
            pipe.load_lora_weights(state, adapter_name="a")
        assert torch.equal(model(**family, return_dict=False)[0], plain)
        save_file(state, tmp_path / "a.safetensors")
        mxdit.load_lora_weights(pipe, {"transformer": tmp_path / "a.safetensors"}, "a")
        assert not torch.equal(model(**family, return_dict=False)[0], plain)
        pipe.unload_lora_weights()
        assert torch.equal(model(**family, return_dict=False)[0], plain)
