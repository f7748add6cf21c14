"""What every request passes before it is answered: its key, its size and time, and the headers that its answer gets."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from mxdit.serve.answers import error

Message = MutableMapping[str, Any]
App = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

OPEN = ("/", "/docs", "/openapi.json", "/health", "/ready")  # and the page's files: nothing of a user's is in them
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


class Access:
    """ASGI middleware.

    Args:
        app: what answers.
        keys: of which one must come as `Authorization: Bearer KEY`; none lets everyone in.
        most: bytes that a request may have.
        limit: seconds in which its body has to be there.
    """

    def __init__(self, app: App, keys: Sequence[str], most: int, limit: float) -> None:
        self._app, self._most, self._limit = app, most, limit
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        async def refuse(status: int, body: Any, *more: tuple[bytes, bytes]) -> None:
            data = json.dumps(body).encode()
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *more]
            await answer({"type": "http.response.start", "status": status, "headers": head})
            await answer({"type": "http.response.body", "body": data})

        path = scope["path"]
        if not (path in OPEN or path.startswith("/page/") or self._lets_in(headers.get(b"authorization", b""))):
            wrong = error("a valid API key is needed", type="authentication_error", code="invalid_api_key")
            await refuse(401, wrong, (b"www-authenticate", b"Bearer"))
            return
        large = error(f"the request has more than {self._most} bytes", code="request_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            await refuse(400, error("content-length is no number"))
            return
        if int(length) > self._most:
            await refuse(413, large, (b"connection", b"close"))
            return
        got, whole, until = 0, False, asyncio.get_running_loop().time() + self._limit

        async def counted() -> Message:
            nonlocal got, whole
            try:
                # Behind the body comes only the client's end, for which one waits for as long as an answer takes.
                async with asyncio.timeout_at(None if whole else until):
                    message = await receive()
            except TimeoutError:
                raise Refused(408) from None
            got += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if got > self._most:
                raise Refused(413)
            return message

        try:
            await self._app(scope, counted, answer)
        except Refused as refused:
            slow = error(f"the request did not come within {self._limit:g} s", code="request_timeout")
            if not begun:
                await refuse(refused.status, slow if refused.status == 408 else large, (b"connection", b"close"))

    def _lets_in(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        # All are compared, each in constant time.
        fits = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return not self._keys or (scheme.lower() == b"bearer" and any(fits))


class Refused(Exception):
    """A body has more bytes than it may, though its length did not say so (`status` 413), or it came too slowly (408)."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status
