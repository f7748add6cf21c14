"""What the commands share: the app, the consoles, and how options are read."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler

from mxdit.backends import backends
from mxdit.config.components import split_keys
from mxdit.config.loras import LoraFile
from mxdit.errors import InputError
from mxdit.models import COMPONENTS, TEXT_ENCODERS
from mxdit.numerics.formats import FORMATS

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
err = Console(stderr=True)
out = Console()

# What users typed goes to the terminal as it is: no markup in prompts, paths and globs.
say = partial(out.print, highlight=False, soft_wrap=True, markup=False)
tell = partial(err.print, highlight=False, soft_wrap=True, markup=False)

METHODS = ", ".join(FORMATS)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The option of a request's field, or of an argument, that is not called as the field is.
OPTIONS = {"guidance": "--guidance-scale", "guidance_2": "--guidance-scale-2"}

Model = Annotated[str, typer.Argument(help="A pipeline's directory, or 'bundled'.", metavar="DIR|bundled")]
Config = Annotated[
    str | None,
    typer.Option(
        help="More keys, as JSON or a JSON file; under 'transformer' or 'transformer_2' for that one only, and under "
        "'text_encoder', 'text_encoder_2', ... those of a text encoder.",
        metavar="JSON|FILE",
    ),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        help="Method of the text encoder's weights, or its keys as JSON. Its activations stay as they are. Default: not "
        "quantized.",
        metavar="METHOD|JSON",
    ),
]
IgnoredLayers = Annotated[
    list[str] | None,
    typer.Option(help="Linear (path or glob) that stays unquantized. May be repeated.", metavar="GLOB"),
]
LayerMethods = Annotated[
    list[str] | None,
    typer.Option(
        help="Linears (path or glob) of another method, as in 'blocks.[0-4].*=mxfp8'. May be repeated.",
        metavar="GLOB=METHOD",
    ),
]
ActivationSteps = Annotated[
    str | None,
    typer.Option(
        help="Activations at some denoising steps, as in '0-1,38-39=mxfp8;20=bf16'. Of a cascade both experts' steps count on.",
        metavar="STEPS=FORMAT",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="How attention is computed: torch, exact, int8; with other layers and denoising steps as in "
        "'int8;0-1=exact;blocks.0.*=torch', or as JSON; of a cascade also one for each, as in '{\"transformer_2\": \"int8\"}'.",
        metavar="METHOD[;...]|JSON",
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the transformers' blocks: the first step takes longer, others are faster."),
]
Fused = Annotated[
    bool,
    typer.Option("--fused", help="Norms, rotary embeddings and GELU in one pass each: faster, in less memory."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        help="LoRA, a .safetensors file with names that diffusers knows; of a cascade say for which transformer, as in "
        "'transformer_2=style.safetensors:0.8'. May be repeated.",
        metavar="[TRANSFORMER=]FILE[:SCALE]",
    ),
]
FallbackBlocks = Annotated[int | None, typer.Option(help="The first N blocks stay unquantized.", metavar="N")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's own.", metavar="WxH")]
Frames = Annotated[int | None, typer.Option(help="Number of frames. Default: the model's own.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory that a run may take, as in 24GiB: of the process on a CPU, else of the device. What stays in it is planned.",
        metavar="SIZE",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ...")]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}: of everything that is not quantized.")]


def option(field: str) -> str:
    """The option that sets a field of a request, or an argument of a function, which errors name."""
    return OPTIONS.get(field, f"--{field.replace('_', '-')}")


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
    """4-bit microscaling (MXFP4, W4A4) for diffusion transformers: Wan2.2 text-to-video and image-to-video, and others."""
    # Nothing may reach for a model hub: what is not in the directory is an error at once, not after a time-out.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # torch asks for this at its first large tensor: pages of 2 MiB for those. Most of what lies between linears and attention
    # is page faults of temporaries, see docs/cpu.md.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    handler = RichHandler(console=err, show_time=False, show_path=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
    if not verbose:
        for host in ("diffusers", "transformers"):
            os.environ.setdefault(f"{host.upper()}_VERBOSITY", "critical")


def need(*modules: str, extra: str = "diffusers,video") -> None:
    """Raise InputError, before any work, for a package of an extra that is not installed."""
    for module in modules:
        if find_spec(module) is None:
            hint = f"Install what this needs: pip install 'mxdit[{extra}]'."
            raise InputError("a package is not installed", where=module, hint=hint)


def path_of(directory: str) -> Path | None:
    """The directory that was named, None for the bundled model's."""
    return None if directory == "bundled" else Path(directory)


