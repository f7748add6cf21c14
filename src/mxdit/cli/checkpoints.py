"""`mxdit quantize`, `mxdit convert` and `mxdit inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from mxdit.cli.console import (
    METHODS,
    ActivationSteps,
    Config,
    Dtype,
    FallbackBlocks,
    IgnoredLayers,
    LayerMethods,
    Loras,
    TextEncoder,
    Variant,
    app,
    bytes_of,
    device_of,
    dtype_of,
    err,
    layer_methods_of,
    loras_of,
    need,
    out,
    read_keys,
    say,
    tell,
)
from mxdit.config import DEFAULT_SCALE_ALG, SCALE_RULES
from mxdit.config.components import configs_of, split_keys
from mxdit.config.encoders import encoder_config
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError
from mxdit.models import COMPONENTS, TEXT_ENCODERS
from mxdit.quantize.report import in_words

RULES = {name: number for number, name in reversed(SCALE_RULES.items())}

Source = Annotated[
    list[str],
    typer.Argument(
        help="A pipeline, its transformers alone, or one of them: a directory, or a .safetensors or .gguf file as ComfyUI takes "
        "it. Two files: transformer=FILE transformer_2=FILE.",
        metavar="SRC",
    ),
]
Destination = Annotated[Path, typer.Argument(help="Directory to make; it must not exist.", metavar="DST")]
ShardSize = Annotated[str, typer.Option(help="Largest file, such as 2GiB or 500MB.", metavar="SIZE")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy what is carried over instead of hard-linking it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def quantize(
    source: Source,
    destination: Destination,
    method: Annotated[str | None, typer.Option(help=f"One of {METHODS}.", metavar="METHOD")] = None,
    ignored_layers: IgnoredLayers = None,
    layer_methods: LayerMethods = None,
    num_bf16_fallback_layers: FallbackBlocks = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help=f"Scale rule of mxfp4: {' or '.join(RULES)}. Default: {SCALE_RULES[DEFAULT_SCALE_ALG]}.",
            metavar="RULE",
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="Activations the checkpoint asks for: mxfp4, mxfp8 or bf16.", metavar="FORMAT")
    ] = None,
    activation_steps: ActivationSteps = None,
    text_encoder: TextEncoder = None,
    config: Config = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="A pipeline, or one expert's folder, for what SRC lacks beside weights: config.json, VAE, text encoder.",
            metavar="DIR",
        ),
    ] = None,
    keep_by_budget: Annotated[
        Path | None,
        typer.Option(help="A calibration.json: keep what it keeps, and run steps as it does.", metavar="FILE"),
    ] = None,
    lora: Loras = None,
    shard_size: ShardSize = "2GiB",
    dtype: Dtype = "bf16",
    device: Annotated[str, typer.Option(help="Where weights are quantized: cpu, cuda, npu, ...")] = "cpu",
    variant: Variant = None,
    copy: Copy = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a BF16, FP16 or FP32 checkpoint, streaming, to a directory that loads as it is.

    SRC is in diffusers' layout or in Wan's own (high_noise_model/, low_noise_model/), or single files: ComfyUI's in BF16, FP8
    (scaled or cast) and NVFP4, or GGUF, which are decoded. Memory holds one layer at a time. A run that is interrupted goes on
    when the same command is given again. With --lora, adapters are merged first, in FP32.

        mxdit quantize Wan2.2-T2V-A14B-Diffusers Wan2.2-T2V-A14B-mxfp4 --method mxfp4_dualscale

        mxdit quantize transformer=high.gguf transformer_2=low.gguf DST --method mxfp4 --base Wan2.2-T2V-A14B-Diffusers

        mxdit quantize SRC DST --method mxfp4 --lora transformer=high.safetensors --lora transformer_2=low.safetensors:0.8
    """
    from mxdit.checkpoint import quantize_checkpoint

    need("diffusers")
    keys, own = read_keys(
        config,
        text_encoder,
        ignored_layers=list(ignored_layers) if ignored_layers else None,
        layer_methods=layer_methods_of(layer_methods),
        num_bf16_fallback_layers=num_bf16_fallback_layers,
        activation=activation,
        activation_steps=None if activation_steps is None else StepPolicy.parse(activation_steps),
    )
    chosen = method or keys.get("quant_method")
    if chosen is None:
        raise InputError("no method", where="--method", expected=METHODS)
    if rule is not None:
        others = keys.get("layer_methods")
        if "mxfp4" not in (chosen, *(others if isinstance(others, dict) else ())) or rule not in RULES:
            got, expected = f"{rule!r} for {chosen}", f"{' or '.join(RULES)}, for mxfp4"
            raise InputError("no such scale rule", where="--rule", got=got, expected=expected)
        keys["mxfp4_scale_alg"] = RULES[rule]
    if keep_by_budget is not None:
        own = _kept(keep_by_budget, own)
    own, encoders = split_keys(own, TEXT_ENCODERS)
    configs = configs_of(("", *own), method, keys, own)  # the first is that of all others
    shared = configs.pop("")
    assert shared is not None
    loras: dict[str, list[Any]] = {}
    if lora:
        from mxdit.checkpoint.sources import open_both
        from mxdit.config.loras import assigned
        from mxdit.integrations.lora_files import read_lora

        opened, _ = open_both(_source(source), base, variant)
        for one in assigned(loras_of(lora), opened.components):
            loras.setdefault(str(one.component), []).append((read_lora(one.file, opened.spec), one.scale))
    plan = quantize_checkpoint(
        _source(source),
        destination,
        shared,
        configs,
        base=base,
        dtype=dtype_of(dtype),
        device=device_of(device),
        shard_size=bytes_of("shard_size", shard_size),
        variant=variant,
        loras=loras,
        encoders={name: encoder_config(value, name) for name, value in encoders.items() if value is not None},
    )
    _run(plan, copy, dry_run, as_json)


