"""Calibrated linears of a transformer, kept in a cache a group at a time, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mxdit.calibrate.experts import Group, linear_at
from mxdit.calibrate.linears import Calibrated, Trial, calibrate
from mxdit.calibrate.observe import STATES, Inputs, bytes_of_state, calls_in, choose_calls, inputs_of
from mxdit.calibrate.settings import Settings
from mxdit.checkpoint.files import read_header
from mxdit.evals.cache import Cache
from mxdit.evals.run import Progress

LEAST = 8  # calls to learn from, and to judge by, however large what a block gives to them is
PARTS, TRIALS = "parts.safetensors", "trials.json"


def calibrated_groups(
    model: nn.Module,
    groups: Sequence[Group],
    learned: Sequence[Path],
    judged: Sequence[Path],
    settings: Settings,
    cache: Cache,
    key: Mapping[str, Any],
    progress: Progress,
) -> dict[tuple[str, ...], Path]:
    """The entry of each group of one transformer: of those that the cache lacks, they are calibrated now, block by block.

    Args:
        model: the float transformer.
        groups: its linears.
        learned, judged: recorded clips, by `observe.record`.
        key: what an entry depends on beside settings and clips.
        progress: told about inputs and linears.
    """
    expert = groups[0].expert
    keys = {
        group.paths: {
            **key,
            "kind": "calibrated",
            "expert": expert,
            "paths": list(group.paths),
            "recipe": asdict(settings.recipe),
            "seed": settings.seed,
            "calls": [[clip.name for clip in clips] for clips in (learned, judged)],
        }
        for group in groups
    }
    found: dict[tuple[str, ...], Path] = {}
    missing = [paths for paths, own in keys.items() if not cache.has(own)]
    for paths in keys.keys() - missing:
        found[paths] = cache.entry(keys[paths], lambda _: None)
    if missing:
        clips = [[calls_in(clip) for clip in clips] for clips in (learned, judged)]
        first = next(call for call in clips[0][0] if call["expert"] == expert)
        most = STATES // bytes_of_state(model, first)
        fit, held = (
            choose_calls(of, expert, max(LEAST, most // share), settings.seed)
            for of, share in zip(clips, (1, 4), strict=True)
        )
        what = f"{expert}: {{}}"
        done = len(found)
        last = missing[-1]
        for path, inputs in inputs_of(
            model,
            missing,
            fit,
            held,
            settings.seed,
            lambda at: progress(what.format("inputs"), at, len(fit) + len(held)),
        ):
            for paths in list(inputs):
                progress(what.format("linears"), done, len(keys))
                # Out of the dict, so that what is done is not held while the next block's rows are collected.
                make = partial(_write, model, paths, inputs.pop(paths), settings)
                found[paths] = cache.entry(keys[paths], make)
                del make
                done += 1
            if last[0].startswith(f"{path}."):
                break  # the blocks behind it are done
    return {paths: found[paths] for paths in keys}


def _write(model: nn.Module, paths: tuple[str, ...], rows: Inputs, settings: Settings, entry: Path) -> None:
    linears = {path: linear_at(model, path) for path in paths}
    results = calibrate(linears, rows.fit.to(settings.device), rows.held.to(settings.device), settings.recipe)
    tensors = {f"{path}.{name}": part for path, result in results.items() for name, part in result.parts.items()}
    tensors |= {f"{path}.bias": result.bias for path, result in results.items() if result.bias is not None}
    save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, entry / PARTS)  # q, k, v share one
    trials = {
        path: {"error": result.error, "rows": result.rows, "trials": [asdict(trial) for trial in result.trials]}
        for path, result in results.items()
    }
    (entry / TRIALS).write_text(json.dumps(trials))


def read_group(entry: Path) -> dict[str, Calibrated]:
    """What became of the linears of an entry, by path."""
    trials, stored = json.loads((entry / TRIALS).read_text()), read_header(entry / PARTS)
    found = {}
    for path, said in trials.items():
        tensors = {name.removeprefix(f"{path}."): t for name, t in stored.items() if name.startswith(f"{path}.")}
        bias = tensors.pop("bias").read() if "bias" in tensors else None
        parts = {name: tensor.read() for name, tensor in tensors.items()}
        found[path] = Calibrated(parts, said["error"], said["rows"], bias, [Trial(**trial) for trial in said["trials"]])
    return found
