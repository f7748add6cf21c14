"""Every error in OpenAI's shape, with the field by the protocol's name."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mxdit.errors import ConfigError, InputError, MXDiTError
from mxdit.serve.engine import NoEngine
from mxdit.serve.job import CANCELLED, INVALID_IMAGE, Job
from mxdit.serve.jobs import Full, KeyReused
from mxdit.serve.schema import FIELDS
from mxdit.serve.served import NoSuchModel

log = logging.getLogger(__name__)

RETRY = "10"  # seconds after which to try a full queue again
# OpenAI's clients send a request again after 408, 409, 429 and 5xx, unless this says that they shall not.
NEVER_AGAIN = {"X-Should-Retry": "false"}


def error(
    message: str, *, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def unmade(job: Job) -> Response:
    """What one who waited for a job gets that failed: 409 where it was cancelled, 400 for what they sent, or else 500."""
    status = {CANCELLED: 409, INVALID_IMAGE: 400}.get(job.error_code or "", 500)
    kind = "invalid_request_error" if status < 500 else "server_error"
    param = "input_reference" if job.error_code == INVALID_IMAGE else None
    body = error(str(job.error), type=kind, param=param, code=job.error_code)
    return JSONResponse(body, status, {"X-Request-Id": job.id, **NEVER_AGAIN})


def answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, with the field by the protocol's name."""

    @app.exception_handler(InputError)
    @app.exception_handler(ConfigError)
    def of_input(_: Request, wrong: MXDiTError) -> Response:
        param = FIELDS.get(wrong.field, wrong.field) if wrong.field else None
        message = wrong.line(lambda field: FIELDS.get(field, field))
        return JSONResponse(
            error(message, param=param, code="invalid_value"), 404 if isinstance(wrong, NoSuchModel) else 400
        )

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    def of_schema(_: Request, wrong: Any) -> Response:
        first = wrong.errors()[0]
        places = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        name = ".".join(places)[:100]
        return JSONResponse(error(f"{name}: {first['msg']}", param=name or None, code="invalid_value"), 400)

    @app.exception_handler(HTTPException)
    def of_http(_: Request, wrong: HTTPException) -> Response:
        kind = "invalid_request_error" if wrong.status_code < 500 else "server_error"
        codes = {404: "not_found", 409: "conflict", 503: "unavailable"}
        body = error(str(wrong.detail), type=kind, code=codes.get(wrong.status_code))
        return JSONResponse(body, wrong.status_code, dict(wrong.headers or {}))

    @app.exception_handler(Full)
    def of_queue(_: Request, __: Full) -> Response:
        body = error("the queue is full", type="rate_limit_error", code="queue_full")
        return JSONResponse(body, 429, {"Retry-After": RETRY})

    @app.exception_handler(NoEngine)
    def of_engines(_: Request, __: NoEngine) -> Response:
        body = error("no engine has answered yet", type="server_error", code="unavailable")
        return JSONResponse(body, 503, {"Retry-After": RETRY})

    @app.exception_handler(KeyReused)
    def of_key(_: Request, __: KeyReused) -> Response:
        return JSONResponse(
            error("the Idempotency-Key came with another request", param="Idempotency-Key", code="conflict"), 409
        )

    @app.exception_handler(ClientDisconnect)
    def of_nobody(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # to nobody: the client went before its request was whole

    @app.exception_handler(Exception)
    def of_us(_: Request, wrong: Exception) -> Response:
        log.error("a request failed", exc_info=wrong)
        return JSONResponse(error("the server failed", type="server_error", code="internal_error"), 500)
