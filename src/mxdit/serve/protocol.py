"""HTTP/1.1 as uvicorn speaks it, with limits in time: who sends or reads too slowly is ended, and holds nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mxdit.serve.answers import error


class Timed(H11Protocol):
    """One connection.

    Args:
        limit: seconds in which a request's line and headers have to be there, and in which a client has to take what was
            written to it. A request's body is `Access`'s, which can answer for it.
    """

    def __init__(self, *args: Any, limit: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limit = limit
        self._to_read: asyncio.TimerHandle | None = None
        self._to_write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        # Nothing waits in this process for a client to take it, so that `pause_writing` is told of every client that does not.
        transport.set_write_buffer_limits(high=0)
        # An answer's head and its body are two writes; asyncio leaves sockets of `socket.create_server` as they are, and the
        # second write would wait 40 ms for the client to acknowledge the first.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._to_read = self.loop.call_later(self._limit, self._read_too_slowly)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Without a request that is being answered, what comes is a head, or the rest of a body that nobody wants.
        answered = self.cycle is None or self.cycle.response_complete
        if not (answered and self.conn.their_state in (h11.IDLE, h11.SEND_BODY)):
            self._to_read = _stopped(self._to_read)
        elif self._to_read is None:
            self._to_read = self.loop.call_later(self._limit, self._read_too_slowly)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._to_write = self.loop.call_later(self._limit, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._to_write = _stopped(self._to_write)

    def connection_lost(self, exc: Exception | None) -> None:
        self._to_read, self._to_write = _stopped(self._to_read), _stopped(self._to_write)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of what is no HTTP, in the shape of every other error."""
        self._refuse(400, error(msg))

    def _read_too_slowly(self) -> None:
        if self.conn.our_state is h11.IDLE:
            self._refuse(408, error("the request did not come in time", code="request_timeout"))
        else:
            self.transport.abort()

    def _refuse(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(data))), ("connection", "close")]
        answer = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (answer, h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
