"""The results of an evaluation as JSON: schema 1.

{"schema", "model", "settings", "environment", "metrics": {name: what it means}, "modes": [...], "seconds"}. A mode has what it
is, "summary" {metric: {"mean", "lo", "hi", "n"}}, "steps", "layers" (worst first) and "samples". The first mode is BF16, the
reference. Seconds of a mode are what it took, also where the cache has it from an earlier run; those of the whole are this
run's. Intervals are 95 % bootstrap intervals over the prompts (with their images); "lo" and "hi" are null where there are fewer
than six, for sqnr_db, whose mean is over the linears, and for metrics that give one value for all videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mxdit.config.attention import text_of
from mxdit.evals.metrics.definitions import DEFINITIONS
from mxdit.evals.metrics.statistics import interval
from mxdit.evals.modes import Mode
from mxdit.evals.settings import Settings
from mxdit.generation.recording import transformers_of
from mxdit.generation.session import Session
from mxdit.layers import MXLinear
from mxdit.quantize.recorded import recorded_config
from mxdit.version import installed

SCHEMA = 1
PACKAGES = ("mxdit", "torch", "diffusers", "transformers", "torchmetrics", "cvvdp", "flip-evaluator")
STEPWISE = ("velocity_error", "velocity_cosine", "latent_error", "latent_cosine")


def describe(mode: Mode, session: Session) -> dict[str, Any]:
    """What a loaded mode is: formats, how many linears, bytes of the experts' tensors."""
    transformers, reports = transformers_of(session.load()), session.reports()
    experts = transformers.values()
    configs = {name: recorded_config(model) for name, model in transformers.items()}
    policies = {name: config.activation_steps for name, config in configs.items() if config is not None}
    layers = [module for model in experts for module in model.modules() if isinstance(module, MXLinear)]

    def all_of(attribute: str) -> str | None:
        return ", ".join(sorted({getattr(layer, attribute) for layer in layers})) or None

    return {
        "name": mode.name,
        "method": all_of("method"),
        "activation": all_of("activation"),
        "activation_steps": {name: policy.to_dict() for name, policy in policies.items() if policy},
        "rule": all_of("rule"),
        "attention": text_of(session.attention, transformers),
        "fused": session.fused,
        "how": mode.how,
        "weights_bytes": sum(tensor.nbytes for model in experts for tensor in model.state_dict().values()),
        "layers_quantized": sum(len(report.quantized) for report in reports.values()),
        "layers_kept": sum(len(report.kept) for report in reports.values()),
    }


def collect(
    settings: Settings, measured: Sequence[dict[str, Any]], where: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The whole, of what each mode measured."""
    modes: list[dict[str, Any]] = []
    for found in measured:
        same = next((mode for mode in modes if mode["name"] == found["same_as"]), None)
        parts = (
            {key: same[key] for key in ("summary", "steps", "layers", "samples")} if same else _parts(settings, found)
        )
        head = {
            key: value
            for key, value in found.items()
            if key not in ("figures", "embeddings", "velocities", "compared", "adapted", "judged")
        }
        modes.append(head | parts)
    request, preset = settings.videos[0].request, settings.model.preset(settings.task)
    names = {name for mode in modes for name in mode["summary"]}
    return {
        "schema": SCHEMA,
        "model": {
            "path": str(settings.model.path),
            "name": preset.name,
            "task": settings.task,
            "boundary_ratio": settings.model.settings.get("boundary_ratio"),
        },
        "settings": {
            "prompts": list(dict.fromkeys(video.request.prompt for video in settings.videos)),
            "seeds": sorted({video.request.seed for video in settings.videos}),
            "steps": request.steps,
            "guidance": request.guidance,
            "guidance_2": request.guidance_2,
            "height": request.height,
            "width": request.width,
            "frames": request.frames,
            "fps": settings.fps,
            "samples": len(settings.videos),
            "groups": len({video.group for video in settings.videos}),
            "probe_samples": min(settings.probes, len(settings.videos)),
        },
        "environment": {
            **where,
            "packages": {name: installed(name) for name in PACKAGES},
            "dtype": str(settings.dtype),
        },
        "metrics": {name: asdict(metric) for name, metric in DEFINITIONS.items() if name in names},
        "modes": modes,
        "seconds": seconds,
    }


def _parts(settings: Settings, found: Mapping[str, Any]) -> dict[str, Any]:
    """Summary, steps, layers and samples of one mode."""
    samples, steps = [], [dict(step) for step in found["figures"][0]["steps"]]
    for video, figures, judged in zip(settings.videos, found["figures"], found["judged"], strict=True):
        i, last = video.index, figures["steps"][-1]
        sample = {"index": i, "prompt": video.request.prompt, "seed": video.request.seed, "group": video.group}
        sample |= {name: last[name] for name in STEPWISE if name in last}
        if i < len(found["velocities"]):
            taken = found["velocities"][i]
            for name in ("velocity_error", "velocity_cosine"):
                sample[name] = sum(step[name] for step in taken["steps"]) / len(taken["steps"])
            sample |= {name: value for name, value in taken.items() if name != "steps"}
        if found["embeddings"]:
            sample["embedding_error"] = found["embeddings"][i]
        if found["compared"]:
            sample |= found["compared"][i]
        sample |= {name: values[i] for name, values in found["adapted"].items() if len(values) == len(settings.videos)}
        if judged:
            sample |= judged["scores"] | {"meaning": {"asked": judged["asked"], "read": judged["read"]}}
        samples.append(sample)
    for i, step in enumerate(steps):
        series = [figures["steps"][i] for figures in found["figures"]]
        for name in STEPWISE:
            rows = [taken["steps"][i] for taken in found["velocities"]] if name.startswith("velocity") else series
            pairs = [(row[name], sample["group"]) for row, sample in zip(rows, samples, strict=False) if name in row]
            if pairs:
                step[name] = _interval(pairs)
    summary = {}
    for name in DEFINITIONS:
        pairs = [(sample[name], sample["group"]) for sample in samples if name in sample]
        if pairs:
            summary[name] = _interval(pairs)
    for name, values in found["adapted"].items():
        if name not in summary:  # one value for all videos
            summary[name] = {"mean": values[0], "lo": None, "hi": None, "n": len(samples)}
    if found["layers"]:
        ratios = [layer["sqnr_db"] for layer in found["layers"]]
        summary["sqnr_db"] = {"mean": sum(ratios) / len(ratios), "lo": None, "hi": None, "n": len(ratios)}
    return {"summary": summary, "steps": steps, "layers": found["layers"], "samples": samples}


def _interval(pairs: Sequence[tuple[float, str]]) -> dict[str, Any]:
    return interval([value for value, _ in pairs], groups=[group for _, group in pairs])
