"""mxdit's linears in the engine: which each linear got, what it holds, and what it gives, beside `mxdit.MXLinear`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quantized
from engine import Linear, Record
from hosts import in_diffusers
from mxdit.numerics.formats import PARTS
from quantized import EXPERTS, Definition
from test_baseline import assert_same_video, distance

TP: dict[str, dict[str, Any]] = {f"tp{degree}": {"tensor_parallel_size": degree} for degree in (1, 2)}
# The engine's other ways to use two processes. Each rank holds whole linears, or under HSDP half of each of their tensors.
OTHERS: dict[str, dict[str, Any]] = {
    "cfg": {"cfg_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2},
    "hsdp": {"use_hsdp": True, "hsdp_shard_size": 2},
}
WAYS = TP | OTHERS
# Both experts run in one engine, so each case has two methods: what the first gets, and what the second.
OCP = {"quant_method": "mxfp4", "mxfp4_scale_alg": 0, "ignored_layers": ["blocks.1.ffn.net.2"]}
UOS = {"quant_method": "mxfp4", "mxfp4_scale_alg": 2, "activation": "mxfp8"}
DUAL = {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}
DUAL_ONE_BLOCK = {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 1}
DUAL_DEFAULT = {"quant_method": "mxfp4_dualscale"}
MIXED = {"quant_method": "mxfp4", "mxfp4_scale_alg": 0, "layer_methods": {"mxfp8": ["blocks.0.*"]}}
DUAL_MIXED = {
    "quant_method": "mxfp4_dualscale",
    "layer_methods": {"mxfp8": ["*.attn2.*"], "mxfp4": ["blocks.0.ffn.*"]},
    "mxfp4_scale_alg": 0,
    "activation": "bf16",
}
EIGHT = {"quant_method": "mxfp8", "ignored_layers": ["blocks.0.attn1.*"]}


@dataclass(frozen=True)
class Case:
    """What two experts are quantized to, and how that comes to the engine: packed, numeric, or online from BF16."""

    configs: Mapping[str, Mapping[str, Any] | None]
    layout: str
    smooth: bool = False
    task: str = "t2v"

    @property
    def name(self) -> str:
        return f"{self.task}-" + "-".join(
            [
                *(
                    "+".join([(c or {}).get("quant_method", "bf16"), *(c or {}).get("layer_methods", ())])
                    for c in self.configs.values()
                ),
                self.layout,
                *["smooth"] * self.smooth,
            ]
        )


def experts(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any] | None]:
    return dict(zip(EXPERTS, (first, second), strict=True))


CASES = [
    Case(experts(OCP, DUAL_ONE_BLOCK), "online"),
    Case(experts(EIGHT, UOS), "online"),
    Case(experts(UOS, DUAL), "packed", smooth=True),
    Case(experts(EIGHT, OCP), "packed"),
    Case(experts(OCP, DUAL), "numeric", smooth=True),
    Case(experts(EIGHT, UOS), "numeric"),
    Case(experts(MIXED, DUAL_MIXED), "online"),
    Case(experts(DUAL_MIXED, MIXED), "packed"),
    Case(experts(DUAL_ONE_BLOCK, None), "packed", task="i2v"),
    Case(experts(DUAL_DEFAULT, UOS), "online", task="deep"),
    Case(experts(DUAL_DEFAULT, DUAL_DEFAULT), "packed", smooth=True, task="deep"),
]


@pytest.fixture(scope="session")
def written(directories, tmp_path_factory):
    """`written(case)`: (the directory that the engine is given, the packed one that says what its linears give)."""
    made: dict[str, tuple[Path, Path]] = {}

    def write(case: Case) -> tuple[Path, Path]:
        if case.name not in made:
            source, root = directories[case.task], tmp_path_factory.mktemp("quantized")
            numeric = case.layout == "numeric"
            directory = quantized.write(source, root / "model", case.configs, smooth=case.smooth, numeric=numeric)
            packed = root / "model-packed" if numeric else directory
            made[case.name] = (source if case.layout == "online" else directory, packed)
        return made[case.name]

    return write


RUNS = [
    *((case, way) for case in CASES for way in TP),
    *((case, way) for case in (CASES[0], CASES[2]) for way in OTHERS),
]


@dataclass(frozen=True)
class Ran:
    """What an engine did with a case: its record, and the packed directory that says what it should."""

    case: Case
    way: str
    record: Record
    packed: Path

    @property
    def degree(self) -> int:
        """Of tensor parallelism."""
        return WAYS[self.way].get("tensor_parallel_size", 1)

    def definition(self, expert: str) -> Definition | None:
        return Definition(self.packed / expert) if self.case.configs[expert] else None

    def quantized(self) -> Iterator[tuple[Definition, str, list[Linear]]]:
        """Each quantized linear of both experts: its definition, its name in the engine, and the layer on each rank."""
        for expert in EXPERTS:
            definition = self.definition(expert)
            for name, ranks in layers_of(self.record, expert):
                if definition and definition.quantized(name):
                    yield definition, name, ranks


def name(run: tuple[Case, str]) -> str:
    return f"{run[0].name}-{run[1]}"


@pytest.fixture(scope="module", params=RUNS, ids=name)
def ran_case(request, written, ran) -> Ran:
    case, way = request.param
    directory, packed = written(case)
    online = {"quantization_config": case.configs} if case.layout == "online" else {}
    return Ran(case, way, ran(directory, case.task, **WAYS[way], **online), packed)


def layers_of(record: Record, expert: str):
    """(name in the engine, the layer on each rank) of the linears in an expert's blocks."""
    prefix = f"{expert}."
    for name in record.ranks[0].linears:
        if name.startswith(f"{prefix}blocks."):
            yield name.removeprefix(prefix), [rank.linears[name] for rank in record.ranks]


