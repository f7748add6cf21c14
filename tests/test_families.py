"""What every `ModelSpec` must hold, against the model's own code, and what becomes of its weights.

A new family is done when this file and test_families_run.py pass; docs/adapting-a-model.md has the order.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mxdit
import tiny
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.checkpoint.folders import open_tensors
from mxdit.errors import InputError, ModelError
from mxdit.generation.recording import velocity_of
from mxdit.generation.request import Request
from mxdit.integrations.diffusers_attention import attention_layers
from mxdit.models import COMPONENTS, SPECS, ModelSpec, register_family, spec_of
from mxdit.models.skeleton import skeleton_of
from mxdit.numerics.formats import FORMATS
from tiny_families import TINY, families, pipelines, tiny_of

pytestmark = pytest.mark.slow

# What a method does to a layer has tests of its own: here the first family has all of them, and others the one that asks most
# of their shapes.
methods = pytest.mark.parametrize(
    "spec, method",
    [
        pytest.param(spec, method, id=f"{method}-{name}")
        for i, (name, spec) in enumerate(SPECS.items())
        for method in FORMATS
        if i == 0 or method == "mxfp4_dualscale"
    ],
)


def forward(spec: ModelSpec, model: Any) -> torch.Tensor:
    """One call of a transformer on the family's seeded inputs."""
    with torch.no_grad():
        return velocity_of(model(**tiny_of(spec).inputs(model)))


def linears_inside(spec: ModelSpec, model: nn.Module) -> dict[str, str]:
    """Path of each linear of the blocks -> its path inside its block."""
    found = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {path: place.inside for path in found if (place := spec.place_of(path))}


# -- the spec against the model's own code -----------------------------------------------------------------------------


@families
def test_the_spec_says_all_that_is_needed(spec):
    assert getattr(diffusers, spec.transformer, None), f"diffusers has no {spec.transformer}"
    assert spec.blocks, "name the ModuleLists of the transformer's blocks in `blocks`"
    assert spec.title, "say in `title` what people call the family"
    assert all(spec.keep.values()), "say in `keep` why each of them stays"
    assert spec.published, "name in `published` the models whose sizes docs/supported-models.md shows"
    assert spec.pipelines or spec.hosts, (
        "name the pipeline classes that run the model in `pipelines`, or hold it in `hosts`"
    )
    assert spec.geometry or not spec.pipelines, "say in `geometry` what sizes the model takes"
    config = dict(tiny_of(spec).transformer().config)
    assert set(spec.needed) <= set(config), "`needed` names keys that the transformer's config does not have"
    for made in spec.pipelines.values():
        fitting = [preset for preset in spec.presets if preset.task == made.task]
        assert fitting, f"give a preset for {made.task}"
        assert fitting[-1].fits({}, 7), f"the last preset for {made.task} must fit any model of the family"
        assert len(fitting) == len({preset.name for preset in fitting}), "two presets for one task have one name"


@families
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
def test_every_linear_of_a_block_is_decided(spec, more):
    own = tiny_of(spec)
    with torch.device("meta"):
        model = own.transformer(**(own.more if more else {}))
    inside = linears_inside(spec, model)
    decided = mxdit.plan(model, "mxfp4")
    for path, decision in decided.items():
        kept = spec.kept(inside.get(path, "")) is not None
        assert bool(decision.scheme) is (path in inside and not kept), path
    for blocks in spec.blocks:
        assert any(path.startswith(f"{blocks}.") and decided[path].scheme for path in inside), (
            f"no linear of {blocks} is quantized: leave it out of `blocks`"
        )


