"""`mxdit info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table
from typer.core import TyperCommand

from mxdit.backends import backends
from mxdit.cli.console import METHODS, Frames, Size, app, need, out, path_of, say, size_of
from mxdit.cli.families import show_families
from mxdit.cli.propose import as_dict, as_python, proposal_of
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.quantize.report import in_words
from mxdit.version import installed

if TYPE_CHECKING:
    from mxdit.generation.plan import Plan


class Info(TyperCommand):
    """Takes --memory with a size or without one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--memory") + 1 if "--memory" in args else 0
        if at and not (args[at:] and args[at][:1].isdigit()):
            args = [*args[:at], "", *args[at:]]
        return super().parse_args(ctx, args)


@app.command(cls=Info)
def info(
    directory: Annotated[
        str | None, typer.Argument(help="A pipeline's directory to describe, or 'bundled'.", metavar="[DIR|bundled]")
    ] = None,
    propose: Annotated[
        bool,
        typer.Option(
            "--propose",
            help="Print a ModelSpec for DIR's transformer, which mxdit need not know, as a Python file to review. DIR may be "
            "a transformer's directory or its config.json.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Plan how a run of DIR is held in memory: in so much, as in 24GiB, or every way that there is.",
            metavar="[SIZE]",
        ),
    ] = None,
    size: Size = None,
    frames: Frames = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"With --memory: none, {METHODS}. Default: as the directory is stored.", metavar="METHOD"),
    ] = None,
    device: Annotated[str, typer.Option(help="With --memory: cpu, cuda, npu, ...; it need not be there.")] = "cpu",
    families: Annotated[bool, typer.Option("--families", help="List the model families that mxdit knows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, backends and why not; for a directory, how each of its transformers is quantized, and how a run is held.

    mxdit info Wan2.2-T2V-A14B-mxfp4 --memory 24GiB --size 832x480 --frames 81 --device cuda

    mxdit info some-transformer/config.json --propose > family.py
    """
    from mxdit.generation.directory import bundled, describe, describe_encoders, open_model

    if families:
        show_families(as_json)
        return
    if propose:
        if directory is None or memory is not None:
            hint = "Name a pipeline's or a transformer's directory, or a config.json, and leave --memory out."
            raise InputError("a proposal is one for a model", field="propose", hint=hint)
        proposal = proposal_of(str(bundled("t2v")) if directory == "bundled" else directory)
        if as_json:
            out.print_json(json.dumps(as_dict(proposal)))
        else:
            say(as_python(proposal))
        return
    packages = ("mxdit", "torch", "diffusers", "transformers", "safetensors", "av")
    figures: dict[str, Any] = {
        "versions": {name: installed(name) for name in packages},
        "backends": [
            {"name": b.name, "device": b.device, "why_not": b.why_not(), "about": None if b.why_not() else b.about()}
            for b in backends()
        ],
    }
    if directory is not None:
        need("diffusers")
        model = open_model(path_of(directory) or bundled("t2v"))
        figures["model"] = {
            "path": str(model.path),
            "preset": model.preset(model.tasks[0]).name,
            "tasks": list(model.tasks),
            "settings": dict(model.settings),
            "experts": describe(model),
            "text_encoders": describe_encoders(model),
        }
    plans: list[Plan] = []
    if memory is not None:
        if directory is None:
            raise InputError("a plan is one of a model", field="memory", hint="Name its directory, or 'bundled'.")
        plans = _plans(directory, memory or None, size, frames, method, device)
        chosen = next((plan for plan in plans if plan.budget is not None and plan.peak <= plan.budget), None)
        figures["memory"] = {
            "plans": [plan.to_dict() for plan in plans],
            "chosen": None if chosen is None else chosen.to_dict(),
        }
    if as_json:
        out.print_json(json.dumps(figures))
        return
    if plans:
        _show_plans(plans)
        return
    say("  ".join(f"{name} {number or 'not installed'}" for name, number in figures["versions"].items()))
    for backend in figures["backends"]:
        say(f"backend {backend['name']} on {backend['device']}: {backend['why_not'] or backend['about']}")
    if directory is not None:
        described = figures["model"]
        settings = "".join(f", {key} {value}" for key, value in described["settings"].items() if value is not None)
        say(f"\n{described['path']}: {described['preset']}, {' and '.join(described['tasks'])}{settings}")
        table = Table("component", "weights", "quantized linears", "kept", "MiB of files")
        for name, row in {**described["experts"], **described["text_encoders"]}.items():
            schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].items()) or "-"
            size = f"{row['bytes'] / 2**20:.1f}"
            methods = in_words(row["methods"]) if len(row["methods"]) > 1 else row["quant_method"]
            table.add_row(name, methods or "unquantized", schemes, str(row["kept"]), size)
        out.print(table)
        for name, row in described["experts"].items():
            if row["activation_steps"]:
                say(f"{name}: activations by step: {StepPolicy.from_dict(row['activation_steps'])}")


def _plans(
    directory: str, memory: str | None, size: str | None, frames: int | None, method: str | None, device: str
) -> list[Plan]:
    """Every way to hold a run, the cheapest first. Raises InputError where none fits."""
    from mxdit.generation.session import Session

    try:
        torch.device(device)
    except RuntimeError as error:
        raise InputError("no such device", field="device", got=repr(device), hint=str(error).splitlines()[0]) from None
    need("transformers", "PIL")
    session = Session.open(path_of(directory), method=method, device=device, memory=memory)
    sides = None if size is None else size_of(size)
    fields: dict[str, Any] = {"prompt": "any", "size": sides, "frames": frames}
    if session.model.takes(session.task, "image"):
        from PIL import Image

        height, width = sides or session.model.preset(session.task).size
        fields["image"] = Image.new("RGB", (width, height))
    request = session.request(**fields)
    if memory is not None:
        session.plan(request)  # raises where nothing fits
    return session.plans(request)


def _show_plans(plans: list[Plan]) -> None:
    first = plans[0]
    budget = first.budget
    chosen = next((plan for plan in plans if budget is not None and plan.peak <= budget), first)
    say(
        f"{first.size[1]}x{first.size[0]}, {first.frames} frames on {first.device}"
        + ("" if budget is None else f", in {budget / 2**30:.2f} GiB")
    )
    table = Table("text encoder", "transformers", "VAE", "GiB at most", "costs s a run", "")
    for plan in plans:
        policy, mark = plan.policy, "chosen" if plan is chosen and budget is not None else ""
        cells = (policy.text, policy.transformers, policy.vae, f"{plan.peak / 2**30:.2f}", f"{plan.seconds:.1f}", mark)
        table.add_row(*cells)
    out.print(table)
    say(f"\n{chosen.policy}:")
    names = list(dict.fromkeys(name for phase in chosen.phases for name in phase.weights))
    table = Table("GiB", *names, "computing", "the process" if first.device == "cpu" else "context", "together")
    for phase in chosen.phases:
        cells = [phase.weights.get(name, 0) for name in names]
        cells += [phase.work, chosen.floor, phase.total + chosen.floor]
        table.add_row(phase.name, *(f"{nbytes / 2**30:.2f}" for nbytes in cells))
    out.print(table)
