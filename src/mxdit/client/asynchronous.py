"""`AsyncClient`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import aconnect_sse

from mxdit.client.protocol import (
    POLL,
    Video,
    VideoFailed,
    delay,
    headers_of,
    json_of,
    path_of,
    place_of,
    query,
    refusal,
    root_of,
    submission,
    told_by,
    unreachable,
    video_of,
    written,
)


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited; `events` is an asynchronous iterator."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8091",
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url, self._retries = root_of(url), retries
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers_of(api_key), timeout=timeout, transport=transport
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: str | None = None,
        *,
        image: str | Path | bytes | None = None,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Video:
        """Ask for a video, and do not wait for it.

        Args:
            image: the first frame: a file, or its bytes.
            idempotency_key: under which the same request is the same job.
            fields: of the request, such as ``size="832x480"``, ``num_frames=81``, ``seed=1``.
        """
        arguments = submission(prompt, image, idempotency_key, fields)
        return video_of(await self._send("POST", "/v1/videos", again=True, **arguments))

    async def get(self, id: str) -> Video:
        return video_of(await self._send("GET", path_of(id), again=True))

    async def list(self, limit: int = 20, *, after: str | None = None, order: str = "desc") -> Sequence[Video]:
        """So many jobs behind the one called `after`, the newest first; "asc" the oldest."""
        answer = await self._send("GET", "/v1/videos", again=True, params=query(limit, after, order))
        return [Video.of(raw) for raw in json_of(answer)["data"]]

    async def events(self, id: str) -> AsyncIterator[Video]:
        """The job as it is, and again whenever it has changed, until it has ended.

        A stream that breaks is taken up again; a server without one is asked again and again.
        """
        broken = 0
        while True:
            try:
                async with aconnect_sse(self._http, "GET", path_of(id, "/events")) as stream:
                    if stream.response.is_error:
                        await stream.response.aread()
                        break
                    async for event in stream.aiter_sse():
                        broken, video = 0, told_by(event.data)
                        yield video
                        if video.ended:
                            return
            except httpx.TransportError as error:
                wait = delay(broken := broken + 1, self._retries, None)
                if wait is None:
                    raise unreachable(error.request, error) from None
                await asyncio.sleep(wait)
                continue
            await asyncio.sleep(POLL)  # the server shuts down, or the job is gone: the next answer says so
        last = None
        while last is None or not last.ended:
            video = await self.get(id)
            if video != last:
                yield video
            last = video
            if not video.ended:
                await asyncio.sleep(POLL)

    async def wait(self, id: str, *, told: Callable[[Video], object] = lambda video: None) -> Video:
        """The job when it is completed. Raises VideoFailed.

        Args:
            told: called for every change.
        """
        async for video in self.events(id):
            told(video)
            if video.status == "completed":
                return video
            if video.ended:
                raise VideoFailed(video)
        raise AssertionError("events end with the job")

    async def download(self, id: str, path: str | Path) -> Path:
        """Write a completed job's file, whole or not at all; into a directory under its id. Gives its path."""
        request = self._http.build_request("GET", path_of(id, "/content"))
        try:
            answer = await self._http.send(request, stream=True)
            try:
                if answer.is_error:
                    await answer.aread()
                    raise refusal(answer)
                path = place_of(path, id, answer.headers.get("content-type", ""))
                with written(path) as file:
                    async for chunk in answer.aiter_bytes():
                        file.write(chunk)
            finally:
                await answer.aclose()
        except httpx.TransportError as error:
            raise unreachable(request, error) from None
        return path

    async def cancel(self, id: str) -> Video:
        """Stop a job after the step that runs."""
        return video_of(await self._send("POST", path_of(id, "/cancel")))

    async def delete(self, id: str) -> None:
        """Stop a job if it runs, and forget it and its file."""
        json_of(await self._send("DELETE", path_of(id)))

    # -- the server ----------------------------------------------------------------------------------------------------

    async def models(self) -> Sequence[dict[str, Any]]:
        """What it offers: ids, defaults, and the linears of those that are loaded."""
        return json_of(await self._send("GET", "/v1/models", again=True))["data"]

    async def adapters(self) -> Sequence[dict[str, Any]]:
        """Those that `lora` may name: ids, and the transformers that each changes."""
        return json_of(await self._send("GET", "/v1/adapters", again=True))["data"]

    async def _send(self, method: str, path: str, *, again: bool = False, **arguments: Any) -> httpx.Response:
        tries = 0
        while True:
            tries += 1
            request = self._http.build_request(method, path, **arguments)
            try:
                answer = await self._http.send(request)
            except httpx.TransportError as error:
                wait = delay(tries, self._retries if again else 0, None)
                if wait is None:
                    raise unreachable(request, error) from None
            else:
                wait = delay(tries, self._retries if again else 0, answer)
                if wait is None:
                    return answer
            await asyncio.sleep(wait)