def test_each_linear_got_the_method_that_the_config_says(ran_case):
    for expert in EXPERTS:
        definition, found = ran_case.definition(expert), 0
        for name, ranks in layers_of(ran_case.record, expert):
            wanted = "MXLinearMethod" if definition and definition.quantized(name) else "UnquantizedLinearMethod"
            assert {layer.method for layer in ranks} == {wanted}, f"{expert}.{name}"
            found += wanted == "MXLinearMethod"
        assert found > 0 or definition is None


@pytest.mark.parametrize("ran_case", [run for run in RUNS if run[0].task == "deep"], ids=name, indirect=True)
def test_dual_scale_keeps_the_first_five_blocks_of_thirty_by_default(ran_case):
    for expert, config in ran_case.case.configs.items():
        if config == DUAL_DEFAULT:
            kept = {
                int(name.split(".")[1])
                for name, ranks in layers_of(ran_case.record, expert)
                if ranks[0].method != "MXLinearMethod"
            }
            assert kept == {0, 1, 2, 3, 4}, expert


def test_ranks_hold_the_shards_and_no_float_weight(ran_case):
    for definition, name, ranks in ran_case.quantized():
        held = [{key: bits(tensor) for key, tensor in layer.tensors.items() if key in PARTS} for layer in ranks]
        if ran_case.way == "hsdp":
            held = [{key: torch.cat([parts[key] for parts in held]) for key in held[0]}]
        for rank, parts in enumerate(held):
            own = rank if ran_case.degree > 1 else 0
            wanted, _ = definition.held(name, ranks[rank].layer, own, ran_case.degree)
            assert parts.keys() == wanted.keys(), name
            for key in wanted:
                assert parts[key].dtype == wanted[key].dtype and torch.equal(parts[key], wanted[key]), f"{name}.{key}"


def test_each_linear_gives_what_is_defined(ran_case):
    for definition, name, ranks in ran_case.quantized():
        partials = []
        for rank, layer in enumerate(ranks):
            own = rank if ran_case.degree > 1 else 0
            given = definition.partial(name, layer.layer, own, ran_case.degree, layer.tensors["input"])
            assert torch.equal(given, layer.tensors["partial"]), f"{name} on rank {rank}"
            partials.append(given)
        if ranks[0].layer == "RowParallelLinear" and ran_case.degree > 1:
            assert torch.equal(torch.stack(partials).sum(0), ranks[0].tensors["output"]), name


def test_a_video_comes_of_it(ran_case):
    video = ran_case.record.video()
    assert video.shape == (5, 32, 32, 3)
    assert np.isfinite(video).all() and video.std() > 0


def test_diffusers_makes_the_same_video(written, directories, ran):
    """As nearly as it makes that of BF16: hosts round what is between the linears in other places."""
    distances = []
    for directory in (directories["t2v"], written(CASES[2])[1]):
        record = ran(directory, **TP["tp1"])
        video = in_diffusers(directory)
        assert_same_video(record, video)
        distances.append(distance(record.video(), video))
    print(f"hosts differ by {distances[0]:.2e} in BF16, by {distances[1]:.2e} quantized")
    assert distances[1] < 3 * distances[0]


def bits(tensor: Tensor) -> Tensor:
    """Bytes as uint8: for HSDP, which shards floats only, they are held as floats of one byte."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
