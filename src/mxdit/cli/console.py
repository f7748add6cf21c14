"""What the commands share: the app, the consoles, and how options are read."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from mxdit.errors import InputError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
err = Console(stderr=True)
out = Console()

# What users typed goes to the terminal as it is: no markup in prompts, paths and globs.
say = partial(out.print, highlight=False, soft_wrap=True, markup=False)
tell = partial(err.print, highlight=False, soft_wrap=True, markup=False)

METHODS = ("none", "mxfp4", "mxfp4_dualscale", "mxfp8")
DTYPES = ("bf16", "fp16", "fp32")

IgnoredLayers = Annotated[
    list[str] | None,
    typer.Option(help="Linear (path or glob) that stays unquantized. May be repeated.", metavar="GLOB"),
]
FallbackBlocks = Annotated[int | None, typer.Option(help="The first N blocks stay unquantized.", metavar="N")]

Variant = Annotated[
    str | None,
    typer.Option(
        help="Of the weight files, such as fp16. Default: the plain files, or the one variant that there is.",
        metavar="NAME",
    ),
]


@app.callback()
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log, too.")] = False,
) -> None:
    """4-bit microscaling (MXFP4, W4A4) for video diffusion transformers: Wan2.2 text-to-video and image-to-video."""
    # Nothing may reach for a model hub: what is not in the directory is an error at once, not after a time-out.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    handler = RichHandler(console=err, show_time=False, show_path=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
    if not verbose:
        for host in ("diffusers", "transformers"):
            os.environ.setdefault(f"{host.upper()}_VERBOSITY", "critical")


def need(*modules: str) -> None:
    """Raise InputError, before any work, for a package of the extras that is not installed."""
    for module in modules:
        if find_spec(module) is None:
            hint = "Install what videos need: pip install 'mxdit[diffusers,video]'."
            raise InputError("a package is not installed", where=module, hint=hint)


def read_config(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    where = "--quantization-config"
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, ValueError) as error:
            raise InputError("neither JSON nor a readable file", where=where, got=str(error)) from None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError("not JSON", where=where, got=str(error)) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=where, got=type(value).__name__)
    return value


def dtype_of(name: str) -> Any:
    import torch

    if name not in DTYPES:
        raise InputError("unknown dtype", where="--dtype", got=repr(name), expected=", ".join(DTYPES))
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"."""
    parts = text.lower().replace("*", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise InputError("not a size", where="--size", got=repr(text), expected="WIDTHxHEIGHT, as in 832x480")
    return int(parts[1]), int(parts[0])


def device_of(name: str) -> str:
    """The name of a torch device, after a tensor has been there and back."""
    import torch

    from mxdit.backends import backends

    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:
        known = (backend.why_not() for backend in backends() if backend.device == name.partition(":")[0])
        reason = next(filter(None, known), None) or str(error).splitlines()[0]
        raise InputError("this device cannot be used", where="--device", got=f"{name!r}: {reason}") from None
    return name


def check_output(path: Path, suffix: str = "") -> None:
    """Raise InputError, before any work is done, for a path that no file of this kind can be written to."""
    if not path.name.lower().endswith(suffix):
        raise InputError("the output is of another kind", where=str(path), expected=f"a name that ends in {suffix}")
    if path.is_dir():
        raise InputError("the output path is a directory", where=str(path), expected="a file name in it")
    trial = path.with_name(f".{path.name}.partial")
    try:
        if not path.parent.is_dir():
            raise InputError("the output's directory does not exist", where=str(path.parent), hint="Create it first.")
        with trial.open("wb"):
            pass
    except OSError as error:
        raise InputError("the output path cannot be written", where=str(path), got=error.strerror) from None
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)