@families
def test_every_name_in_the_spec_is_one_of_the_models(spec):
    own = tiny_of(spec)
    models = [own.transformer(), own.transformer(**own.more)]
    inside = {name for model in models for name in linears_inside(spec, model).values()}
    paths = {path for model in models for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in spec.keep:
        assert any(fnmatchcase(name, pattern) for name in inside), f"`keep` {pattern!r} matches no linear of a block"
    for name in (name for group in spec.groups for name in group):
        assert name in inside, f"`groups` names {name!r}, which no block has (or give Tiny.more a config that has it)"
    for runtime, names in spec.runtimes.items():
        for name in names:
            assert name in inside | paths, f"`runtimes` of {runtime} name {name!r}, which the model does not have"


@families
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
def test_groups_are_the_linears_that_share_an_input_and_one_row_a_sample_stays(spec, more):
    """The model's own forward tells: which linears of a block are given the same values, and which see one row.

    Values, as HunyuanVideo cuts the text off what proj_mlp reads and puts it back before q, k and v read it.
    """
    own = tiny_of(spec)
    model = own.transformer(**(own.more if more else {}))
    inside, inputs, hooks = linears_inside(spec, model), {}, []
    for path in inside:
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.__setitem__(path, args[0])
        )
        hooks.append(hook)
    forward(spec, model)
    assert inputs.keys() == inside.keys(), f"a forward never calls {inside.keys() - inputs.keys()}"
    together = defaultdict(set)
    for path, tensor in inputs.items():
        place = spec.place_of(path)
        assert place is not None
        kept = spec.kept(place.inside) is not None
        rows = tensor.numel() // tensor.shape[-1]
        assert kept is (rows == 1), f"{path} sees {rows} rows: name it in `keep` if it sees one a sample, and only then"
        if not kept:
            together[place.blocks, place.index, tensor.float().numpy().tobytes()].add(place.inside)
    groups = [set(group) for group in spec.groups]
    for (blocks, index, _), names in together.items():
        present = {name for path, name in inside.items() if path.startswith(f"{blocks}.{index}.")}
        if len(names) > 1:
            assert names in [group & present for group in groups], f"{sorted(names)} of {blocks}.{index} share an input"
    for path, name in inside.items():
        place = spec.place_of(path)
        assert place is not None
        if spec.kept(name):
            continue
        shared = next(names for key, names in together.items() if key[:2] == place[:2] and name in names)
        for group in groups:
            if name in group:
                missing = {other for other in group - shared if f"{path[: -len(name)]}{other}" in inside}
                assert not missing, f"`groups`: {name} and {sorted(missing)} do not share an input in {place.blocks}"


# Families whose attention diffusers computes without a table of backends, and those that take another one in some calls.
WITHOUT_BACKENDS = {
    "AllegroTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "CosmosTransformer3DModel",
    "EasyAnimateTransformer3DModel",
    "HiDreamImageTransformer2DModel",
    "Kandinsky6SRTransformer3DModel",
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SD3Transformer2DModel",
}
OTHER_BACKENDS = {"AnyFlowFARTransformer3DModel", "QwenImage21Transformer2DModel", "WanAnimate2Transformer3DModel"}


@families
def test_a_policy_of_attention_reaches_every_layer_or_is_refused(spec):
    model = tiny_of(spec).transformer()
    pipe, layers = SimpleNamespace(transformer=model), attention_layers(model)
    if spec.transformer in WITHOUT_BACKENDS | OTHER_BACKENDS:
        why = "which is made for|which also takes" if spec.transformer in OTHER_BACKENDS else "without looking up"
        with pytest.raises(ModelError, match=f"attention {spec.transformer}.*({why})"):
            mxdit.attention_policy(pipe, "exact")
        return
    inside, entered, reached = list[str](), set[str](), set[str]()

    class Reached(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.mxdit.attention.default:
                reached.add(inside[-1])
            elif inside and "scaled_dot_product" in str(func):
                raise AssertionError(f"{inside[-1]} has torch's attention, too")
            return func(*args, **(kwargs or {}))

    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, path=path: inside.append(path))
        layer.register_forward_hook(lambda *_: entered.add(inside.pop()))
    with mxdit.attention_policy(pipe, "exact"), Reached():
        forward(spec, model)
    assert entered and reached == entered


