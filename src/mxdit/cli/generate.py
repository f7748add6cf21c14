"""`mxdit generate` and `mxdit info`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from mxdit.backends import backends
from mxdit.cli.console import (
    METHODS,
    ActivationSteps,
    Config,
    Device,
    Dtype,
    FallbackBlocks,
    Frames,
    IgnoredLayers,
    LayerMethods,
    Loras,
    Memory,
    Model,
    Size,
    TextEncoder,
    Variant,
    app,
    check_output,
    device_of,
    dtype_of,
    err,
    layer_methods_of,
    loras_of,
    need,
    out,
    path_of,
    read_keys,
    say,
    size_of,
    tell,
    tell_slow,
)
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.quantize.report import in_words
from mxdit.version import installed

if TYPE_CHECKING:
    from mxdit.generation.plan import Plan
    from mxdit.generation.session import Result
    from mxdit.quantize.report import QuantReport

RENAMED = {
    "--model": "DIR as an argument",
    "-m": "DIR as an argument",
    "--quantization": "--method",
    "--quantization-config": "--config",
}


USAGE = cast(
    type[Exception], typer.BadParameter.__mro__[1]
)  # click's UsageError, or that of the click which newer releases of typer bring


class Generate(TyperCommand):
    """Says the new name of an option that had another one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except USAGE as error:
            name = getattr(error, "option_name", None)  # of an option that there is not
            if name not in RENAMED:
                raise
            raise InputError("this option has another name", where=name, expected=RENAMED[name]) from None


@app.command(cls=Generate)
def generate(
    directory: Model = "bundled",
    prompt: Annotated[str | None, typer.Option(help="What it shows.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame: makes it image-to-video.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"none, {METHODS}. Default: as the directory is stored.", metavar="METHOD"),
    ] = None,
    ignored_layers: IgnoredLayers = None,
    layer_methods: LayerMethods = None,
    num_bf16_fallback_layers: FallbackBlocks = None,
    activation: Annotated[
        str | None, typer.Option(help="Activations over the same weights: mxfp4, mxfp8 or bf16.", metavar="FORMAT")
    ] = None,
    activation_steps: ActivationSteps = None,
    text_encoder: TextEncoder = None,
    config: Config = None,
    lora: Loras = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance, of a cascade its first expert's.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of a cascade's second expert.")] = None,
    boundary_ratio: Annotated[float | None, typer.Option(help="Where the second expert takes over, 0 to 1.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    size: Size = None,
    frames: Frames = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the MP4.")] = None,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "bf16",
    memory: Memory = None,
    variant: Variant = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The MP4 to write, or PNG of an image. Default: video.mp4, or image.png."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a video or an image. Without any option: a clip of the bundled model, in about a minute on a CPU.

    What is not given takes the model's own default (guidance, shift, frames, size, fps).

        mxdit generate --method mxfp4 -o seven.mp4

        mxdit generate Wan2.2-I2V-A14B-Diffusers --image first.png --prompt "..." --method mxfp4_dualscale

        mxdit generate Wan2.2-T2V-A14B-mxfp4 --lora transformer=high.safetensors --lora transformer_2=low.safetensors:0.8
    """
    from mxdit.generation import loading, media
    from mxdit.generation.session import Session

    need("diffusers", "transformers", "av", "PIL")
    if output is not None:
        check_output(output, *media.KINDS)
    keys, own = read_keys(
        config,
        text_encoder,
        ignored_layers=list(ignored_layers) if ignored_layers else None,
        layer_methods=layer_methods_of(layer_methods),
        num_bf16_fallback_layers=num_bf16_fallback_layers,
        activation=activation,
    )
    picture = None if image is None else media.read_image(image)
    session = Session.open(
        path_of(directory),
        task=None if picture is None else "i2v",
        method=method,
        keys=keys,
        components=own,
        dtype=dtype_of(dtype),
        device=device_of(device),
        memory=memory,
        variant=variant,
        loras=loras_of(lora),
    )
    request = session.request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        image=picture,
        size=None if size is None else size_of(size),
        frames=frames,
        steps=steps,
        guidance=guidance_scale,
        guidance_2=guidance_scale_2,
        seed=seed,
        fps=fps,
        flow_shift=flow_shift,
        boundary_ratio=boundary_ratio,
        activation_steps=None if activation_steps is None else StepPolicy.parse(activation_steps),
    )
    if output is None:
        output = Path("image.png" if request.still else "video.mp4")
        check_output(output)
    media.check_kind(output, request.frames)

    tell(f"{session.model.preset(session.task).name} from {session.model.path}")
    tell_slow(session.dtype, session.device)
    if memory is not None:
        tell(f"memory: {session.plan(request)}")
    loading.show_loading(err.is_terminal)
    session.load(request)
    reports, policies = session.reports(), session.policies(request)
    for name, report in reports.items():
        by_step = f"; activations by step: {policies[name]}" if name in policies else ""
        tell(f"  {name}: {loading.summary(report)}{by_step}")
    for name, report in session.encoder_reports().items():
        tell(f"  {name}: {loading.summary(report)}")
    for one in request.loras:
        tell(f"  {one.component}: LoRA {one.file}, scale {one.scale:g}")
    columns = (TextColumn("Denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("", total=request.steps)
        result = session.run(request, lambda done, _: progress.update(bar, completed=done))
    result.save(output)
    _show_result(output, result, reports, policies, as_json)


def _show_result(
    output: Path,
    result: Result,
    reports: Mapping[str, QuantReport],
    policies: Mapping[str, StepPolicy],
    as_json: bool,
) -> None:
    request, step = result.request, sum(result.step_seconds) / len(result.step_seconds)
    if as_json:
        figures = {
            "output": str(output),
            "prompt": request.prompt,
            "request": request.to_dict(),
            "experts": {
                name: {
                    **{key: value for key, value in report.to_dict().items() if key != "layers"},
                    "activation_steps": policies[name].to_dict() if name in policies else None,
                }
                for name, report in reports.items()
            },
            "seconds": result.seconds,
            "seconds_per_step": step,
            "peak_bytes": result.peak_bytes,
        }
        out.print_json(json.dumps(figures))
    else:
        say(f"{output}: {request.width}x{request.height}, {request.frames} frames, “{request.prompt}”")
        peak = "" if result.peak_bytes is None else f", peak memory {result.peak_bytes / 2**30:.2f} GiB"
        say(f"{step:.3f} s per step, {result.seconds:.1f} s in all{peak}")


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, backends and why not; for a directory, how each of its transformers is quantized, and how a run is held.

    mxdit info Wan2.2-T2V-A14B-mxfp4 --memory 24GiB --size 832x480 --frames 81 --device cuda
    """
    from mxdit.generation.directory import bundled, describe, describe_encoders, open_model

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
