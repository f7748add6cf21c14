"""What goes to a server and what comes back, without the sending: both clients are made of this."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx

from mxdit.errors import InputError, MXDiTError

BUSY = (429, 503)  # the request was not taken, and may come again
LONGEST = 30.0  # seconds between two tries
POLL = 0.5  # seconds between two looks where a server has no event stream
SUFFIX = {"video/mp4": ".mp4", "image/png": ".png"}


@dataclass(frozen=True)
class Video:
    """A job, as a server tells it. What a server does not tell is None; `raw` is all that it told.

    status          "queued", "in_progress", "completed" or "failed".
    progress        percent.
    step, steps     denoising steps that are done, and that there are.
    eta_seconds     until the last step.
    queue_position  how many jobs wait before it.
    attempts        how often it was begun.
    error_code      of a failed one; "cancelled" where it was.
    error           what went wrong.
    file_size       in bytes.
    parameters      of the request, every choice made.
    """

    id: str
    status: str
    progress: int
    model: str | None
    prompt: str | None
    step: int | None
    steps: int | None
    eta_seconds: float | None
    queue_position: int | None
    attempts: int | None
    error_code: str | None
    error: str | None
    media_type: str
    file_size: int | None
    inference_time_s: float | None
    parameters: Mapping[str, Any]
    raw: Mapping[str, Any]

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")

    @classmethod
    def of(cls, raw: Any) -> Video:
        """Raises ServerError for what is no video."""
        try:
            error = raw.get("error") or {}
            return cls(
                id=raw["id"],
                status=raw["status"],
                progress=int(raw.get("progress") or 0),
                error_code=None if error.get("code") is None else str(error["code"]),
                error=error.get("message"),
                media_type=raw.get("media_type") or "video/mp4",
                parameters=raw.get("parameters") or {},
                raw=raw,
                **{name: raw.get(name) for name in _AS_TOLD},
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ServerError("not a video", got=repr(raw)[:200]) from None


_AS_TOLD = (
    *("model", "prompt", "step", "steps", "eta_seconds", "queue_position", "attempts", "file_size"),
    "inference_time_s",
)


class ServerError(MXDiTError):
    """A server refused, or answered what it should not.

    status  of HTTP; None where the answer itself was wrong.
    code    the server's own.
    """

    def __init__(self, what: str, *, status: int | None = None, code: str | None = None, **more: Any) -> None:
        super().__init__(what, **more)
        self.status, self.code = status, code


class Unreachable(MXDiTError):
    """No answer came."""


class VideoFailed(MXDiTError):
    """A job ended without a video."""

    def __init__(self, video: Video) -> None:
        super().__init__(video.error or "the job failed", where=video.id, got=video.error_code)
        self.video = video


def root_of(url: str) -> str:
    """A server's address without what follows the host and the path in front of /v1. Raises InputError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("not a server's address", field="url", got=repr(url), expected="http://HOST:PORT")
    return str(parsed.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/v1")


def path_of(id: str, what: str = "") -> str:
    """The route of a job; an id is a name in it, whatever it holds."""
    return f"/v1/videos/{quote(id, safe='')}{what}"


def headers_of(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def submission(prompt: str | None, image: str | Path | bytes | None, key: str | None, fields: Mapping[str, Any]) -> Any:
    """The arguments of httpx for a job: a form, which every server takes. Raises InputError for an unreadable image.

    Args:
        key: for Idempotency-Key; one by chance where there is none, so that it may be sent again.
    """
    form: dict[str, Any] = {}
    for name, value in {"prompt": prompt, **fields}.items():
        if value is not None:
            text = json.dumps(value) if isinstance(value, Mapping | list | bool) else str(value)
            form[name] = (None, text.encode())
    if image is not None:
        if not isinstance(image, bytes):
            try:
                image = Path(image).read_bytes()
            except OSError as error:
                raise InputError("cannot be read", field="image", where=str(image), got=error.strerror) from None
        form["input_reference"] = ("first-frame", image)
    if not form:
        form["prompt"] = (None, b"")  # a form of no parts is none; the server says what it lacks
    return {"files": form, "headers": {"Idempotency-Key": key or uuid.uuid4().hex}}


def query(limit: int, after: str | None, order: str) -> dict[str, Any]:
    asked = {"limit": limit, "after": after, "order": order}
    return {name: value for name, value in asked.items() if value is not None}


def delay(tries: int, most: int, answer: httpx.Response | None) -> float | None:
    """Seconds after which to send a request again, that found a server busy, or none; None where it is not to be."""
    if tries > most or (answer is not None and answer.status_code not in BUSY):
        return None
    told = answer.headers.get("retry-after", "") if answer is not None else ""
    return min(LONGEST, float(told) if told.isdigit() else 0.5 * 2.0**tries)


def json_of(answer: httpx.Response) -> Any:
    """What an answer holds. Raises ServerError."""
    if answer.is_error:
        raise refusal(answer)
    try:
        return answer.json()
    except ValueError:
        raise ServerError(
            "the answer is no JSON",
            where=str(answer.request.url),
            got=repr(answer.text[:100]),
            status=answer.status_code,
        ) from None


def video_of(answer: httpx.Response) -> Video:
    """The job of an answer: vLLM-Omni tells a failed one under an error's status. Raises ServerError."""
    if answer.is_error:
        try:
            raw = answer.json()
        except ValueError:
            raw = None
        if isinstance(raw, dict) and raw.get("object") == "video":
            return Video.of(raw)
    return Video.of(json_of(answer))


def told_by(data: str) -> Video:
    """The job that an event tells. Raises ServerError."""
    try:
        raw = json.loads(data)
    except ValueError:
        raise ServerError("an event is no JSON", got=repr(data[:100])) from None
    return Video.of(raw)


def refusal(answer: httpx.Response) -> ServerError:
    """The error that an answer tells: in OpenAI's shape, FastAPI's, or none."""
    status, what, field, code = answer.status_code, "", None, None
    try:
        body = answer.json()
    except ValueError:
        body = None
        what = answer.text[:200]
    told = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(told, dict):
        message = told.get("message") or told.get("detail") or ""
        what = message if isinstance(message, str) else json.dumps(message)
        field, code = told.get("param"), told.get("code")
    named = isinstance(field, str) and what.startswith(field)  # ours begin with it
    return ServerError(
        what or f"the server answered {status} {answer.reason_phrase}",
        where=str(answer.request.url.copy_with(query=None)),
        field=None if named else field,
        status=status,
        code=None if code is None else str(code),
    )


def unreachable(request: httpx.Request, error: httpx.TransportError) -> Unreachable:
    where, got = f"{request.url.scheme}://{request.url.netloc.decode()}", str(error) or type(error).__name__
    return Unreachable("no answer", where=where, got=got, hint="Does a server run there, and is it reached from here?")


def place_of(path: str | Path, id: str, kind: str) -> Path:
    """Where a file goes: into a directory under its id."""
    path = Path(path)
    return path / f"{id}{SUFFIX.get(kind.partition(';')[0].strip(), '')}" if path.is_dir() else path


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is there under its name when the block has ended well. Raises InputError."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise InputError("cannot be written", field="path", where=str(path), got=error.strerror) from None
    finally:
        partial.unlink(missing_ok=True)
