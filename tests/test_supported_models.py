"""docs/supported-models.md is what the specs say; what diffusers has beside them is listed with a reason, and errors say it."""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import replace
from pathlib import Path

import diffusers.models.transformers
import pytest
import torch
from diffusers import DiTTransformer2DModel, WanTransformer3DModel
from torch import nn

import mxdit
from mxdit.errors import CheckpointError, InputError, ModelError
from mxdit.generation.directory import open_model
from mxdit.models import SPECS, ModelSpec, spec_of
from mxdit.models.skeleton import skeleton_of
from mxdit.models.unsupported import READ, UNSUPPORTED
from mxdit.numerics.formats import FORMATS
from mxdit.quantize.sizes import FLOAT, sizes_of
from tiny_families import families, tiny_of

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[1] / "tools" / "supported_models.py"

INSTALLED = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
EXPORTED = {
    name
    for name, cls in vars(diffusers.models.transformers).items()
    if inspect.isclass(cls) and issubclass(cls, nn.Module)
}
DIT = "takes a class of ImageNet and no prompt"


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INSTALLED != READ, reason="the page is of another release of diffusers")
def test_the_page_is_what_the_specs_say():
    found = importlib.util.spec_from_file_location("supported_models", TOOL)
    assert found and found.loader
    tool = importlib.util.module_from_spec(found)
    found.loader.exec_module(tool)
    page = tool.page()
    assert tool.PAGE.read_text() == page, "run python tools/supported_models.py"
    assert all(f"`{name}`" in page for name in (*SPECS, *UNSUPPORTED))


@families
def test_sizes_are_those_of_quantized_weights(spec):
    """Told without memory, and found in a model that was quantized."""
    with torch.device("meta"):
        sizes = sizes_of(tiny_of(spec).transformer())
    assert sizes.parameters == sizes.quantized + sum(sizes.kept.values()) + sum(sizes.outside.values()) + sizes.rest
    for method in (FLOAT, *FORMATS):
        model = tiny_of(spec).transformer().bfloat16()
        if method != FLOAT:
            mxdit.quantize_(model, method)
        assert sizes.nbytes[method] == sum(tensor.nbytes for tensor in model.state_dict().values()), method


def test_degrees_are_those_of_whole_blocks_both_ways():
    def degrees(width: int, inner: int) -> tuple[int, ...]:
        with torch.device("meta"):
            model = WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=width // 2, ffn_dim=inner, num_layers=1
            )
        return sizes_of(model).degrees

    assert degrees(256, 512) == (2, 4, 8)
    assert degrees(128, 512) == (2, 4)  # K = 128 is four blocks of 32
    assert degrees(256, 512 + 64) == (2,)  # 18 blocks
    assert degrees(96, 96) == ()


# -- what is not supported ---------------------------------------------------------------------------------------------


def test_every_transformer_of_diffusers_is_known_or_listed():
    missing = EXPORTED - SPECS.keys() - UNSUPPORTED.keys()
    assert not missing, (
        f"write a spec (docs/adapting-a-model.md), or a reason in models/unsupported.py: {sorted(missing)}"
    )


def test_what_is_listed_is_there_and_not_supported():
    assert not UNSUPPORTED.keys() & SPECS.keys(), "a spec knows them: take them off models/unsupported.py"
    assert all(UNSUPPORTED.values()) and not any(why.endswith(".") for why in UNSUPPORTED.values())
    gone = UNSUPPORTED.keys() - EXPORTED
    if INSTALLED >= READ:
        assert not gone, f"diffusers has them no more: take them off models/unsupported.py: {sorted(gone)}"
    else:  # an older release lacks what came later, and no more than that
        assert len(gone) < len(UNSUPPORTED) / 2


def test_errors_say_why():
    model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=32, num_layers=1, num_embeds_ada_norm=4)
    with pytest.raises(ModelError, match=rf"got DiTTransformer2DModel\. .*{DIT}.*supported-models\.md"):
        spec_of(model)
    with pytest.raises(CheckpointError, match=rf"{DIT}.*mxdit info --families"):
        skeleton_of({"_class_name": "DiTTransformer2DModel"}, "config.json")


def test_errors_name_what_looks_alike_and_no_long_list():
    with pytest.raises(CheckpointError, match=r"Did you mean .*'WanTransformer3DModel'") as caught:
        skeleton_of({"_class_name": "WanTransformer3D"}, "config.json")
    assert len(str(caught.value)) < 400
    with pytest.raises(CheckpointError, match=r"got None\. `mxdit info"):
        skeleton_of({}, "config.json")


@pytest.mark.parametrize(
    "pipeline, transformer, said",
    [
        ("DiTPipeline", "DiTTransformer2DModel", DIT),
        ("WanPipelin", "WanTransformer3DModel", "Did you mean 'WanPipeline'"),
        ("WanVideoToVideoPipeline", "WanTransformer3DModel", "`mxdit quantize` packs it; call it through diffusers"),
    ],
)
def test_a_pipeline_that_is_not_run_is_refused_with_the_reason(tmp_path, monkeypatch, pipeline, transformer, said):
    hosting = replace(SPECS["WanTransformer3DModel"], hosts=("WanVideoToVideoPipeline",))
    monkeypatch.setitem(SPECS, "WanTransformer3DModel", hosting)
    index = {"_class_name": pipeline, "transformer": ["diffusers", transformer], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"cannot run this kind of pipeline; got {pipeline}") as caught:
        open_model(tmp_path)
    assert said in str(caught.value)


def test_a_spec_without_pipelines_is_refused_with_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(SPECS, "DiTTransformer2DModel", ModelSpec("DiTTransformer2DModel", ("transformer_blocks",)))
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"The spec of DiTTransformer2DModel names no pipelines.*write `pipelines`"):
        open_model(tmp_path)


def test_a_modular_pipeline_is_refused_with_what_runs_it(tmp_path):
    (tmp_path / "modular_model_index.json").write_text(json.dumps({"_class_name": "Flux3ModularPipeline"}))
    with pytest.raises(InputError, match=r"no model_index\.json.*Call a modular pipeline through diffusers"):
        open_model(tmp_path)
