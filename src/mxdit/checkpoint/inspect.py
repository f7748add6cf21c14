"""What a checkpoint's directory is, what is wrong with it, and who can load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxdit.checkpoint.canonical import read_expert
from mxdit.checkpoint.experts import Expert, Finding, faults_of
from mxdit.checkpoint.layouts import sglang, vllm_omni
from mxdit.checkpoint.sources import open_both


@dataclass(frozen=True)
class ExpertInspection:
    """One expert.

    component  its name in the pipeline, "" where the directory is the expert.
    linears    method, or "float" -> how many linears.
    kept       float linears inside the blocks: what quantizing passed over.
    nbytes     of its tensors on disk.
    findings   what is wrong.
    notes      what a conversion would lose.
    loaders    runtime -> None where it can load the expert, else why not.
    """

    component: str
    layout: str
    linears: dict[str, int]
    kept: tuple[str, ...]
    nbytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    loaders: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {
            "component": self.component,
            "layout": self.layout,
            "linears": self.linears,
            "kept": list(self.kept),
            "bytes": self.nbytes,
            "findings": [str(finding) for finding in self.findings],
            "notes": list(self.notes),
            "loaders": self.loaders,
        }


@dataclass(frozen=True)
class Inspection:
    """A whole directory."""

    path: Path
    pipeline: bool
    experts: tuple[ExpertInspection, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not any(expert.findings for expert in self.experts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {
            "path": str(self.path),
            "pipeline": self.pipeline,
            "clean": self.clean,
            "experts": [expert.to_dict() for expert in self.experts],
        }


def inspect_checkpoint(
    path: Path, base: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Read a checkpoint whole and say what it is.

    Args:
        path: a pipeline, a cascade or one expert, in any layout.
        base: the unquantized model, needed for layouts without a config.json.
        progress: told (tensors read, tensors in all).

    Raises InputError and CheckpointError where it cannot be read at all.
    """
    source, under = open_both(path, base)
    read = [
        (name, read_expert(source.read(name), under.read(name) if under and name in under.experts else None))
        for name in source.experts
    ]
    total, done = sum(len(expert.parts) for _, expert in read), 0
    inspected = []
    for name, expert in read:
        findings = list(expert.findings)
        for tensor in expert.parts:
            findings += faults_of(expert, [tensor])
            done += 1
            progress(done, total)
        inspected.append(_inspected(name, expert, tuple(findings)))
    return Inspection(path, source.pipeline, tuple(inspected))


def _inspected(name: str, expert: Expert, findings: tuple[Finding, ...]) -> ExpertInspection:
    linears = dict(Counter(method or "float" for method in expert.methods.values()))
    kept = tuple(p for p, method in expert.methods.items() if not method and expert.spec.place_of(p))
    nbytes = sum(tensor.nbytes for tensor in expert.stored.tensors.values())
    first = str(findings[0]) if findings else None
    loaders = {
        "diffusers + mxdit": _diffusers(expert) or first,
        "vLLM-Omni 0.30": expert.unknown_to("vllm-omni") or vllm_omni.why_not(expert) or first,
        "SGLang 0.5.23": expert.unknown_to("sglang") or sglang.why_not(expert) or first,
    }
    quantized = any(expert.methods.values())
    return ExpertInspection(
        name, expert.stored.layout, linears, kept if quantized else (), nbytes, findings, expert.lost, loaders
    )


def _diffusers(expert: Expert) -> str | None:
    if expert.stored.layout in ("diffusers", "packed"):
        return None
    to = "quantize" if expert.stored.layout == "original" else "convert --to packed"
    return f"the {expert.stored.layout} layout: mxdit {to}"
