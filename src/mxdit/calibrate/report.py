"""A calibration's report as JSON, which lies in the checkpoint as calibration.json: schema 1."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mxdit.calibrate.linears import FEW, Calibrated
from mxdit.calibrate.run import Outcome
from mxdit.calibrate.settings import Settings
from mxdit.version import __version__

SCHEMA = 1


def report_of(settings: Settings, outcome: Outcome) -> dict[str, Any]:
    """Everything about a calibration: what was asked for, what each step did to each linear, and the verdicts."""
    request = settings.fit[0]
    return {
        "schema": SCHEMA,
        "mxdit": __version__,
        "settings": {
            "task": settings.task,
            "recipe": asdict(settings.recipe),
            "budget": asdict(settings.budget),
            "prompts": {"fit": len(settings.fit), "held": len(settings.held), "sha256": _digest(settings)},
            "request": {
                key: value for key, value in request.to_dict().items() if key not in ("prompt", "image", "seed")
            },
            "dtype": str(settings.dtype).removeprefix("torch."),
            "seed": settings.seed,
        },
        "linears": {
            expert: {
                path: {
                    "online": result.online,
                    "error": result.error,
                    "rows_per_channel": result.rows,
                    "kept_in_bf16": path in outcome.spent.kept[expert],
                    "trials": [asdict(trial) for trial in result.trials],
                }
                for path, result in found.items()
            }
            for expert, found in outcome.linears.items()
        },
        "steps": {expert: summary(found) for expert, found in outcome.linears.items()},
        "kept": outcome.spent.kept,
        "w4a8": outcome.spent.raised,
        "plan": plan_of(outcome),
        "activation_steps": outcome.steps.to_dict(),
        "gains_by_step": outcome.gains,
        "curve": outcome.spent.curve,
        "curve_of": outcome.spent.unit,
        "errors": {
            what: {expert: errors.to_dict() for expert, errors in of.items()} for what, of in outcome.errors.items()
        },
        "clips_psnr_db": outcome.clips,
        "guards": [asdict(guard) for guard in outcome.guards],
        "accepted": outcome.accepted,
    }


def plan_of(outcome: Outcome) -> dict[str, Any]:
    """What the checkpoint's blocks will be: the parameters in BF16 as a share, bytes of all weights, and the predicted error as a
    share of the same without linears in more bits."""
    groups = [(group, outcome.spent.kept[name]) for name, of in outcome.groups.items() for group in of]
    kept = [group for group, paths in groups if group.paths[0] in paths]
    quantized = [group for group, paths in groups if group.paths[0] not in paths]
    return {
        "parameters_in_bf16": sum(group.parameters for group in kept) / sum(group.parameters for group, _ in groups),
        "bytes": sum(2 * group.parameters for group in kept) + sum(group.nbytes for group in quantized),
        "predicted_error": outcome.spent.predicted,
    }


def summary(found: Mapping[str, Calibrated]) -> list[dict[str, Any]]:
    """Of each step: on how many linears it was tried and stayed, why not on all, and their mean SQNR after it, in dB."""
    names = dict.fromkeys(trial.step for result in found.values() for trial in result.trials)
    rows = []
    for name in names:
        tried = [(trial, result) for result in found.values() for trial in result.trials if trial.step == name]
        few = sum(not trial.kept and result.rows < FEW for trial, result in tried)
        after = [_after(result, list(names), name) for result in found.values()]
        decibels = -10 * sum(math.log10(max(error, 1e-30)) for error in after) / len(after)
        kept = sum(trial.kept for trial, _ in tried)
        why = f"{len(tried) - kept} no better on held-out inputs" if kept < len(tried) else ""
        if few:
            why += f", {few} of them with fewer than {FEW:g} rows a channel to learn from: give more prompts"
        rows.append({"step": name, "tried": len(tried), "kept": kept, "why_not": why, "sqnr_db": decibels})
    return rows


def _after(result: Calibrated, names: list[str], last: str) -> float:
    """A linear's error when the steps up to `last` are done."""
    done = names[: names.index(last) + 1]
    return [trial.error for trial in result.trials if trial.kept and trial.step in done][-1]


def _digest(settings: Settings) -> str:
    """Of all prompts, with their images."""
    text = repr([(r.to_dict()["prompt"], r.to_dict()["image"]) for r in (*settings.fit, *settings.held)])
    return hashlib.sha256(text.encode()).hexdigest()
