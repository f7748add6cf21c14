"""`mxdit calibrate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from mxdit.cli.bench.tables import aligned
from mxdit.cli.console import (
    METHODS,
    Device,
    Dtype,
    Frames,
    Model,
    Size,
    app,
    bytes_of,
    device_of,
    dtype_of,
    need,
    path_of,
    say,
    size_of,
    tell,
    tell_slow,
)
from mxdit.cli.progress import Shown
from mxdit.errors import InputError
from mxdit.numerics.formats import FORMATS

if TYPE_CHECKING:
    from mxdit.calibrate.run import Outcome

SEEDS = 2**32  # what is chosen by chance has seeds made of this one, which must fit into 64 bits


@app.command("calibrate")
def calibrate(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Directory to make.", metavar="DST")],
    method: Annotated[str, typer.Option(help=f"{METHODS}.", metavar="METHOD")] = "mxfp4",
    preset: Annotated[
        str,
        typer.Option(
            help="What may be spent on more bits: fast, nothing; balanced, an eighth of the blocks' parameters in BF16 and a tenth "
            "of the steps with MXFP8 activations; quality, a quarter and a tenth.",
            metavar="PRESET",
        ),
    ] = "balanced",
    keep: Annotated[
        str | None,
        typer.Option(help="Share of the blocks' parameters in BF16, in place of the preset's.", metavar="12.5%"),
    ] = None,
    step_budget: Annotated[
        str | None,
        typer.Option(help="Share of the steps with MXFP8 activations, in place of the preset's.", metavar="10%"),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Most bytes of the blocks' weights, of all transformers, as in 9GiB; in place of --keep."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="As many parameters in BF16 as bring the predicted error down to this share; in place of --keep.",
            metavar="50%",
        ),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            help="Most time of the blocks' linears over a clip, as in 1.3 times that of four bits throughout: linears in BF16 and with "
            "MXFP8 activations; in place of --keep."
        ),
    ] = None,
    times: Annotated[
        str,
        typer.Option(help="Time of a product by its activations, for --max-cost.", metavar="FORMAT=TIME,..."),
    ] = "mxfp4=1,mxfp8=2,bf16=4",
    task: Annotated[str | None, typer.Option(help="What clips are made. Default: what the model makes.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="One prompt a line; for i2v a tab and an image's path follow. Default: the bundled model's, or 32 of our own."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many prompts to learn from. Default: 64, or what there are.")
    ] = None,
    held: Annotated[
        int | None, typer.Option(help="How many prompts to judge by, 4 or more. Default: 16, or a quarter.")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="What activations are to be at run time: mxfp4, mxfp8 or bf16. Default: the method's.",
            metavar="FORMAT",
        ),
    ] = None,
    with_: Annotated[
        str | None,
        typer.Option("--with", help="Steps to take beside the default ones: regress, bias.", metavar="STEPS"),
    ] = None,
    without: Annotated[
        str | None, typer.Option(help="Steps to leave out: smooth, search, gptq, refit.", metavar="STEPS")
    ] = None,
    lam: Annotated[float, typer.Option(help="How far 'regress' is held to the model's own weights.")] = 0.1,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Learn from as many prompts as fit in this time, by what the first clip takes. Default: all."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the clips.")] = None,
    size: Size = None,
    frames: Frames = None,
    seed: Annotated[int, typer.Option(help="Of what is chosen by chance.")] = 0,
    device: Device = "cpu",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep weights on the CPU, one block at a time on the device, for models that do not fit there.",
        ),
    ] = False,
    dtype: Dtype = "bf16",
    cache: Annotated[
        Path, typer.Option(help="Where clips and calibrated linears are kept: an interrupted run goes on from there.")
    ] = Path("mxdit-calibration"),
    force: Annotated[bool, typer.Option("--force", help="Write the checkpoint although a guard rejects it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Calibrate and judge, and write no checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Calibrate a model's weights on clips of its own, and write the packed checkpoint.

    Smoothing, scales and codes of every linear are searched for, each step kept only where inputs that nothing was learned from
    agree. What more bits would buy is estimated, and spent where it buys most. Then guards compare the whole with quantizing
    online, clips included, and a calibration that is no better is not written.

        mxdit calibrate bundled mini-mxfp4

        mxdit calibrate Wan2.2-T2V-A14B-Diffusers Wan2.2-T2V-A14B-mxfp4 --prompts prompts.txt --device cuda
    """
    from mxdit.calibrate.linears import DEFAULT, STEPS, Recipe
    from mxdit.calibrate.report import report_of
    from mxdit.calibrate.run import PAGE, Calibration
    from mxdit.calibrate.settings import PRESETS, Budget, Settings
    from mxdit.checkpoint import quantize_checkpoint
    from mxdit.checkpoint.writer import check_destination
    from mxdit.evals.cache import Cache
    from mxdit.generation import loading
    from mxdit.generation.directory import bundled, open_model

    need("diffusers", "transformers", "matplotlib", "av")
    check_destination(destination)
    model = open_model(path_of(source) or bundled(task or "t2v"))
    for what, path in (("the destination", destination), ("the cache", cache)):
        # Every file of a model is part of what the cache is found by: it would never be found again.
        if path.resolve().is_relative_to(model.path.resolve()):
            raise InputError(f"{what} lies in the model's directory", where=str(path), hint="Name another directory.")
    if method not in FORMATS:
        raise InputError("unknown format", field="method", got=repr(method), expected=" or ".join(FORMATS))
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError("no time", field="minutes", got=f"{minutes:g}", expected="a positive number")
    if not 0 <= seed < SEEDS:
        raise InputError("the seed is out of range", field="seed", got=seed, expected=f"0 to {SEEDS - 1}")
    if preset not in PRESETS:
        raise InputError("no such preset", field="preset", got=repr(preset), expected=" or ".join(PRESETS))
    extra, less = _names(with_), _names(without)
    if unknown := set(less) - set(STEPS):
        raise InputError("no such step", field="without", got=unknown.pop(), expected=", ".join(STEPS))
    if both := set(less) & set(extra):
        raise InputError("a step is both taken and left out", field="without", got=", ".join(sorted(both)))
    own = PRESETS[preset]
    budget = Budget(
        own.share if keep is None else _share("keep", keep),
        own.step_share if step_budget is None else _share("step_budget", step_budget),
        None if max_bytes is None else bytes_of("max_bytes", max_bytes),
        None if target is None else _share("target", target),
        max_cost,
        _times(times),
    )
    recipe = Recipe(
        method,
        activation or ("mxfp8" if method == "mxfp8" else "mxfp4"),
        steps=(*(step for step in DEFAULT if step not in less), *extra),
        lam=lam,
    )
    settings = Settings.choose(
        model,
        task=task,
        prompts=prompts,
        count=count,
        held=held,
        request={"steps": steps, "size": None if size is None else size_of(size), "frames": frames},
        recipe=recipe,
        budget=budget,
        dtype=dtype_of(dtype),
        device=device_of(device),
        offload=offload,
        seed=seed,
    )
    tell_slow(settings.dtype, settings.device)
    loading.show_loading(False)
    with Shown() as shown:
        calibration = Calibration(settings, Cache(cache), shown.progress)
        if minutes is not None:
            prompts_left = calibration.fit_into(60 * minutes)
            tell(f"{prompts_left} of {len(settings.fit)} prompts fit into {minutes:g} minutes")
        outcome = calibration.run()
    settings = calibration.settings
    report = report_of(settings, outcome)
    files = calibration.written(report, outcome)
    if as_json:
        say(json.dumps(report, indent=1))
    else:
        _show(report, outcome)
    tell(f"{', '.join(f'{what} {seconds:.0f} s' for what, seconds in outcome.seconds.items())}; report: {files[PAGE]}")
    if not outcome.accepted and not force:
        hint = "Give it more prompts, or leave out the step that did it; --force writes it all the same."
        failed = ", ".join(guard.what for guard in outcome.guards if not guard.passed)
        raise InputError("the calibration is no better than quantizing online", got=failed, hint=hint)
    if dry_run:
        return
    configs = {name: calibration.config(name, outcome) for name in settings.model.components}
    plan = quantize_checkpoint(
        settings.model.path,
        destination,
        next(iter(configs.values())),
        configs,
        calibrated=outcome.files,
        # FP32 is what a CPU without BF16 computes in, not what a checkpoint is to hold.
        dtype=torch.bfloat16 if settings.dtype is torch.float32 else settings.dtype,
        device=settings.device,
        beside=files,
    )
    with Shown() as shown:
        plan.write(lambda done, total: shown.progress("writing", done, total))
    tell(f"{destination}: {plan.nbytes / 2**20:.1f} MiB")


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _times(text: str) -> dict[str, float]:
    """Numbers by name of "mxfp8=2,bf16=4"."""
    try:
        return {name.strip(): float(time) for name, time in (part.split("=") for part in _names(text))}
    except ValueError:
        raise InputError(
            "no times", field="times", got=repr(text), expected="something like mxfp4=1,mxfp8=2,bf16=4"
        ) from None