def read_keys(
    config: str | None, text_encoder: str | None = None, **given: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys for every transformer, transformer or text encoder -> keys for it alone) of --config, and of other options where
    they are given."""
    keys, own = split_keys(_read_json(config), (*COMPONENTS, *TEXT_ENCODERS))
    if text_encoder is not None:
        inline = text_encoder.lstrip().startswith("{")
        option = _read_json(text_encoder, "--text-encoder") if inline else {"quant_method": text_encoder}
        stated = own.get("text_encoder") or {}
        stated = {"quant_method": stated} if isinstance(stated, str) else stated
        if not isinstance(stated, dict) or not stated.keys().isdisjoint(option):
            raise InputError(
                "--config says it, too",
                where="--text-encoder",
                got=json.dumps(stated),
                hint="Leave one of the two out.",
            )
        own["text_encoder"] = {**stated, **option}
    return {**keys, **{key: value for key, value in given.items() if value is not None}}, own


def attention_of(text: str | None) -> dict[str, Any] | str | None:
    """What --attention says: a policy's text, or its JSON, which may have one for each transformer."""
    return _read_json(text, "--attention") if text is not None and text.lstrip().startswith("{") else text


def layer_methods_of(given: list[str] | None) -> dict[str, list[str]] | None:
    """The key `layer_methods` of options GLOB=METHOD; None where there is none."""
    found: dict[str, list[str]] = {}
    for text in given or ():
        pattern, equals, method = (part.strip() for part in text.rpartition("="))
        if not (pattern and equals and method):
            raise InputError(
                "not layers and their method", field="layer_methods", got=repr(text), expected="blocks.[0-4].*=mxfp8"
            )
        found.setdefault(method, []).append(pattern)
    return found or None


def _read_json(text: str | None, where: str = "--config") -> dict[str, Any]:
    if text is None:
        return {}
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


def loras_of(given: list[str] | None) -> list[LoraFile]:
    """What --lora says, each time it is there."""
    return [LoraFile.parse(text, COMPONENTS) for text in given or ()]


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError("unknown dtype", where="--dtype", got=repr(name), expected=", ".join(DTYPES))
    return DTYPES[name]


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"."""
    parts = text.lower().replace("*", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise InputError("not a size", where="--size", got=repr(text), expected="WIDTHxHEIGHT, as in 832x480")
    return int(parts[1]), int(parts[0])


def bytes_of(field: str, text: str) -> int:
    """Bytes of "2GiB", "500MB" or "1000000"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    number = float(found[1]) * UNITS[found[2] or ""] if found else 0
    if number < 1:
        raise InputError("not a size", field=field, got=repr(text), expected="something like 2GiB or 500MB")
    return int(number)


def device_of(name: str) -> str:
    """The name of a torch device, after a tensor has been there and back."""
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:
        known = (backend.why_not() for backend in backends() if backend.device == name.partition(":")[0])
        reason = next(filter(None, known), None) or str(error).splitlines()[0]
        raise InputError("this device cannot be used", where="--device", got=f"{name!r}: {reason}") from None
    return name


def tell_slow(dtype: Any, device: str) -> None:
    """Say so where FP32 would be the faster type of what is not quantized. It is not switched to: one command computes in one
    type on every machine."""
    from mxdit.backends.carrier import note

    if why := note(dtype, device):
        tell(f"note: {why}; --dtype fp32 is faster, and takes twice the memory for what is not quantized")


def check_output(path: Path, *suffixes: str) -> None:
    """Raise InputError, before any work is done, for a path that no file of this kind can be written to."""
    if suffixes and path.suffix.lower() not in suffixes:
        expected = f"a name that ends in {' or '.join(suffixes)}"
        raise InputError("the output is of another kind", where=str(path), expected=expected)
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
