"""A `ModelSpec` proposed for a module that has none, from its structure and one forward without memory."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from mxdit.errors import InputError, ModelError
from mxdit.models import uncompiled
from mxdit.models.made_inputs import trace_with_made_inputs
from mxdit.models.skeleton import said
from mxdit.models.spec import MODULATION, ModelSpec
from mxdit.models.tracing import FAILURES, Trace, trace

ROUTER = "router: its outputs choose experts, and a small error is another expert"
TIMESTEP = "modulation: it reads the timestep alone, and its error is one of every token"
MINOR = 0.05  # share of the weights below which a list of blocks is an embedder rather than the model
_TIME = r"(.*_)?(timesteps?|sigma|t|time)(_r)?"  # names of arguments


@dataclass(frozen=True)
class Proposal:
    """What `infer_spec` proposes, and what a person should know who reviews it.

    spec      the ModelSpec.
    shares    its lists of blocks -> share of the weights of all linears that their linears hold.
    left_out  further lists of repeated modules -> why their linears stay as they are.
    doubts    what one forward could not tell, a sentence each.
    inputs    what the forward was called with, in words.
    """

    spec: ModelSpec
    shares: Mapping[str, float]
    left_out: Mapping[str, str]
    doubts: tuple[str, ...]
    inputs: str


def infer_spec(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> ModelSpec:
    """Propose a ModelSpec for any module: `blocks` by repetition, `groups` and `keep` by what one forward shows.

    The forward runs without weights and without their memory, wherever the model is: one on the meta device of any size will
    do. A proposal is to be reviewed (docs/adapting-a-model.md): `mxdit info DIR --propose` shows its reasons.

    Args:
        model: a transformer, whether or not mxdit knows its class.
        inputs: arguments of one forward by their names, of any small size. By default they are made, from the names that
            diffusers' transformers have for theirs.

    Raises:
        ModelError: the model has no linears or no repeated blocks, its forward fails with `inputs`, or none could be made.
        InputError: `inputs` is not a mapping.
    """
    return propose(model, inputs).spec


def propose(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Proposal:
    """As `infer_spec`, with what a reviewer should know."""
    model = uncompiled(model)
    where = type(model).__name__
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(
            "not the arguments of a forward by their names",
            where="infer_spec",
            field="inputs",
            got=type(inputs).__name__,
            expected="a mapping, as in {'hidden_states': ...}",
        )
    weights = {path: module.weight.numel() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not weights:
        raise ModelError(
            "the model has no nn.Linear",
            where=where,
            hint="Only linears are quantized. Pass a model that is not quantized yet.",
        )
    lists = {path: len(blocks) for path, blocks in _lists(model, "")}
    if not lists:
        raise ModelError(
            "the model has no repeated blocks",
            where=where,
            expected="a ModuleList whose items are of one class and hold linears",
            hint="Write a ModelSpec by hand: docs/adapting-a-model.md.",
        )
    watched = [f"{path}.{index}" for path, count in lists.items() for index in range(count)]
    if inputs is None:
        seen, inputs, how = trace_with_made_inputs(model, watched)
        how = f"made, with latents as {how}"
    else:
        how = "given"
        try:
            seen = trace(model, inputs, watched)
        except FAILURES as error:
            raise ModelError(
                "its forward fails with these arguments",
                where=where,
                got=said(error),
                hint="Give those of a forward that runs. What depends on the numbers of weights cannot be decided here.",
            ) from error
    names = [name for name in inspect.signature(model.forward).parameters if name in inputs]
    first = next(iter(names), "")
    described = f"{', '.join(names)}: {how}"
    return _proposal(model, weights, lists, seen, _batch(inputs.get(first)), first, described)


def _lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """The outermost ModuleLists whose items are of one class, and hold linears inside them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        items = list(child) if isinstance(child, nn.ModuleList) else []
        inside = (part for item in items for part in list(item.modules())[1:])
        if len({type(item) for item in items}) == 1 and any(isinstance(part, nn.Linear) for part in inside):
            yield path, items
        else:
            yield from _lists(child, f"{path}.")


def _batch(first: Any) -> int:
    """Samples of a forward, by its first argument: a tensor of them, or a list; 1 where all tokens are one sequence."""
    if isinstance(first, Tensor):
        return len(first) if first.ndim > (2 if first.is_floating_point() else 1) else 1
    return len(first) if isinstance(first, list | tuple) else 1