def _share(field: str, text: str) -> float:
    """0.125 of "12.5%" or "0.125"."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError("no share", field=field, got=repr(text), expected="something like 12.5%")
    return share


def _show(report: dict[str, Any], outcome: Outcome) -> None:
    for expert, done in report["steps"].items():
        rows = [[expert, "kept", "mean SQNR", ""]]
        rows += [
            [row["step"], f"{row['kept']} of {row['tried']}", f"{row['sqnr_db']:.2f} dB", row["why_not"]]
            for row in done
        ]
        for cells in aligned(rows):
            say("  ".join(cells))
    for what, found in (("BF16", outcome.spent.kept), ("MXFP8 activations", outcome.spent.raised)):
        for name, paths in found.items():
            if paths:
                say(f"{name}: {what}: {', '.join(paths)}")
    if outcome.steps:
        say(f"MXFP8 activations at steps: {outcome.steps}")
    plan = report["plan"]
    if outcome.spent.curve:
        say(
            f"plan: {plan['parameters_in_bf16']:.1%} of the blocks' parameters in BF16, {plan['bytes'] / 2**20:.1f} MiB, predicted "
            f"error {plan['predicted_error']:.1%} of what it is without"
        )
    rows = [["guard", "online", "calibrated", "", "rule"]]
    rows += [[g.what, g.online, g.calibrated, "pass" if g.passed else "REJECT", g.why] for g in outcome.guards]
    for cells in aligned(rows):
        say("  ".join(cells))
