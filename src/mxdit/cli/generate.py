"""`mxdit generate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperCommand

from mxdit.cli.console import (
    METHODS,
    ActivationSteps,
    Attention,
    Compile,
    Config,
    Device,
    Dtype,
    FallbackBlocks,
    Frames,
    Fused,
    IgnoredLayers,
    LayerMethods,
    Loras,
    Memory,
    Model,
    Size,
    TextEncoder,
    Variant,
    app,
    attention_of,
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
from mxdit.config.attention import text_of
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError

if TYPE_CHECKING:
    from mxdit.generation.running import Result
    from mxdit.generation.session import Session
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
    attention: Attention = None,
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
    compiled: Compile = False,
    fused: Fused = False,
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
    from mxdit.generation import compiling, loading, media
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
        attention=attention_of(attention),
        compile=compiled,
        fused=fused,
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
    if compiled:
        compiling.logger.setLevel(logging.INFO)
    session.load(request)
    reports, policies = session.reports(), session.policies(request)
    for name, report in reports.items():
        by_step = f"; activations by step: {policies[name]}" if name in policies else ""
        tell(f"  {name}: {loading.summary(report)}{by_step}")
    for name, report in session.encoder_reports().items():
        tell(f"  {name}: {loading.summary(report)}")
    if session.attention:
        tell(f"  attention: {text_of(session.attention, session.model.components)}")
    for one in request.loras:
        tell(f"  {one.component}: LoRA {one.file}, scale {one.scale:g}")
    columns = (TextColumn("Denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("", total=request.steps)
        result = session.run(request, lambda done, _: progress.update(bar, completed=done))
    result.save(output)
    _show_result(output, result, session, reports, policies, as_json)


def _show_result(
    output: Path,
    result: Result,
    session: Session,
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
                    "attention": session.attention[name].to_dict() if name in session.attention else None,
                }
                for name, report in reports.items()
            },
            "fused": session.fused,
            "seconds": result.seconds,
            "seconds_per_step": step,
            "peak_bytes": result.peak_bytes,
            "compile_seconds": result.compile_seconds,
        }
        out.print_json(json.dumps(figures))
    else:
        say(f"{output}: {request.width}x{request.height}, {request.frames} frames, “{request.prompt}”")
        peak = "" if result.peak_bytes is None else f", peak memory {result.peak_bytes / 2**30:.2f} GiB"
        say(f"{step:.3f} s per step, {result.seconds:.1f} s in all{peak}")
