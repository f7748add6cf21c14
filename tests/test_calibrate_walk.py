"""A walk through the blocks of the real models gives what the models' own forward and plain autograd give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mxdit
import tiny
from mxdit.calibrate import results, sensitivity
from mxdit.calibrate.experts import Group
from mxdit.calibrate.linears import Recipe
from mxdit.calibrate.observe import bytes_of_state
from mxdit.calibrate.sensitivity import sensitivities
from mxdit.calibrate.walk import Walk, _Given
from mxdit.errors import ModelError
from mxdit.evals.cache import Cache
from mxdit.generation.recording import map_tensors, velocity_of
from mxdit.models import SPECS, spec_of
from tiny_families import TINY, tiny_of
from tiny_families.wan import wan_inputs

pytestmark = pytest.mark.slow

CALLS = 2
FORWARD_ONLY = {"Kandinsky6SRTransformer3DModel", "AnyFlowFARTransformer3DModel"}  # on a CPU
sequential = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS.values() if spec.sequential], ids=lambda spec: spec.transformer
)


def calls_of(model: nn.Module, inputs: Any, count: int = CALLS) -> list[Mapping[str, Any]]:
    """Calls of a model that differ in the latents, as a recorder keeps them."""
    calls = []
    for number in range(count):
        given = {key: value for key, value in inputs(model).items() if value is not None}
        latents = next(iter(given))
        given[latents] = map_tensors(given[latents], lambda t, number=number: t * (1 + number))
        with torch.no_grad():
            calls.append({"inputs": given, "velocity": velocity_of(model(**given))})
    return calls


def tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for part in value or () for t in tensors(part)]


@contextmanager
def outputs_of(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Any]]:
    """What modules give in a forward inside."""
    found: dict[str, Any] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: found.__setitem__(path, y))
        for path in paths
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def linears_of(model: nn.Module, walk: Walk) -> list[str]:
    return [
        f"{path}.{name}"
        for path, block in walk.blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def kept(model: nn.Module, path: str) -> bool:
    spec = spec_of(model)
    place = spec.place_of(path)
    return place is not None and spec.kept(place.inside) is not None


@pytest.fixture(
    scope="module",  # no test changes it
    params=[
        (name, more)
        for name in TINY
        for more in (False, True)
        if SPECS[name].sequential and (TINY[name].more or not more)
    ],
    ids=str,
)
def family(request) -> tuple[nn.Module, list[Mapping[str, Any]]]:
    own = TINY[request.param[0]]
    model = own.transformer(**(own.more if request.param[1] else {}))
    return model, calls_of(model, own.inputs)


def test_models_of_other_orders_are_refused():
    others = [spec for spec in SPECS.values() if not spec.sequential]
    assert {spec.transformer for spec in others} == {"WanVACETransformer3DModel", "WanAnimateTransformer3DModel"}
    for spec in others:
        with pytest.raises(ModelError, match=f"{spec.transformer}: the model cannot be run a block at a time"):
            Walk(tiny_of(spec).transformer(), [])


# -- forward ---------------------------------------------------------------------------------------------------------------


def test_every_block_gives_what_the_whole_model_s_gives(family):
    model, calls = family
    before = dict(model.named_modules())
    paths = [path for path, _ in Walk(model, []).blocks]
    wanted = []
    for call in calls:
        with outputs_of(model, paths) as found, torch.no_grad():
            model(**call["inputs"])
        assert list(found) == paths  # in the order in which they run
        wanted.append(found)
    for keep in (False, True):
        walk = Walk(model, calls, keep=keep)
        for index, (path, block, run) in enumerate(walk):
            assert block is before[path] and path == paths[index]
            with outputs_of(model, [path]) as found:
                for number, call in enumerate(run()):
                    assert call is calls[number]
                    ours, theirs = tensors(found[path]), tensors(wanted[number][path])
                    assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
            assert number == CALLS - 1
            lists = {passed.rpartition(".")[0] for passed in paths[: index + 1]}
            assert sum(map(bool, walk._given)) == (index + 1 if keep else len(lists))  # what is not needed is not kept
            assert dict(model.named_modules()) == before


@sequential
def test_only_the_block_at_hand_is_run(spec):
    own = tiny_of(spec)
    model = own.transformer()
    walk = Walk(model, calls_of(model, own.inputs))
    ran = []
    for path, block in walk.blocks:
        block.register_forward_hook(lambda _, __, ___, path=path: ran.append(path))
    for path, _, run in walk:
        assert len(list(run())) == CALLS and ran == [path] * CALLS
        ran.clear()


@sequential
def test_modules_are_restored_after_an_error(spec):
    own = tiny_of(spec)
    model = own.transformer()
    calls = calls_of(model, own.inputs)
    before = dict(model.named_modules())
    walk = Walk(model, calls)
    *_, (last, _) = walk.blocks
    linear = next(m for m in model.get_submodule(last).modules() if isinstance(m, nn.Linear))

    def fails(*_: Any) -> None:
        assert any(isinstance(m, _Given) for m in model.modules())
        raise ValueError("in a hook")

    for path, _, run in walk:
        if path == last:
            hook = linear.register_forward_pre_hook(fails)
            with pytest.raises(ValueError, match="in a hook"):
                list(run())
            hook.remove()
        else:
            list(run())
    assert dict(model.named_modules()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(velocity_of(model(**calls[0]["inputs"])), calls[0]["velocity"])


# -- backward --------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_plain_autograd(family):
    model, calls = family
    before = dict(model.named_modules())
    walk = Walk(model, calls, keep=True)
    for _, _, run in walk:
        list(run())
    paths, number = linears_of(model, walk), CALLS - 1
    direction = torch.randn_like(calls[number]["velocity"])
    with outputs_of(model, paths) as outputs:
        leaves = map_tensors(calls[number]["inputs"], lambda t: t.clone().requires_grad_(t.is_floating_point()))
        if type(model).__name__ in FORWARD_ONLY:
            with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
                model(**leaves)
            return
        velocity = velocity_of(model(**leaves))
    # HiDream runs its experts without gradients; Fibo 2.0 has modulations of a constant, whose gradients nobody asks for.
    paths = [path for path in paths if outputs[path].requires_grad and not kept(model, path)]
    grads = torch.autograd.grad(velocity, [outputs[path] for path in paths], direction, allow_unused=True)
    wanted = {path: grad for path, grad in zip(paths, grads, strict=True) if grad is not None}
    assert len(wanted) > len(paths) / 2

    found, latest = dict[str, torch.Tensor](), dict[str, torch.Tensor]()

    def hook(path: str) -> Any:
        def called(_: nn.Module, __: Any, y: torch.Tensor) -> None:
            latest[path] = y  # of a linear that a block calls twice, the second
            y.register_hook(lambda g: found.__setitem__(path, g.clone()) if latest[path] is y else None)

        return called

    hooks = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    passed = []
    for path in walk.back(number, direction):
        passed.append(path)
        assert any(name.startswith(f"{path}.") for name in found)
    for handle in hooks:
        handle.remove()
    assert passed == [path for path, _ in walk.blocks][::-1]
    for path, want in wanted.items():
        scale = float(want.abs().max())
        assert scale == 0 or float((found[path] - want).abs().max()) <= 2.0**-18 * scale, path
    assert all(not bool(found[path].any()) for path in found.keys() - wanted.keys())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dict(model.named_modules()) == before


# -- sensitivities -----------------------------------------------------------------------------------------------------------


PROBED = ("blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "blocks.1.attn2.to_v")


def small_wan() -> tuple[nn.Module, list[Mapping[str, Any]], dict[str, dict[str, nn.Module]]]:
    """A tiny Wan in fp32, a call with few latents, and two ways to run some linears."""
    model = tiny.transformer()
    inputs = wan_inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :1, :4, :4]
    calls = calls_of(model, lambda _: inputs)
    layers = {}
    for path in PROBED:
        linear = model.get_submodule(path)
        layers[path] = {
            activation: mxdit.MXLinear.from_weight(linear.weight, linear.bias, method="mxfp4", activation=activation)
            for activation in ("mxfp4", "bf16")
        }
    return model, calls, layers


def moved(model: nn.Module, call: Mapping[str, Any], path: str, layer: nn.Module) -> torch.Tensor:
    """J dY of one linear's error: what is linear in v of v J dY, by differentiating twice."""
    change: list[torch.Tensor] = []

    def called(_: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        change.append((layer(args[0]) - y).detach())
        return y.detach().requires_grad_()

    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        hook = model.get_submodule(path).register_forward_hook(called)
        with outputs_of(model, [path]) as found:
            velocity = model(**call["inputs"])[0]
        hook.remove()
        v = torch.zeros_like(velocity, requires_grad=True)
        (back,) = torch.autograd.grad(velocity, found[path], v, create_graph=True)
    return torch.autograd.grad(back, v, change[0])[0].double()


@pytest.mark.slow
def test_sensitivities_are_what_the_errors_move_the_velocity_by():
    model, calls, layers = small_wan()
    probes = 40
    *_, got = sensitivities(model, calls, layers, weights=[3.0, 1.0], probes=probes)
    for path, ways in layers.items():
        for name, layer in ways.items():
            exact = [
                float(moved(model, call, path, layer).square().sum() / call["velocity"].double().square().sum())
                for call in calls
            ]
            want = (3 * exact[0] + exact[1]) / 4
            # Four standard errors: (u.a)^2 of random signs has at most twice the squared mean as its variance.
            assert abs(got[path][name] / want - 1) < 4 * (2 / probes) ** 0.5, (path, name)


@pytest.mark.slow
def test_one_probe_sees_the_error_along_its_signs():
    model, calls, layers = small_wan()
    *_, got = sensitivities(model, calls, layers, weights=[3.0, 1.0], probes=1, seed=5)
    generator = torch.Generator().manual_seed(5)
    signs = [torch.randint(0, 2, call["velocity"].shape, generator=generator) * 2 - 1 for call in calls]
    for path, ways in layers.items():
        for name, layer in ways.items():
            want = sum(
                weight * float((u * moved(model, call, path, layer)).sum()) ** 2 / float(call["velocity"].square().sum())
                for weight, call, u in zip((3, 1), calls, signs, strict=True)
            ) / 4  # fmt: skip
            assert got[path][name] == pytest.approx(want, rel=1e-4)


def test_a_sum_grows_call_by_call_and_an_exact_layer_adds_nothing():
    model, calls, layers = small_wan()
    layers[PROBED[0]]["same"] = model.get_submodule(PROBED[0])
    before = dict(model.named_modules())
    seen = [
        {name: value for ways in so_far.values() for name, value in ways.items()}
        for so_far in sensitivities(model, calls, layers, probes=1)
    ]
    assert len(seen) == CALLS and seen[-1]["same"] == 0 and 0 < seen[0]["mxfp4"] < seen[1]["mxfp4"]
    assert dict(model.named_modules()) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_calls_that_do_not_fit_in_memory_together_come_to_the_same(monkeypatch):
    model, calls, layers = small_wan()
    calls, held = [*calls, calls[0]], list[int]()
    *_, whole = sensitivities(model, calls, layers, seed=3)
    one = len(Walk(model, []).blocks) * bytes_of_state(model, calls[0])
    back = Walk.back

    def look(walk: Walk, *args: Any) -> Any:
        held.append(walk.nbytes // one)
        return back(walk, *args)

    monkeypatch.setattr(Walk, "back", look)
    for states, most in ((0, 1), (2 * one + 1, 2)):
        held.clear()
        monkeypatch.setattr(sensitivity, "STATES", states)
        *_, parts = sensitivities(model, calls, layers, seed=3)
        assert parts == whole and max(held) == most


@pytest.mark.parametrize(("room", "fit", "held"), [(0, 8, 8), (40, 40, 10), (1000, 60, 60)])
def test_as_many_calls_as_memory_holds_are_walked(monkeypatch, tmp_path, room, fit, held):
    walked = []

    def stop(model: nn.Module, groups: Any, *calls: Any) -> None:
        walked.extend(map(len, calls[:2]))
        raise StopIteration

    monkeypatch.setattr(results, "STATES", 100 * room)
    monkeypatch.setattr(results, "bytes_of_state", lambda *_: 100)
    monkeypatch.setattr(results, "calls_in", lambda _: [{"expert": "transformer"}] * 60)
    monkeypatch.setattr(results, "inputs_of", stop)
    settings = SimpleNamespace(recipe=Recipe("mxfp4", "mxfp4"), seed=0)
    groups, clips = [Group("transformer", ("blocks.0.attn1.to_q",), 1, 1)], [tmp_path]
    with pytest.raises(StopIteration):
        results.calibrated_groups(
            tiny.transformer(), groups, clips, clips, settings, Cache(tmp_path / "cache"), {}, lambda *_: None
        )
    assert walked == [fit, held]