def _proposal(
    model: nn.Module,
    weights: Mapping[str, int],
    lists: Mapping[str, int],
    seen: Trace,
    batch: int,
    first: str,
    described: str,
) -> Proposal:
    everything = sum(weights.values())
    all_of = ModelSpec(type(model).__name__, tuple(lists))
    held: dict[str, int] = defaultdict(int)
    for path, numbers in weights.items():
        if place := all_of.place_of(path):
            held[place.blocks] += numbers
    reads: dict[str, set[str]] = defaultdict(set)  # of the lists that ran, in that order
    for path, own in seen.blocks.items():
        reads[path.rpartition(".")[0]] |= own
    left_out = {}
    for path in lists:
        share = held[path] / everything
        if path not in reads:
            left_out[path] = f"never ran with these arguments; {share:.1%} of the weights"
        elif reads[path] and first not in reads[path]:
            left_out[path] = f"sees {' and '.join(sorted(reads[path]))} alone; {share:.1%} of the weights"
        elif share < MINOR:
            left_out[path] = f"holds {share:.1%} of the weights"
    blocks = tuple(path for path in reads if path not in left_out)
    if not blocks:
        raise ModelError(
            "no list of blocks is the model's own",
            where=type(model).__name__,
            got="; ".join(f"{path}: {why}" for path, why in left_out.items()),
            hint="Write a ModelSpec by hand: docs/adapting-a-model.md.",
        )
    spec = ModelSpec(type(model).__name__, blocks)
    inside: dict[tuple[str, int], dict[str, str]] = defaultdict(
        dict
    )  # block -> its linears that ran, by their path in it
    for path in seen.linears:
        if place := spec.place_of(path):
            inside[place[:2]][place.inside] = path
    doubts: list[str] = []
    keep = _kept(seen, inside, batch, doubts)
    groups = _groups(seen, inside, keep, doubts)
    ran = {name for names in inside.values() for name in names}
    idle = {place.inside for path in weights if (place := spec.place_of(path)) and place.inside not in ran}
    doubts.extend(f"{name} was not called, so nothing is known of it" for name in sorted(idle))
    if (share := sum(held[path] for path in blocks) / everything) < 0.5:
        doubts.append(f"the blocks hold only {share:.1%} of the weights of all linears")
    spec = ModelSpec(type(model).__name__, blocks, groups, keep, title=type(model).__name__)
    return Proposal(spec, {path: held[path] / everything for path in blocks}, left_out, tuple(doubts), described)


def _kept(
    seen: Trace, inside: Mapping[tuple[str, int], Mapping[str, str]], batch: int, doubts: list[str]
) -> dict[str, str]:
    """Linears that should stay in their float dtype, by their path inside a block -> why."""
    found: dict[str, list[str | None]] = defaultdict(list)
    for names in inside.values():
        for name, path in names.items():
            found[name].append(_reason(seen, path, batch))
    keep = {}
    for name, reasons in found.items():
        why = next(filter(None, reasons), None)
        if why is not None:
            keep[name] = why
            if None in reasons:
                doubts.append(
                    f"{name} is kept for what {len(reasons) - reasons.count(None)} of {len(reasons)} blocks show"
                )
    return keep


def _reason(seen: Trace, path: str, batch: int) -> str | None:
    linear = seen.linears[path]
    if path in seen.apart:
        return f"the model takes its weight itself ({seen.apart[path]}), and a packed layer has none"
    if path in seen.routers:
        return ROUTER
    if 0 < max(linear.rows) <= batch:
        return MODULATION
    if linear.reads and all(re.fullmatch(_TIME, name) for name in linear.reads):
        return TIMESTEP
    return None


def _groups(
    seen: Trace, inside: Mapping[tuple[str, int], Mapping[str, str]], keep: Mapping[str, str], doubts: list[str]
) -> tuple[tuple[str, ...], ...]:
    """Linears of a block that are given the same tensors wherever both are, in running order."""
    together, apart = set[frozenset[str]](), set[frozenset[str]]()
    for names in inside.values():
        for pair in combinations(names, 2):
            one, other = (seen.linears[names[name]].inputs for name in pair)
            (together if one == other else apart).add(frozenset(pair))
    groups: list[list[str]] = []
    for name in dict.fromkeys(name for names in inside.values() for name in names if name not in keep):
        pairs = ({other: frozenset((name, other)) for other in group} for group in groups)
        for group, pair in zip(groups, pairs, strict=True):
            if any(pair[other] in together for other in group) and not any(pair[other] in apart for other in group):
                group.append(name)
                break
        else:
            groups.append([name])
    for pair in together & apart:
        if not pair & keep.keys():
            doubts.append(f"{' and '.join(sorted(pair))} share an input in some blocks and not in others")
    return tuple(tuple(group) for group in groups if len(group) > 1)
