"""What `infer_spec` proposes, against the specs that people wrote; models without a spec; families of other packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import mxdit
from command import mxdit_command
from mxdit.errors import InputError, ModelError
from mxdit.models import SPECS, ModelSpec, register_family
from mxdit.models.infer import ROUTER, TIMESTEP, propose
from mxdit.models.spec import MODULATION
from tiny_families import TINY, families, tiny_of
from tiny_families.parts import t5

pytestmark = pytest.mark.slow

# Transformer -> {"blocks", "groups" or "keep": why a person wrote something else than is proposed}.
DIFFERENCES: dict[str, dict[str, str]] = {
    "Flux3Transformer2DModel": {
        "blocks": "the blocks of the text and of the images to follow see nothing else, as an embedder's do, but they are "
        "first halves of the model, as deep and wide as the image's: one forward does not tell how much that matters",
    },
}
# Transformer -> what its arguments need that is not in its signature or its config.
UNMADE: dict[str, str] = {
    "AnyFlowTransformer3DModel": "a timestep of each latent frame",
    "AnyFlowFARTransformer3DModel": "how many latent frames each chunk has, which add up to those of the latents",
    "BriaFibo2Transformer2DModel": "text of several layers of its encoder: a dimension before the tokens",
    "Cosmos3OmniTransformer": "where the text and the latents of a packed sequence lie in it",
    "GlmImageTransformer2DModel": "a token of its codebook for each patch, and which of them are dropped",
    "HunyuanVideoFramepackTransformer3DModel": "earlier latents of three resolutions and their places in time",
    "Ideogram4Transformer2DModel": "text and latents of one length, and which of the two each token is",
    "Krea2Transformer2DModel": "text of several layers of its encoder: a dimension after the tokens",
    "MiniMaxH3Transformer3DModel": "where the text, video and sound of a packed sequence lie in it",
    "QwenImage21Transformer2DModel": "which places of the text are an image's, four latents each",
    "WanAnimateTransformer3DModel": "a pose and a face, which its signature has as optional",
    "WanAnimate2Transformer3DModel": "the cache that its blocks write to, an object of its own class",
}


def differences(spec: ModelSpec, proposed: ModelSpec, model: nn.Module) -> set[str]:
    """The fields of the two that come to different things for the linears that this model has."""
    inside = {
        place.inside
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (place := spec.place_of(path))
    }
    kept = {name for name in inside if spec.kept(name) is not None}
    groups = {frozenset(group) & (inside - kept) for group in spec.groups}
    found = {
        "blocks": spec.blocks == proposed.blocks,
        "groups": {group for group in groups if len(group) > 1} == set(map(frozenset, proposed.groups)),
        "keep": kept == set(proposed.keep),
    }
    return {field for field, same in found.items() if not same}


@pytest.mark.parametrize(
    "spec, more",
    [
        pytest.param(spec, more, id=f"{'more' if more else 'plain'}-{name}")
        for name, spec in SPECS.items()
        for more in (False, True)
        if not more or (name in TINY and TINY[name].more)
    ],
)
def test_the_proposal_is_what_a_person_wrote_and_the_model_stays_as_it_is(spec, more):
    own = tiny_of(spec)
    model = own.transformer(**(own.more if more else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    proposed = mxdit.infer_spec(model, own.inputs(model))
    assert proposed.transformer == spec.transformer
    assert differences(spec, proposed, model) == set(DIFFERENCES.get(spec.transformer, ())), proposed
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@families
def test_a_model_without_memory_does_and_arguments_are_made_where_none_are_given(spec):
    own = tiny_of(spec)
    with torch.device("meta"):
        model = own.transformer()
    inputs = None
    if spec.transformer in UNMADE:
        with pytest.raises(ModelError, match=r"no arguments were found that its forward takes; got .*inputs="):
            mxdit.infer_spec(model)
        inputs = own.inputs(model)
    proposed = mxdit.infer_spec(model, inputs)
    assert differences(spec, proposed, model) == set(DIFFERENCES.get(spec.transformer, ())), proposed


def test_what_is_listed_is_a_family():
    assert DIFFERENCES.keys() | UNMADE.keys() <= SPECS.keys()


def test_arguments_are_made_for_a_model_that_is_told_sizes():
    with torch.device("meta"):
        model = TINY["PixArtTransformer2DModel"].transformer(
            use_additional_conditions=True, num_attention_heads=3, attention_head_dim=32, cross_attention_dim=96
        )
    proposed = mxdit.infer_spec(model)
    assert differences(SPECS["PixArtTransformer2DModel"], proposed, model) == set()


def test_a_proposal_is_the_same_without_memory():
    real = TINY["WanTransformer3DModel"].transformer()
    with torch.device("meta"):
        meta = TINY["WanTransformer3DModel"].transformer()
    inputs = TINY["WanTransformer3DModel"].inputs(real)
    proposal = propose(real, inputs)
    assert propose(meta, inputs) == proposal
    with torch.inference_mode():
        assert propose(real, inputs) == proposal


# -- what is kept ------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A block with a router, experts, and a gate that is made from the timesteps of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)) for _ in range(4))
        self.gate = nn.Linear(64, 64)
        self.scale = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)

    def forward(self, x: Tensor, time: Tensor, row: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).any(-1)
            mixed[mine] += expert(x[mine])
        x = x + mixed * self.gate(time.to(x.dtype)) * weights.sum(-1, keepdim=True) * self.scale(row)
        return self.tied(x.to(self.tied.weight.dtype))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.unsqueeze(-1).expand(*hidden_states.shape).float()
        for layer in self.layers:
            hidden_states = layer(hidden_states, time, hidden_states.mean(1, keepdim=True))
        return hidden_states


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_routers_modulations_and_weights_that_the_model_takes_itself_are_kept(device):
    with torch.device(device):
        model = Mixture()
    inputs = {"hidden_states": torch.randn(2, 8, 64), "timestep": torch.ones(2, 8)}
    proposal = propose(model, inputs)
    assert proposal.spec.blocks == ("layers",) and not proposal.doubts
    assert proposal.spec.keep == {
        "router": ROUTER,
        "gate": TIMESTEP,
        "scale": MODULATION,
        "tied": "the model takes its weight itself (dtype), and a packed layer has none",
    }
    # Each expert's own tokens are a tensor of their own.
    assert proposal.spec.groups == ()
    report = mxdit.quantize_(Mixture(), "mxfp4", spec=proposal.spec)
    assert len(report.quantized) == 3 * 4 * 2


# -- what is grouped ---------------------------------------------------------------------------------------------------


class Cutting(nn.Module):
    """A block whose linears are given one tensor, pieces of it put together again in several ways, and one written to."""

    def __init__(self) -> None:
        super().__init__()
        names = ("whole", "sliced", "split", "sized", "swapped", "piece", "repeated", "written")
        self.linears = nn.ModuleDict({name: nn.Linear(64, 64) for name in names})

    def forward(self, x: Tensor, repeats: Tensor) -> Tensor:
        x = x + 1
        length: Any = repeats.sum() - 5  # 3, and a tensor
        head, tail = x[:, :length], x[:, length:]
        given = {
            "whole": x,
            "sliced": torch.cat([head, tail], 1),
            "split": torch.cat([x.new_empty(0), *x.split([2, 0, 6], dim=1)], dim=1),
            "sized": x.reshape(len(x), length + 5, 64),
            "swapped": torch.cat([tail, head], 1),
            "piece": torch.cat([head], 1),
            "repeated": x.repeat_interleave(repeats, dim=1),
        }
        out = sum(self.linears[name](tensor).mean() for name, tensor in given.items())
        x.mul_(2)
        return self.linears["written"](x) + out


class Cutter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        self.layers = nn.ModuleList(Cutting() for _ in range(2))

    def forward(self, hidden_states: Tensor, repeats: Tensor) -> Tensor:
        hidden_states = self.embed(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, repeats)
        return hidden_states


@pytest.mark.parametrize("shape", [(2, 8, 16), (1, 8, 16)], ids=str)
def test_what_is_cut_and_put_together_again_is_the_same_tensor(shape):
    model, inputs = Cutter(), {"hidden_states": torch.randn(shape), "repeats": torch.ones(8, dtype=torch.long)}
    model(**inputs)  # it is a forward that runs
    assert mxdit.infer_spec(model, inputs).groups == (
        ("linears.whole", "linears.sliced", "linears.split", "linears.sized"),
    )


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def test_tokens_without_a_batch_are_one_sample():
    model = Stack()
    assert mxdit.infer_spec(model, {"hidden_states": torch.randn(8, 16)}).keep == {}
    assert mxdit.infer_spec(model, {"hidden_states": torch.randn(1, 16)}).keep == {"0": MODULATION}


def test_a_real_model_that_reads_the_dtype_of_a_weight():
    """T5's second linear of the MLP, by transformers' own code."""
    proposed = mxdit.infer_spec(t5(64), {"input_ids": torch.arange(6)[None]})
    assert proposed.blocks == ("encoder.block",)
    assert list(proposed.keep) == ["layer.1.DenseReluDense.wo"]
    assert set(map(frozenset, proposed.groups)) == {
        frozenset(f"layer.0.SelfAttention.{name}" for name in "qkv"),
        frozenset(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1")),
    }


# -- what cannot be proposed -------------------------------------------------------------------------------------------


class Scalar(nn.Module):
    """Takes what no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor, odd: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.view(7, 11, 13) + odd


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (nn.Sequential(nn.ReLU()), None, "Sequential: the model has no nn.Linear"),
        (nn.Sequential(nn.Linear(8, 8)), None, "Sequential: the model has no repeated blocks; expected a ModuleList"),
        (Scalar(), {"x": torch.ones(1, 8), "odd": torch.ones(1)}, r"fails with these arguments; got RuntimeError: .*\[7, 11"),
        (Scalar(), {"y": torch.ones(1)}, r"fails with these arguments; got TypeError: .*unexpected keyword argument 'y'"),
        (Scalar(), None, r"no arguments were found that its forward takes; got \(batch, .*: RuntimeError: .*inputs=\{"),
    ],
    ids=["no linear", "no blocks", "a forward that fails", "another argument", "no arguments found"],
)  # fmt: skip
def test_what_cannot_be_proposed_is_said(model, inputs, said):
    with pytest.raises(ModelError, match=said):
        mxdit.infer_spec(model, inputs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_have_names():
    with pytest.raises(InputError, match=r"inputs infer_spec: .*; got list; expected a mapping"):
        mxdit.infer_spec(Mixture(), [torch.ones(1)])  # pyright: ignore[reportArgumentType]


# -- a spec that is not registered -------------------------------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """FLUX's transformer, as if mxdit did not know it."""
    monkeypatch.delitem(SPECS, "FluxTransformer2DModel")
    return TINY["FluxTransformer2DModel"].transformer().bfloat16()


def test_an_unknown_model_is_quantized_by_a_spec_and_reloaded_once_it_is_registered(unknown, tmp_path):
    with pytest.raises(ModelError, match=r"does not know this kind of model; .*mxdit.infer_spec .*register_family"):
        mxdit.quantize_(unknown, "mxfp4")
    spec = mxdit.infer_spec(unknown)
    decided = mxdit.plan(unknown, "mxfp4", spec=spec)
    report = mxdit.quantize_(unknown, "mxfp4", spec=spec)
    assert [layer.path for layer in report.quantized] == [path for path, made in decided.items() if made.scheme]
    assert mxdit.report_of(unknown).quantized == report.quantized
    assert "kept by the spec of FluxTransformer2DModel: modulation" in str(report)
    mxdit.set_activation(unknown, "mxfp8")
    unknown.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"does not know this kind of model; .*register_family"):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    register_family(spec)
    again: Any = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    del SPECS[spec.transformer]  # monkeypatch brings back what was there
    ours, theirs = unknown.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_spec_that_does_not_fit_is_refused(unknown):
    with pytest.raises(
        ModelError, match=r"spec: the ModelSpec is of another model; got WanTransformer3DModel; expected Flux"
    ):
        mxdit.plan(unknown, "mxfp4", spec=SPECS["WanTransformer3DModel"])
    missing = ModelSpec("FluxTransformer2DModel", blocks=("layers",))
    with pytest.raises(
        ModelError, match=r"FluxTransformer2DModel.layers: .*ModelSpec says; got nothing; expected a ModuleList"
    ):
        mxdit.quantize_(unknown, "mxfp4", spec=missing)
    with pytest.raises(ModelError, match="does not know this kind of model"):
        mxdit.report_of(unknown)  # a spec that was refused is not kept


