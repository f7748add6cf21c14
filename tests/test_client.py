"""The client against answers made here: what it sends again, how it reads errors, what is left of a broken download."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mxdit.client import AsyncClient, Client, ServerError, Unreachable, Video, VideoFailed, protocol
from mxdit.errors import InputError

QUEUED = {"id": "video_1", "object": "video", "status": "queued", "progress": 0, "prompt": "a"}
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LONGEST", 0.0)
    for name in ("synchronous", "asynchronous"):
        monkeypatch.setattr(f"mxdit.client.{name}.POLL", 0.0)


class Both:
    """Either client, its methods called without await."""

    def __init__(self, kind: str, answer: Answer, **options: Any) -> None:
        self._kind, self._answer, self._options = kind, answer, options

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            transport = httpx.MockTransport(self._answer)
            if self._kind == "sync":
                with Client("http://there", transport=transport, **self._options) as client:
                    found = getattr(client, name)(*args, **more)
                    return list(found) if name == "events" else found

            async def of() -> Any:
                async with AsyncClient("http://there", transport=transport, **self._options) as client:
                    found = getattr(client, name)(*args, **more)
                    return [video async for video in found] if name == "events" else await found

            return asyncio.run(of())

        return call


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return lambda answer, **options: Both(request.param, answer, **options)


def in_turn(*answers: Any) -> tuple[list[httpx.Request], Answer]:
    """The requests that came, and what answers them one after the other; the last one for good."""
    came: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        came.append(request)
        found = answers[min(len(came), len(answers)) - 1]
        if isinstance(found, Exception):
            raise found
        return fresh(found) if isinstance(found, httpx.Response) else httpx.Response(200, json=found)

    return came, answer


def fresh(answer: httpx.Response) -> httpx.Response:
    """The same once more: each is read once."""
    content: dict[str, Any] = (
        {"stream": answer.stream} if not hasattr(answer, "_content") else {"content": answer.content}
    )
    return httpx.Response(answer.status_code, headers=answer.headers, **content)


def test_a_job_is_sent_again_as_the_same_one(both):
    busy = httpx.Response(429, headers={"Retry-After": "7"})
    came, answer = in_turn(httpx.ReadError("gone"), busy, QUEUED)
    assert both(answer).submit("a", seed=3, extra_params={"x": 1}, image=b"png").id == "video_1"
    keys = {request.headers["idempotency-key"] for request in came}
    assert len(came) == 3 and len(keys) == 1
    sent = came[2].content.decode()
    assert 'name="seed"\r\n\r\n3\r\n' in sent and '{"x": 1}' in sent and 'name="input_reference"; filename=' in sent
    assert both(answer).submit("a", idempotency_key="mine") and came[-1].headers["idempotency-key"] == "mine"


def test_it_waits_as_long_as_the_server_says(monkeypatch):
    monkeypatch.setattr(protocol, "LONGEST", 30.0)
    assert protocol.delay(1, 3, httpx.Response(429, headers={"Retry-After": "7"})) == 7
    assert protocol.delay(1, 3, httpx.Response(503, headers={"Retry-After": "700"})) == 30
    assert [protocol.delay(n, 3, None) for n in (1, 2, 3, 4)] == [1, 2, 4, None]
    assert protocol.delay(1, 3, httpx.Response(500)) is None


def test_nothing_is_tried_for_ever(both):
    came, answer = in_turn(httpx.ConnectError("refused"))
    with pytest.raises(Unreachable, match=r"http://there: no answer; got refused"):
        both(answer).get("video_1")
    assert len(came) == 4
    came, answer = in_turn(httpx.Response(503, json={"error": {"message": "closing", "code": "unavailable"}}))
    with pytest.raises(ServerError, match="closing") as refused:
        both(answer, retries=1).submit("a")
    assert len(came) == 2 and (refused.value.status, refused.value.code) == (503, "unavailable")
    came, answer = in_turn(httpx.ReadError("gone"))
    with pytest.raises(Unreachable):
        both(answer).delete("video_1")  # it may be gone by now
    assert len(came) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(400, json={"error": {"message": "size: no", "param": "size"}}), "size: no"),
        (httpx.Response(400, json={"error": {"message": "no such", "param": "seed", "code": 7}}), "seed .*no such"),
        (httpx.Response(422, json={"detail": [{"loc": ["body", "prompt"], "msg": "Field required"}]}), "Field required"),
        (httpx.Response(404, json={"detail": "Video not found"}), "Video not found"),
        (httpx.Response(502, text="<html>Bad Gateway"), "<html>Bad Gateway"),
        (httpx.Response(500, text=""), "answered 500 Internal Server Error"),
        (httpx.Response(200, text="<html>"), "no JSON"),
        (httpx.Response(200, json=[1]), "not a video"),
        (httpx.Response(200, json={"id": "x"}), "not a video"),
        (httpx.Response(200, json={**QUEUED, "progress": "soon"}), "not a video"),
    ],
)  # fmt: skip
def test_what_a_server_says_is_what_one_reads(both, answer, said):
    with pytest.raises(ServerError, match=said):
        both(lambda _: fresh(answer)).submit("a")


def test_a_failed_job_under_an_errors_status_is_a_job(both):
    """As vLLM-Omni tells it."""
    failed = {**QUEUED, "status": "failed", "error": {"code": 500, "message": "the engine died"}}
    video = both(lambda _: httpx.Response(500, json=failed)).get("video_1")
    assert (video.status, video.error_code, video.error) == ("failed", "500", "the engine died")


def test_without_an_event_stream_it_looks_again(both):
    told = [QUEUED, QUEUED, {**QUEUED, "status": "in_progress"}, {**QUEUED, "status": "completed", "progress": 100}]
    rest = iter(told)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(404, json={"detail": "Not Found"})
        return httpx.Response(200, json=next(rest))

    assert [video.status for video in both(answer).events("video_1")] == ["queued", "in_progress", "completed"]


def stream(*videos: dict[str, Any], broken: bool = False) -> httpx.Response:
    """Server-sent events, which a connection that breaks may cut off."""

    class Stream(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self):
            yield b": still here\n\n"
            for video in videos:
                yield f"event: progress\ndata: {json.dumps(video)}\n\n".encode()
            if broken:
                raise httpx.ReadError("gone")

        async def __aiter__(self):
            for part in self:
                yield part

    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream())


def test_a_stream_that_breaks_is_taken_up_again(both):
    first, second = {**QUEUED, "status": "in_progress", "step": 3}, {**QUEUED, "status": "failed"}
    ended = {**second, "error": {"code": "cancelled", "message": "the job was cancelled"}}
    came, answer = in_turn(
        stream(QUEUED, first, broken=True), httpx.ConnectError("refused"), stream(first), stream(ended)
    )
    steps = [(video.status, video.step) for video in both(answer).events("video_1")]
    assert steps == [("queued", None), ("in_progress", 3), ("in_progress", 3), ("failed", None)]
    assert len(came) == 4 and all(request.url.path == "/v1/videos/video_1/events" for request in came)
    told: list[Video] = []
    _, answer = in_turn(stream(QUEUED, ended))
    with pytest.raises(VideoFailed, match="cancelled") as failed:
        both(answer).wait("video_1", told=told.append)
    assert failed.value.video.error_code == "cancelled" and [video.status for video in told] == ["queued", "failed"]


def test_an_event_that_says_nothing(both):
    broken = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=b"event: progress\ndata: {\n\n")
    with pytest.raises(ServerError, match="an event is no JSON"):
        both(lambda _: fresh(broken)).events("video_1")


def test_a_download_is_whole_or_not_there(both, tmp_path):
    _, answer = in_turn(httpx.Response(200, headers={"content-type": "video/mp4"}, content=b"mp4"))
    assert both(answer).download("video_1", tmp_path) == tmp_path / "video_1.mp4"
    assert both(answer).download("video_1", str(tmp_path / "mine.mp4")).read_bytes() == b"mp4"
    cut = lambda _: httpx.Response(200, stream=stream(QUEUED, broken=True).stream)  # noqa: E731
    with pytest.raises(Unreachable):
        both(cut).download("video_1", tmp_path / "cut.mp4")
    refused = lambda _: httpx.Response(409, json={"error": {"message": "the video is queued"}})  # noqa: E731
    with pytest.raises(ServerError, match="the video is queued"):
        both(refused).download("video_1", tmp_path / "cut.mp4")
    with pytest.raises(InputError, match="cannot be written"):
        both(answer).download("video_1", tmp_path / "no" / "such.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.mp4", "video_1.mp4"]


def test_an_id_is_a_name_and_no_path(both):
    came, answer = in_turn(QUEUED)
    both(answer).get("../models?x=/")
    assert came[0].url.raw_path == b"/v1/videos/..%2Fmodels%3Fx%3D%2F"


def test_addresses():
    assert protocol.root_of("http://a:8091/v1/") == protocol.root_of("http://a:8091/?x#y") == "http://a:8091"
    assert protocol.root_of("https://a/videos/v1") == "https://a/videos"
    for wrong in ("a:8091", "ftp://a", "http://", "", "http://a:b", "//a"):
        with pytest.raises(InputError, match="not a server's address"):
            Client(wrong)


def test_an_image_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"image .*no.png: cannot be read"):
        Client().submit("a", image=tmp_path / "no.png")