@families
def test_the_first_blocks_are_counted_in_running_order(spec):
    with torch.device("meta"):
        model = tiny_of(spec).transformer()
    lists = [len(model.get_submodule(blocks)) for blocks in spec.blocks]
    first = lists[0] + 1 if len(lists) > 1 else 1
    decided = mxdit.plan(model, {"quant_method": "mxfp4", "num_bf16_fallback_layers": first})
    kept = {path.rpartition(f".{place.inside}")[0] for path in decided if (place := spec.place_of(path))}
    kept -= {
        path.rpartition(f".{place.inside}")[0]
        for path, decision in decided.items()
        if (place := spec.place_of(path)) and decision.scheme
    }
    order = [f"{blocks}.{i}" for blocks, n in zip(spec.blocks, lists, strict=True) for i in range(n)]
    assert kept == set(order[:first])


def modular(pipeline: type) -> bool:
    """Whether it is made of blocks, which say what components they need, and takes none when it is made."""
    return issubclass(pipeline, diffusers.ModularPipeline)


@families
def test_hosts_hold_the_model(spec):
    for name in spec.hosts:
        pipeline = getattr(diffusers, name, None)
        assert pipeline is not None, f"diffusers has no {name}"
        made_of = getattr(diffusers, pipeline.default_blocks_name)().component_names if modular(pipeline) else ()
        components = {*inspect.signature(pipeline.__init__).parameters, *made_of}
        assert components & set(spec.components), f"{name} has no component named {' or '.join(spec.components)}"


@pipelines
def test_the_pipeline_takes_what_the_spec_hands_it(spec, name):
    pipeline = getattr(diffusers, name, None)
    assert pipeline is not None, f"diffusers has no {name}"
    called, fields = spec.pipelines[name], set(Request.__dataclass_fields__)
    arguments = set(inspect.signature(pipeline.__call__).parameters)
    components = set(inspect.signature(pipeline.__init__).parameters)
    assert components & set(spec.components), f"{name} has no component named {' or '.join(spec.components)}"
    assert {"generator", "output_type"} <= arguments and set(called.float32) <= components
    for field, place in called.call.items():
        component, _, argument = place.rpartition(".")
        assert field in fields, f"a Request has no field {field!r}"
        if component == "config":
            assert argument in components, f"{name} has no setting {argument!r}"
        elif component:
            assert component in components, f"{name} has no component {component!r}"
        else:
            assert argument in arguments, f"{name}'s call takes no {argument!r}"
    for preset in spec.presets:
        if preset.task == called.task:
            assert set(preset.arguments) <= arguments - set(called.call.values())


# -- quantize, save, reload, convert, inspect ---------------------------------------------------------------------------