# -- families of other packages ----------------------------------------------------------------------------------------

FAMILY = """
from mxdit.models import ModelSpec
SPECS = (ModelSpec("AStranger", ("layers",), components=("backbone",)), ModelSpec("Another", ("layers",)))
TAKEN = ModelSpec("WanTransformer3DModel", ("layers",))
NONE = object()
"""


def installed(tmp_path: Path, values: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code where a package with these entry points is installed."""
    (tmp_path / "a_strangers_family.py").write_text(FAMILY)
    (tmp_path / "a_broken_family.py").write_text("import no_such_package_here")
    info = tmp_path / "a_strangers_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-strangers-package\nVersion: 1.0\n")
    points = (f"stranger{i} = {value}\n" for i, value in enumerate(values))
    (info / "entry_points.txt").write_text("".join(["[mxdit.families]\n", *points]))
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )


def test_families_of_another_package_are_imported_when_one_is_looked_for(tmp_path):
    code = (
        "import sys, mxdit; from mxdit.models import COMPONENTS, SPECS; assert 'a_strangers_family' not in sys.modules; "
        "print(SPECS['AStranger'].blocks, 'Another' in SPECS, COMPONENTS[-1], 'WanTransformer3DModel' in SPECS)"
    )
    done = installed(tmp_path, ["a_strangers_family:SPECS"], code)
    assert done.stdout.strip() == "('layers',) True backbone True" and not done.stderr


def test_packages_that_bring_no_family_are_named_and_passed_over(tmp_path):
    said = {
        "a_strangers_family:NONE": "TypeError: got <object object",
        "a_strangers_family:TAKEN": "ValueError: mxdit has a ModelSpec of WanTransformer3DModel",
        "a_broken_family:SPECS": "ModuleNotFoundError: No module named 'no_such_package_here'",
    }
    code = "import mxdit; from mxdit.models import SPECS; print(SPECS['WanTransformer3DModel'].blocks, len(SPECS))"
    done = installed(tmp_path, list(said), code)
    assert done.stdout.strip() == f"('blocks',) {len(SPECS)}"
    for value, why in said.items():
        expected = f"the package a-strangers-package brings no model family (mxdit.families: {value}): {why}"
        assert expected in done.stderr


# -- the command -------------------------------------------------------------------------------------------------------


def test_info_prints_a_proposal_that_runs_as_it_is(monkeypatch, capsys, tmp_path):
    model = TINY["FluxTransformer2DModel"].transformer()
    model.save_config(tmp_path / "transformer")
    config, proposal = tmp_path / "transformer" / "config.json", propose(model)
    for where in (tmp_path, tmp_path / "transformer", config):
        code, out, _ = mxdit_command(monkeypatch, capsys, "info", where, "--propose")
        assert (
            code == 0 and f'"transformer_blocks",  # {proposal.shares["transformer_blocks"]:.1%} of the weights' in out
        )
        made: dict[str, Any] = {}
        exec(out, made)
        assert made["SPECS"] == (proposal.spec,)
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", config, "--propose", "--json")
    assert code == 0 and json.loads(out)["shares"] == dict(proposal.shares)
    assert json.loads(out)["keep"] == dict(proposal.spec.keep)


def test_a_proposal_says_what_was_left_out_and_what_is_not_known(monkeypatch, capsys, tmp_path):
    TINY["HunyuanVideo15Transformer3DModel"].transformer().save_config(tmp_path)
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path, "--propose")
    assert code == 0 and "# Left out: context_embedder.token_refiner.refiner_blocks: sees encoder_" in out
    assert "# Not told: the blocks hold only 26.3% of the weights of all linears." in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no transformer is here; expected a pipeline's directory"),
        ("{", "not a readable JSON file"),
        ("[]", "not a JSON object; got list"),
        ('{"_class_name": "NoSuchTransformer"}', "diffusers has no model of this class; got _class_name 'NoSuchTransformer'. .*infer_spec"),
        ('{"_class_name": "FluxTransformer2DModel", "num_layers": "two"}', "no model can be built from this config; got TypeError"),
    ],
    ids=["nothing", "no JSON", "a list", "another class", "a wrong config"],
)  # fmt: skip
def test_what_no_proposal_can_be_made_of_is_said(monkeypatch, capsys, tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path, "--propose")
    assert code == 2 and re.search(said, err), err


@pytest.mark.parametrize("args", [("--propose",), ("DIR", "--propose", "--memory", "24GiB")])
def test_a_proposal_is_one_for_a_model(monkeypatch, capsys, args):
    code, _, err = mxdit_command(monkeypatch, capsys, "info", *args)
    assert code == 2 and "--propose: a proposal is one for a model" in err
