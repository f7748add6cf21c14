"""`mxdit client`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from mxdit.cli.console import Frames, Size, app, need, out, say, size_of, tell
from mxdit.cli.progress import Shown
from mxdit.errors import InputError

if TYPE_CHECKING:
    from mxdit.client import Client, Video

commands = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(commands, name="client")

URL = "http://127.0.0.1:8091"

Url = Annotated[str, typer.Option(help="Of the server.", envvar="MXDIT_URL")]
Key = Annotated[
    Path | None,
    typer.Option(help="File whose first line is the API key.", envvar="MXDIT_API_KEY_FILE", metavar="FILE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="Of the job, as `submit` prints it.", metavar="ID")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Where the video is written: a file, or a directory.", metavar="PATH"),
]


@commands.callback()
def client() -> None:
    """Ask a server for videos: `mxdit serve`, or vLLM-Omni.

    --url and --api-key-file, or MXDIT_URL and MXDIT_API_KEY_FILE, say which server.

        mxdit client submit "a red seven moving left" --steps 20 -o seven.mp4
    """


@commands.command()
def submit(
    prompt: Annotated[str | None, typer.Argument(help="What it shows.")] = None,
    model: Annotated[str | None, typer.Option(help="An id of `mxdit client models`.", metavar="ID")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame: makes it image-to-video.")] = None,
    size: Size = None,
    frames: Frames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance, of a cascade its first expert's.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of a cascade's second expert.")] = None,
    boundary_ratio: Annotated[float | None, typer.Option(help="Where the second expert takes over, 0 to 1.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the MP4.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the starting noise. Default: the server's choice.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="An id of `mxdit client adapters`. May be repeated.", metavar="NAME[:SCALE]"),
    ] = None,
    extra: Annotated[
        str | None, typer.Option(help="More parameters of the server's, as a JSON object.", metavar="JSON")
    ] = None,
    output: Output = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for it; --output does, too.")] = False,
    url: Url = URL,
    api_key_file: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask for a video. Prints the job's id at once; with --output or --wait, waits.

    mxdit client submit "a red seven moving left" -o seven.mp4
    """
    if size is not None:
        height, width = size_of(size)
        size = f"{width}x{height}"
    _check(output)
    fields = {
        "model": model,
        "negative_prompt": negative_prompt,
        "size": size,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "boundary_ratio": boundary_ratio,
        "flow_shift": flow_shift,
        "fps": fps,
        "seed": seed,
        "lora": [_adapter(text) for text in lora] if lora else None,
        "extra_params": None if extra is None else _object(extra),
    }
    with _server(url, api_key_file) as server:
        video = server.submit(prompt, image=image, **fields)
        if output is None and not wait:
            _show([video], as_json, lambda: say(video.id))
            return
        tell(video.id)  # so that it can be found again, should this end before the job does
        _finish(server, video.id, output, as_json)


