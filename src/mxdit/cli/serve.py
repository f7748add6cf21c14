"""`mxdit serve`."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mxdit.cli.console import (
    DTYPES,
    Attention,
    Compile,
    Config,
    FallbackBlocks,
    Fused,
    IgnoredLayers,
    Memory,
    app,
    attention_of,
    bytes_of,
    device_of,
    dtype_of,
    need,
    read_keys,
    tell,
    tell_slow,
)
from mxdit.errors import InputError
from mxdit.numerics.formats import FORMATS

if TYPE_CHECKING:
    from mxdit.serve.served import Served

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SHORTEST = 16  # characters of an API key


@app.command()
def serve(
    directories: Annotated[
        list[str] | None, typer.Argument(help="Pipelines' directories, or 'bundled'.", metavar="[DIR|bundled]...")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"Modes to offer each model in, separated by commas: none (as it is stored), {', '.join(FORMATS)}. Default: "
            "as it is stored; of the bundled models all.",
            metavar="MODE,...",
        ),
    ] = None,
    config: Config = None,
    ignored_layers: IgnoredLayers = None,
    num_bf16_fallback_layers: FallbackBlocks = None,
    attention: Attention = None,
    compiled: Compile = False,
    fused: Fused = False,
    device: Annotated[
        str | None, typer.Option(help="Torch devices, separated by commas; each gets a worker. Default: cpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}: of everything that is not quantized. Default: bf16.")
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep weights on the CPU, and on the device only what runs.")
    ] = False,
    memory: Memory = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Servers that do the work instead of this machine, separated by commas: vLLM-Omni's, or other `mxdit serve`.",
            metavar="URL,...",
        ),
    ] = None,
    engine_key_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the API key that the engines ask for.", metavar="FILE")
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Where jobs and videos are kept, and LoRA in adapters/.", metavar="DIR")
    ] = Path("mxdit-data"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8091,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with API keys, one a line, of which clients must send one.", metavar="FILE"),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Listen beyond this machine without keys: whoever reaches it may use it.")
    ] = False,
    keep: Annotated[
        str | None, typer.Option(help="For how long videos are kept, as in 30d or 12h. Default: for ever.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Most bytes of all videos, as in 100GiB; the oldest go first. Default: no limit.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Most jobs that may wait.", min=1)] = 1000,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds in which a client has to send a request, and to take what it is sent.", min=1)
    ] = 60,
) -> None:
    """Make videos for clients of OpenAI's /v1/videos, and on a page in the browser.

    Jobs are kept on the disk: after a crash or a restart the queue goes on.

        mxdit serve                                             # the bundled models, http://127.0.0.1:8091
        mxdit serve Wan2.2-T2V-A14B-mxfp4 --device cuda:0,cuda:1 --data /var/lib/mxdit
        mxdit serve bundled --host 0.0.0.0 --api-key-file keys.txt
        mxdit serve --engine http://node1:8091,http://node2:8091   # in front of vLLM-Omni
    """
    need("diffusers", "av", "PIL")
    serving = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client", "httpx", "httpx_sse")
    need(*serving, extra="serve")
    import uvicorn

    from mxdit.client.protocol import root_of
    from mxdit.generation.plan import budget_of
    from mxdit.serve import trial
    from mxdit.serve.access import Access
    from mxdit.serve.adapters import Shelf
    from mxdit.serve.app import make_app
    from mxdit.serve.device import DeviceRunner
    from mxdit.serve.dispatch import Dispatcher, Runner
    from mxdit.serve.engine import EngineRunner, Engines
    from mxdit.serve.files import Files
    from mxdit.serve.jobs import Jobs
    from mxdit.serve.lock import only_one
    from mxdit.serve.protocol import Timed
    from mxdit.serve.served import Catalog

    if engine is None:
        devices = [device_of(part.strip()) for part in (device or "cpu").split(",")]
        keys, own = read_keys(config, ignored_layers=ignored_layers, num_bf16_fallback_layers=num_bf16_fallback_layers)
        how: dict[str, Any] = {
            "keys": keys,
            "components": own,
            "dtype": dtype_of(dtype or "bf16"),
            "offload": offload,
            "memory": None if memory is None else budget_of(memory),
            "attention": attention_of(attention),
            "compile": compiled,
            "fused": fused,
        }
        offer = Catalog(_served(directories, method, **how), Shelf(data / "adapters"))
        if compiled or attention is not None or memory is not None:  # what is wrong is said here, and not in a job
            tell("trying whether the models run so")
            trial.check([*offer.served.values()], devices)
        runners: list[Runner] = [DeviceRunner(offer, device) for device in devices]
        what, where = ", ".join(offer.served), ", ".join(devices)
        tell_slow(how["dtype"], devices[0])
    else:
        _check_engine(
            directories=directories,
            device=device,
            dtype=dtype,
            method=method,
            config=config,
            ignored_layers=ignored_layers,
            num_bf16_fallback_layers=num_bf16_fallback_layers,
            attention=attention,
            compile=compiled or None,
            fused=fused or None,
            offload=offload or None,
            memory=memory,
        )
        addresses = [root_of(part.strip()) for part in engine.split(",") if part.strip()]
        if not addresses:
            raise InputError("no engine", field="engine", got=repr(engine), expected="http://HOST:PORT")
        if len({*addresses}) < len(addresses):
            raise InputError("an engine is there twice", field="engine", got=engine)
        offer = Engines(addresses)
        engine_key = next(iter(_keys(engine_key_file, "engine_key_file")), None)
        runners = [EngineRunner(address, offer, engine_key) for address in addresses]
        what, where = "what the engines offer", ", ".join(addresses)
    api_keys, seconds = _keys(api_key_file), _seconds(keep)
    most = None if max_bytes is None else bytes_of("max_bytes", max_bytes)
    if not (api_keys or no_auth or _is_loopback(host)):
        raise InputError(
            "others would reach the server without a key",
            field="host",
            got=host,
            hint="Add --api-key-file FILE, or say --no-auth.",
        )
    with only_one(data), _listening(host, port) as listening:
        jobs = Jobs(data / "jobs.sqlite", seconds, max_queue)
        answers = make_app(offer, jobs, Dispatcher(jobs, Files(data), runners, most))
        answers.add_middleware(Access, keys=api_keys, most=64 << 20, limit=request_timeout)
        port = listening.getsockname()[1]
        tell(f"{what} on {where}; http://{host}:{port}, jobs in {data}")
        options = uvicorn.Config(
            answers,
            http=cast(Any, partial(Timed, limit=request_timeout)),
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=5,
            limit_concurrency=512,
            h11_max_incomplete_event_size=32 << 10,
        )
        uvicorn.Server(options).run([listening])


def _served(directories: list[str] | None, method: str | None, **how: Any) -> list[Served]:
    """Each directory in each mode."""
    from mxdit.generation.directory import BUNDLED, bundled
    from mxdit.serve.served import AS_STORED, modes_of, unique

    asked = [part.strip() for part in (method or "").split(",") if part.strip()]
    unknown = [mode for mode in asked if mode not in (AS_STORED, *FORMATS)]
    if unknown:
        raise InputError("no such mode", field="method", got=unknown[0], expected=", ".join((AS_STORED, *FORMATS)))
    served = []
    for directory in directories or ["bundled"]:
        if directory == "bundled":
            modes = asked or [AS_STORED, *FORMATS]
            for task in BUNDLED:
                served += modes_of(bundled(task), f"mini-{task}", [task], modes, **how)
        else:
            path = Path(directory)
            served += modes_of(path, path.resolve().name, [], asked or [AS_STORED], **how)
    return unique(served)


def _check_engine(**given: Any) -> None:
    """Raise InputError for what is said of models that run elsewhere."""
    for field, value in given.items():
        if value is not None:
            raise InputError(
                "the engines' models are their own", field=field, got=value, hint="Leave it out, or --engine."
            )


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            "it cannot be listened there", field="port", got=f"{host}:{port}", hint=f"{error.strerror}."
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keys(file: Path | None, field: str = "api_key_file") -> list[str]:
    if file is None:
        return []
    try:
        keys = [line.strip() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise InputError("the file cannot be read", field=field, where=str(file), got=str(error)) from None
    if not keys or any(len(key) < SHORTEST or not key.isascii() for key in keys):
        raise InputError(
            "no API keys" if not keys else "an API key is too short, or not ASCII",
            field=field,
            where=str(file),
            expected=f"{SHORTEST} characters or more, one key a line",
            hint="`openssl rand -hex 32` makes one.",
        )
    return keys


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip().lower())
    if not found or float(found[1]) <= 0:
        raise InputError("not a time", field="keep", got=repr(text), expected="something like 30d, 12h or 90m")
    return float(found[1]) * UNITS[found[2]]
