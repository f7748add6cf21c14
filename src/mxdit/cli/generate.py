"""`mxdit generate` and `mxdit info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mxdit.cli.console import (
    METHODS,
    FallbackBlocks,
    IgnoredLayers,
    Variant,
    app,
    check_output,
    device_of,
    dtype_of,
    err,
    need,
    out,
    read_config,
    say,
    size_of,
    tell,
)
from mxdit.errors import InputError
from mxdit.version import installed


@app.command()
def generate(
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Diffusers pipeline directory. Default: the bundled mini model."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame: makes it image-to-video.")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="none, mxfp4, mxfp4_dualscale or mxfp8. Default: as the directory is stored.", metavar="METHOD"
        ),
    ] = None,
    ignored_layers: IgnoredLayers = None,
    num_bf16_fallback_layers: FallbackBlocks = None,
    activation: Annotated[
        str | None, typer.Option(help="Activations over the same weights: mxfp4, mxfp8 or bf16.", metavar="FORMAT")
    ] = None,
    quantization_config: Annotated[
        str | None,
        typer.Option(
            help="More keys, as JSON or a JSON file; under 'transformer' and 'transformer_2' for one expert only.",
            metavar="JSON|FILE",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance of the (high-noise) expert.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of the low-noise expert.")] = None,
    boundary_ratio: Annotated[float | None, typer.Option(help="Where the low-noise expert takes over, 0 to 1.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.", metavar="WxH")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 1 more than a multiple of 4.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the MP4.")] = None,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32: of everything that is not quantized.")] = "bf16",
    variant: Variant = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 to write.")] = Path("video.mp4"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a video. Without any option: a text-to-video clip with the bundled model, in about a minute on a CPU.

    What is not given takes the model's own default (guidance, shift, frames, size, fps).

        mxdit generate --quantization mxfp4 -o seven.mp4

        mxdit generate -m Wan2.2-I2V-A14B-Diffusers --image first.png --prompt "..." --quantization mxfp4_dualscale
    """
    from mxdit.generation import loading, media
    from mxdit.generation.directory import bundled, open_model
    from mxdit.generation.request import make_request
    from mxdit.generation.run import generate as run
    from mxdit.models import COMPONENTS

    need("diffusers", "transformers", "av", "PIL")
    check_output(output, ".mp4")
    extra = read_config(quantization_config)
    components = {name: extra.pop(name) for name in list(extra) if name in COMPONENTS}
    named = extra.pop("quant_method", None)
    method = quantization or named
    if named not in (None, method):
        raise InputError("two methods at once", where="--quantization-config", got=f"{named!r}", expected=repr(method))
    if method is not None and method not in METHODS:
        raise InputError("unknown method", where="--quantization", got=repr(method), expected=", ".join(METHODS))
    keys = {
        "ignored_layers": list(ignored_layers) if ignored_layers else None,
        "num_bf16_fallback_layers": num_bf16_fallback_layers,
        "activation": activation,
    }
    keys = {**extra, **{key: value for key, value in keys.items() if value is not None}}
    torch_dtype, torch_device = dtype_of(dtype), device_of(device)
    picture = None if image is None else media.read_image(image)
    task = "t2v" if picture is None else "i2v"
    directory = open_model(bundled(task) if model is None else model)
    preset = directory.preset(task)
    rate = preset.fps if fps is None else fps
    if not 1 <= rate <= 1000:
        raise InputError("no such frame rate", where="--fps", got=rate, expected="1 to 1000 frames a second")
    request = make_request(
        directory,
        task,
        prompt=prompt,
        negative_prompt=negative_prompt,
        image=picture,
        size=None if size is None else size_of(size),
        frames=frames,
        steps=steps,
        guidance=guidance_scale,
        guidance_2=guidance_scale_2,
        seed=seed,
        flow_shift=flow_shift,
        boundary_ratio=boundary_ratio,
    )
    config = loading.quantization(directory, method, keys, components)

    tell(f"{preset.name} from {directory.path}")
    loading.show_loading(err.is_terminal)
    pipeline = loading.load(directory, task, config, dtype=torch_dtype, device=torch_device, variant=variant)
    experts = loading.experts_of(pipeline)
    for name, report in experts.items():
        tell(f"  {name}: {loading.summary(report)}")
    columns = (TextColumn("Denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("", total=request.steps)
        result = run(pipeline, request, lambda done, _: progress.update(bar, completed=done))
    media.write_mp4(output, result.frames, rate)

    step = sum(result.step_seconds) / len(result.step_seconds)
    if as_json:
        figures = {
            "output": str(output),
            "prompt": request.prompt,
            "experts": {name: {k: v for k, v in r.to_dict().items() if k != "layers"} for name, r in experts.items()},
            "seconds": result.seconds,
            "seconds_per_step": step,
            "peak_bytes": result.peak_bytes,
        }
        out.print_json(json.dumps(figures))
    else:
        say(f"{output}: {request.width}x{request.height}, {request.frames} frames, “{request.prompt}”")
        peak = f"peak memory {result.peak_bytes / 2**30:.2f} GiB"
        say(f"{step:.3f} s per step, {result.seconds:.1f} s in all, {peak}")


@app.command()
def info(
    directory: Annotated[Path | None, typer.Argument(help="A pipeline directory to describe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, backends and why not; for a directory, how each of its experts is quantized."""
    from mxdit.backends import backends
    from mxdit.generation.directory import describe, open_model

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
        model = open_model(directory)
        figures["model"] = {
            "path": str(directory),
            "preset": model.preset(model.tasks[0]).name,
            "tasks": list(model.tasks),
            "boundary_ratio": model.boundary_ratio,
            "experts": describe(model),
        }
    if as_json:
        out.print_json(json.dumps(figures))
        return
    say("  ".join(f"{name} {number or 'not installed'}" for name, number in figures["versions"].items()))
    for backend in figures["backends"]:
        say(f"backend {backend['name']} on {backend['device']}: {backend['why_not'] or backend['about']}")
    if directory is not None:
        described = figures["model"]
        boundary = f", boundary {described['boundary_ratio']}" if described["boundary_ratio"] else ""
        say(f"\n{described['path']}: {described['preset']}, {' and '.join(described['tasks'])}{boundary}")
        table = Table("expert", "weights", "quantized linears", "kept", "MiB of files")
        for name, row in described["experts"].items():
            schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].items()) or "-"
            size = f"{row['bytes'] / 2**20:.1f}"
            table.add_row(name, row["quant_method"] or "unquantized", schemes, str(row["kept"]), size)
        out.print(table)