class Transformers(dict[str, Path]):
    """A float transformer's directory of each family, made when it is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        self[name] = self.root / name
        TINY[name].transformer().bfloat16().save_pretrained(self[name])
        return self[name]


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Transformers:
    return Transformers(tmp_path_factory.mktemp("transformers"))


def loaded(spec: ModelSpec, directory: Path, config: Any = None) -> Any:
    transformer = getattr(diffusers, spec.transformer)
    return transformer.from_pretrained(directory, torch_dtype=torch.bfloat16, quantization_config=config)


@methods
def test_quantize_save_reload(transformers, tmp_path, spec, method):
    model, floats = (loaded(spec, transformers[spec.transformer]) for _ in range(2))
    report = mxdit.quantize_(model, method)
    assert report.quantized and {layer.method for layer in report.quantized} == {method}
    exact, output = forward(spec, floats).float(), forward(spec, model)
    assert 0 < (output.float() - exact).norm() / exact.norm() < 0.5
    model.save_pretrained(tmp_path)
    again = loaded(spec, tmp_path)
    assert tiny.same(again, model) and torch.equal(forward(spec, again), output)


def contents(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_tensors(directory).items()}


@methods
def test_offline_as_online_then_every_layout_and_back(transformers, tmp_path, spec, method):
    source = transformers[spec.transformer]
    loaded(spec, source, mxdit.MXConfig(method)).save_pretrained(tmp_path / "online")
    quantize_checkpoint(source, tmp_path / "packed", method).write()
    online, packed = contents(tmp_path / "online"), contents(tmp_path / "packed")
    assert online.keys() == packed.keys()
    for name, tensor in packed.items():
        assert torch.equal(tensor, online[name].to(tensor.dtype)), (
            name
        )  # what diffusers keeps in FP32 was BF16 in the file
    assert inspect_checkpoint(source).clean
    inspection = inspect_checkpoint(tmp_path / "packed")
    assert inspection.clean and inspection.components[0].loaders["diffusers + mxdit"] is None
    assert set(inspection.components[0].kept) == {
        path for path, name in linears_inside(spec, tiny_of(spec).transformer()).items()
        if spec.kept(name) is not None
    }  # fmt: skip

    for to in ("packed", "vllm-omni", "sglang"):
        if to != "packed" and to not in spec.runtimes:
            with pytest.raises(InputError, match=rf"layers of {spec.transformer}\. Use the packed layout"):
                convert_checkpoint(tmp_path / "packed", tmp_path / to, to)
            runtime = {"vllm-omni": "vLLM-Omni 0.30", "sglang": "SGLang 0.5.23"}[to]
            assert spec.transformer in str(inspection.components[0].loaders[runtime])
            continue
        convert_checkpoint(tmp_path / "packed", tmp_path / f"to {to}", to, allow_loss=True).write()
        assert inspect_checkpoint(tmp_path / f"to {to}").clean
        convert_checkpoint(tmp_path / f"to {to}", tmp_path / f"from {to}", "packed", allow_loss=True).write()
        back = contents(tmp_path / f"from {to}")
        assert back.keys() == packed.keys() and all(torch.equal(back[name], packed[name]) for name in packed)


@families
def test_a_config_makes_the_skeleton(transformers, spec):
    where = transformers[spec.transformer]
    skeleton = skeleton_of(json.loads((where / "config.json").read_text()), str(where))
    assert type(skeleton).__name__ == spec.transformer and spec_of(skeleton) is spec
    assert skeleton.state_dict().keys() == contents(where).keys()


# Those for which diffusers has no way to load a LoRA: neither their pipelines nor the models themselves.
WITHOUT_LORA = {"AllegroTransformer3DModel", "EasyAnimateTransformer3DModel", "PixArtTransformer2DModel"}


# -- adapters ----------------------------------------------------------------------------------------------------------


@families
def test_a_lora_file_is_loaded_beside_quantized_weights(transformers, spec):
    """By the loader of a pipeline, where diffusers has one, else by the model's own; taken off, the bits are as before."""
    names = (*spec.pipelines, *spec.hosts)
    loader = next(
        (cls for name in names if hasattr(cls := getattr(diffusers, name), "load_lora_into_transformer")), None
    )
    model = loaded(spec, transformers[spec.transformer])
    report, state = mxdit.quantize_(model, "mxfp4"), dict[str, torch.Tensor]()
    for i, layer in enumerate(report.quantized[:8]):
        outputs, inputs = layer.shape
        generator = torch.Generator().manual_seed(i)
        state[f"transformer.{layer.path}.lora_A.weight"] = torch.randn(4, inputs, generator=generator) * 0.2
        state[f"transformer.{layer.path}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.2
    plain = forward(spec, model)
    if spec.transformer in WITHOUT_LORA:
        assert loader is None and not hasattr(model, "load_lora_adapter"), "it can load a LoRA now"
        return
    if loader is None:
        model.load_lora_adapter(state, prefix="transformer")
    else:
        given = inspect.signature(loader.load_lora_into_transformer).parameters
        alphas = {"network_alphas": None} if "network_alphas" in given else {}
        loader.load_lora_into_transformer(state, transformer=model, **alphas)
    assert not torch.equal(forward(spec, model), plain)
    model.unload_lora()
    assert torch.equal(forward(spec, model), plain)


@pytest.fixture
def registry():
    specs = dict(SPECS)
    yield
    SPECS.clear()
    SPECS.update(specs)


def test_a_family_can_be_registered_at_run_time(registry):
    class TinyTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(64, 64), "gate": nn.Linear(64, 64)}) for _ in "ab"
            )

    register_family(ModelSpec("TinyTransformer", blocks=("layers",), keep={"gate": "small"}, components=("backbone",)))
    assert COMPONENTS[-1] == "backbone"
    report = mxdit.quantize_(TinyTransformer(), "mxfp4")
    assert [layer.path for layer in report.quantized] == ["layers.0.up", "layers.1.up"]