@commands.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="How many.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Those behind this one.", metavar="ID")] = None,
    order: Annotated[str, typer.Option(help="desc (the newest first) or asc.")] = "desc",
    url: Url = URL,
    api_key_file: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show jobs, the newest first."""
    with _server(url, api_key_file) as server:
        videos = server.list(limit, after=after, order=order)
    _show(videos, as_json, lambda: out.print(_table(videos)), many=True)


@commands.command()
def get(id: Id, url: Url = URL, api_key_file: Key = None, as_json: AsJson = False) -> None:
    """Show one job."""
    with _server(url, api_key_file) as server:
        video = server.get(id)
    _show([video], as_json, lambda: _details(video))


@commands.command()
def wait(id: Id, output: Output = None, url: Url = URL, api_key_file: Key = None, as_json: AsJson = False) -> None:
    """Wait for a job, and download it with --output. Exit code 2 where it failed."""
    _check(output)
    with _server(url, api_key_file) as server:
        _finish(server, id, output, as_json)


@commands.command()
def cancel(id: Id, url: Url = URL, api_key_file: Key = None, as_json: AsJson = False) -> None:
    """Stop a job after the step that runs. Its entry stays; `delete` forgets it."""
    with _server(url, api_key_file) as server:
        video = server.cancel(id)
    _show([video], as_json, lambda: say(f"{video.id} {'is cancelled' if video.ended else 'stops after this step'}"))


@commands.command()
def delete(id: Id, url: Url = URL, api_key_file: Key = None) -> None:
    """Stop a job if it runs, and forget it and its video."""
    with _server(url, api_key_file) as server:
        server.delete(id)


@commands.command()
def models(url: Url = URL, api_key_file: Key = None, as_json: AsJson = False) -> None:
    """Show what the server offers."""
    with _server(url, api_key_file) as server:
        found = server.models()
    if as_json:
        out.print_json(json.dumps(list(found)))
        return
    table = Table("model", "task", "size", "frames", "steps")
    for model in found:
        given = model.get("defaults") or {}
        row = (model["id"], model.get("task"), *map(given.get, ("size", "num_frames", "num_inference_steps")))
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    out.print(table)


@commands.command()
def adapters(url: Url = URL, api_key_file: Key = None, as_json: AsJson = False) -> None:
    """Show the adapters that the server has."""
    with _server(url, api_key_file) as server:
        found = server.adapters()
    if as_json:
        out.print_json(json.dumps(list(found)))
        return
    table = Table("adapter", "transformers", "MiB")
    for adapter in found:
        row = (adapter["id"], ", ".join(adapter["transformers"] or ()), f"{adapter['bytes'] / 2**20:.1f}")
        table.add_row(*map(Text, row))
    out.print(table)


@contextmanager
def _server(url: str, key_file: Path | None) -> Iterator[Client]:
    need("httpx", "httpx_sse", extra="client")
    from mxdit.client import Client

    key = None
    if key_file is not None:
        try:
            lines = [line.strip() for line in key_file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise InputError("cannot be read", field="api_key_file", where=str(key_file), got=str(error)) from None
        key = next((line for line in lines if line and not line.startswith("#")), None)
        if key is None or not key.isascii():
            raise InputError("no API key", field="api_key_file", where=str(key_file))
    with Client(url, api_key=key) as client:
        yield client


def _finish(server: Client, id: str, output: Path | None, as_json: bool) -> None:
    with Shown() as shown:

        def told(video: Video) -> None:
            if video.status == "queued":
                shown.progress(f"waits, {video.queue_position or 0} jobs before it", 0, 1)
            elif video.steps and video.step is not None:
                what = "decodes" if video.step >= video.steps else "denoises"
                shown.progress(what, video.step, video.steps)
            else:
                shown.progress("runs", video.progress, 100)

        video = server.wait(id, told=told)
        path = None if output is None else server.download(id, output)
    _show([video], as_json, lambda: say(str(path) if path else f"{id} is completed"))


def _check(output: Path | None) -> None:
    if output is not None and not output.is_dir() and not output.parent.is_dir():
        raise InputError("the directory does not exist", field="output", where=str(output.parent), hint="Create it.")


def _adapter(text: str) -> dict[str, Any]:
    """What "NAME" or "NAME:0.8" says."""
    name, colon, scale = text.partition(":")
    try:
        return {"name": name, "scale": float(scale)} if colon else {"name": name}
    except ValueError:
        raise InputError("the scale is no number", field="lora", got=repr(scale), expected="NAME:SCALE") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError("not JSON", field="extra", got=str(error)) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", field="extra", got=type(value).__name__)
    return value


def _show(videos: Sequence[Video], as_json: bool, otherwise: Callable[[], object], *, many: bool = False) -> None:
    """Print what the server told, or something for readers."""
    if as_json:
        told = [dict(video.raw) for video in videos]
        out.print_json(json.dumps(told if many else told[0]))
    else:
        otherwise()


def _table(videos: Sequence[Video]) -> Table:
    whole = max((len(video.id) for video in videos), default=0)  # an id that is cut short is of no use
    table = Table(Column("id", min_width=whole, no_wrap=True), "status", "model", "prompt")
    for video in videos:
        status = f"{video.status} {video.progress} %" if video.status == "in_progress" else video.status
        prompt = textwrap.shorten(video.prompt or "", 60, placeholder="...")
        # As text: a prompt's brackets are no markup.
        table.add_row(*(Text(cell or "") for cell in (video.id, video.error_code or status, video.model, prompt)))
    return table


def _details(video: Video) -> None:
    rows = {
        "id": video.id,
        "status": video.status,
        "error": video.error and f"{video.error} ({video.error_code})",
        "model": video.model,
        "prompt": video.prompt,
        "waits behind": video.queue_position,
        "step": f"{video.step} of {video.steps}" if video.steps else None,
        "seconds": video.inference_time_s,
        "bytes": video.file_size,
        **{name: value for name, value in video.parameters.items() if name != "prompt"},
    }
    for name, value in rows.items():
        if value is not None:
            say(f"{name:20} {value}")
