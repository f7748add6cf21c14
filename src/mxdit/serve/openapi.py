"""What `/openapi.json` says: each route's summary, answer and errors. docs/openapi.json is a copy, made by tools/openapi.py.

The answers are described here, and written elsewhere as plain dicts; tests/serve/test_openapi.py holds each against the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.json_schema import models_json_schema

from mxdit.serve.images import ImageBody
from mxdit.serve.schema import VideoBody


class VideoForm(VideoBody):
    """`POST /v1/videos` as a form: what is no text or number is JSON in a field."""

    input_reference: Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        default_factory=bytes, description="The first frame, a PNG, JPEG or WebP of at most 64 Mi pixels."
    )


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fault(_Answer):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field that is wrong, by the protocol's name.")
    code: str | None


class Error(_Answer):
    error: Fault


class VideoError(_Answer):
    code: str = Field(
        description="cancelled, invalid_image, out_of_memory, worker_died, engine_failed, failed, internal_error, or an engine's."
    )
    message: str


class Video(_Answer):
    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="Percent.")
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str | None = Field(description="WIDTHxHEIGHT in pixels; null where the choice is an engine's.")
    seconds: str | None
    quality: Literal["standard"]
    remixed_from_video_id: None
    error: VideoError | None
    step: int | None = Field(description="Null where an engine tells no steps.")
    steps: int | None
    eta_seconds: float | None = Field(description="Of the steps that are left, from the second one on.")
    queue_position: int | None
    attempts: int
    inference_time_s: float | None
    file_size: int | None
    media_type: Literal["video/mp4", "image/png"]
    fps: float | None
    num_frames: int | None
    duration_s: float | None
    parameters: dict[str, Any]


class VideoList(_Answer):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(_Answer):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class Image(_Answer):
    b64_json: str
    id: str = Field(description="Of its job, under /v1/videos.")


class ImageList(_Answer):
    created: int
    data: list[Image]
    output_format: Literal["png"]
    size: str


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    name: str
    mode: str
    attention: str | None = Field(description="How attention is computed; null where an engine does not say.")
    compile: bool | None = Field(description="Whether the transformers' blocks are compiled, or null.")
    fused: bool | None = Field(description="Whether norms, rotary embeddings and GELU are fused, or null.")
    task: str | None = Field(description="t2v, i2v or t2i; null where an engine does not say.")
    loaded: bool
    experts: dict[str, dict[str, int]] | None = Field(description="Transformer -> how many linears run as what.")
    takes: list[str]
    defaults: dict[str, Any]


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class Adapter(_Answer):
    id: str
    object: Literal["adapter"]
    created: int
    transformers: list[str] | None = Field(description="That it changes; null where it is for models of one.")
    bytes: int


class AdapterList(_Answer):
    object: Literal["list"]
    data: list[Adapter]


class Status(_Answer):
    status: str


class Route(NamedTuple):
    """`answer` is a model, or the media types of what is no JSON."""

    summary: str
    answer: type[BaseModel] | tuple[str, ...]
    errors: tuple[int, ...] = ()
    bodies: Mapping[str, type[BaseModel]] = MappingProxyType({})


FILE = ("video/mp4", "image/png")  # a PNG of a model that makes images
_VIDEO = {"application/json": VideoBody, "multipart/form-data": VideoForm}
ROUTES = {
    "POST /v1/videos": Route("Submit a video", Video, (400, 401, 404, 408, 409, 413, 415, 429, 503), _VIDEO),
    "POST /v1/videos/sync": Route(
        "Submit a video and wait for it", FILE, (400, 401, 404, 408, 409, 413, 415, 429, 500, 503), _VIDEO
    ),
    "POST /v1/images/generations": Route(
        "Make images",
        ImageList,
        (400, 401, 404, 408, 409, 413, 415, 429, 500, 503),
        {"application/json": ImageBody},
    ),
    "GET /v1/videos": Route("List videos, a page at a time", VideoList, (400, 401)),
    "GET /v1/videos/{id}": Route("Say how a video stands", Video, (401, 404)),
    "DELETE /v1/videos/{id}": Route("Stop and forget a video", VideoDeleted, (401, 404)),
    "GET /v1/videos/{id}/content": Route("Get the file", FILE, (401, 404, 409)),
    "GET /v1/videos/{id}/input": Route("Get the first frame", ("application/octet-stream",), (401, 404)),
    "POST /v1/videos/{id}/cancel": Route("Stop a video", Video, (401, 404, 409)),
    "GET /v1/videos/{id}/events": Route("Follow a video, step by step", ("text/event-stream",), (401, 404)),
    "GET /v1/models": Route("List the models", ModelList, (401,)),
    "GET /v1/adapters": Route("List the adapters", AdapterList, (401,)),
    "GET /health": Route("Say that the server runs", Status),
    "GET /ready": Route("Say whether a job can run", Status, (503,)),
    "GET /metrics": Route("Give figures to Prometheus", ("text/plain",), (401,)),
}
WORDS = {
    400: "A field is wrong; `param` names it.",
    401: "No valid key.",
    404: "There is none.",
    408: "The request came too slowly.",
    409: "Not in this state.",
    413: "The request is too large.",
    415: "The body is of no kind that is read.",
    429: "The queue is full.",
    500: "The job failed.",
    503: "The server shuts down, or is not ready yet.",
}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the server's routes. Raises KeyError for one that is not in `ROUTES`."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            route = ROUTES[f"{method.upper()} {path}"]
            operation["summary"] = route.summary
            operation["tags"] = [path.split("/")[2] if path.startswith("/v1/") else "server"]
            operation.pop("description", None)
            if isinstance(route.answer, tuple):
                content = {kind: {"schema": {}} for kind in route.answer}
            else:
                content = {"application/json": {"schema": _named(route.answer)}}
            operation["responses"] = {"200": {"description": "So it is.", "content": content}}
            for status in route.errors:
                content = {"application/json": {"schema": _named(Error)}}
                operation["responses"][str(status)] = {"description": WORDS[status], "content": content}
            if route.bodies:
                content = {kind: {"schema": _named(body)} for kind, body in route.bodies.items()}
                operation["requestBody"] = {"required": True, "content": content}
            if 401 in route.errors:
                operation["security"] = [{"key": []}, {}]
    models = [route.answer for route in ROUTES.values() if not isinstance(route.answer, tuple)]
    bodies = [body for route in ROUTES.values() for body in route.bodies.values()]
    unique = dict.fromkeys([*models, *bodies, Error])
    _, schemas = models_json_schema(
        [(model, "validation") for model in unique], ref_template="#/components/schemas/{model}"
    )
    form = schemas["$defs"]["VideoForm"]["properties"]
    for name, field in form.items():
        if name != "input_reference":
            # All of a form is text, and an empty one counts as left out: a page that fills in what it may be sends these.
            told = {"description": field["description"]} if "description" in field else {}
            form[name] = {"type": "string", "default": "", **told}
    key = {"type": "http", "scheme": "bearer", "description": "Where the server was given --api-key-file."}
    made["components"] = {"schemas": schemas["$defs"], "securitySchemes": {"key": key}}
    return made


def _named(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