@app.command()
def convert(
    source: Source,
    destination: Destination,
    to: Annotated[
        str, typer.Option(help="packed (ours), vllm-omni, sglang or modelslim.", metavar="LAYOUT")
    ] = "packed",
    base: Annotated[
        Path | None,
        typer.Option(help="The unquantized model, for what SRC lacks: config.json, VAE, text encoder.", metavar="DIR"),
    ] = None,
    fallback_from_base: Annotated[
        bool,
        typer.Option(
            "--fallback-from-base",
            help="Keep layers in BF16, from --base: those of another method than most, and smoothed float ones.",
        ),
    ] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Go on where the other format cannot say everything.")
    ] = False,
    shard_size: ShardSize = "2GiB",
    variant: Variant = None,
    copy: Copy = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Bring a quantized checkpoint into another layout, streaming, bit for bit where the formats allow it.

    Reads msModelSlim's directories (packed or numeric, wrapped or not), vLLM-Omni's, SGLang's, AutoRound's and ours, and
    ComfyUI's single files with MXFP8 layers.

        mxdit convert msmodelslim-out Wan2.2-T2V-A14B-mxfp4 --base Wan2.2-T2V-A14B-Diffusers
        mxdit convert Wan2.2-T2V-A14B-mxfp4 for-vllm --to vllm-omni

    --to modelslim writes the experts alone, by the names of the model's release: its readers take the rest from there.
    """
    from mxdit.checkpoint import convert_checkpoint

    need("diffusers")
    plan = convert_checkpoint(
        _source(source),
        destination,
        to,
        base=base,
        fallback_from_base=fallback_from_base,
        allow_loss=allow_loss,
        shard_size=bytes_of("shard_size", shard_size),
        variant=variant,
    )
    _run(plan, copy, dry_run, as_json)


@app.command()
def inspect(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A checkpoint in any layout: a directory, a file, or transformer=FILE transformer_2=FILE.",
            metavar="SRC",
        ),
    ],
    base: Annotated[
        Path | None, typer.Option(help="The unquantized model, for layouts without a config.json.", metavar="DIR")
    ] = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is, check every tensor of it, and say who can load it.

    Exit code 0: clean. 1: something is wrong. 2: it cannot be read.
    """
    from mxdit.checkpoint import inspect_checkpoint

    need("diffusers")
    with Progress(
        TextColumn("Reading"), BarColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        bar = progress.add_task("", total=None)
        found = inspect_checkpoint(
            _source(source),
            base,
            lambda done, total: progress.update(bar, completed=done, total=total),
            variant=variant,
        )
    if as_json:
        out.print_json(json.dumps(found.to_dict()))
    else:
        for component in found.components:
            linears = in_words(component.linears)
            size = f"{component.nbytes / 2**20:.1f} MiB"
            say(f"{component.component or found.path}: {component.layout} layout, linears: {linears}; {size}")
            for line in component.about:
                say(f"  {line}")
            if component.kept:
                say(f"  float inside the blocks: {_some(component.kept)}")
            if component.activation_steps:
                say(f"  activations by step: {component.activation_steps}")
            for lora in component.loras:
                say(f"  merged: {' '.join(f'{key} {value}' for key, value in lora.items())}")
            for note in component.notes:
                say(f"  note: {note}")
            for fault in component.faults:
                say(f"  wrong: {fault}")
            for runtime, reason in component.loaders.items():
                say(f"  {runtime}: {'loads it' if reason is None else f'no: {reason}'}")
        say("clean" if found.clean else f"{sum(len(c.faults) for c in found.components)} findings")
    if not found.clean:
        raise typer.Exit(1)


def _source(given: list[str]) -> Path | dict[str, Path]:
    """What SRC names: a directory or a file, or component -> file."""
    named = [
        (name, Path(path))
        for name, equals, path in (text.partition("=") for text in given)
        if equals and name in COMPONENTS
    ]
    if not named and len(given) == 1:
        return Path(given[0])
    if len(named) < len(given) or len(dict(named)) < len(named):
        expected = f"one directory or file, or NAME=FILE with different names of {', '.join(COMPONENTS)}"
        raise InputError("more than one source", where="SRC", got=" ".join(given), expected=expected)
    return dict(named)


def _run(plan: Any, copy: bool, dry_run: bool, as_json: bool) -> None:
    """Show the plan, or carry it out."""
    figures = plan.to_dict()
    if not dry_run:
        columns = (TextColumn("Writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
            bar = progress.add_task("", total=plan.nbytes)
            plan.write(lambda done, _: progress.update(bar, completed=done), copy=copy)
    if as_json:
        out.print_json(json.dumps({**figures, "written": not dry_run}))
        return
    for item in plan.lost:
        tell(f"lost: {item}")
    if dry_run:
        for expert in figures["experts"]:
            for file, tensors in expert["files"].items():
                table = Table("tensor", "shape and dtype", title=f"{expert['component']}/{file}".lstrip("/"))
                for name, info in tensors.items():
                    table.add_row(name, info)
                out.print(table)
    for expert in figures["experts"]:
        linears = in_words(expert["linears"])
        say(f"{expert['component'] or 'expert'}: linears: {linears}; {expert['bytes'] / 2**20:.1f} MiB")
    done = "would be written" if dry_run else "written"
    say(f"{figures['destination']}: {figures['bytes'] / 2**20:.1f} MiB {done}, {len(plan.carried)} files carried over")


def _kept(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """Keys of each transformer, with those that a calibration's plan comes to beside them."""
    from mxdit.checkpoint.files import read_json

    report = read_json(path)
    kept, raised, steps = (report.get(name) for name in ("kept", "w4a8", "activation_steps"))
    if not (isinstance(kept, dict) and isinstance(raised, dict) and isinstance(steps, dict)):
        raise InputError("no report of mxdit calibrate", where=str(path), expected="a calibration.json")
    planned = {"num_bf16_fallback_layers": 0, **({"activation_steps": steps} if steps else {})}
    return {
        **own,
        **{
            name: {
                **planned,
                "ignored_layers": paths,
                "w4a8_fallback_layers": raised.get(name, []),
                **own.get(name, {}),
            }
            for name, paths in kept.items()
        },
    }


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
