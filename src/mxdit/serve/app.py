"""The server's routes: OpenAI's and vLLM-Omni's videos over `Jobs`, and the page."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mxdit.errors import InputError
from mxdit.serve import images
from mxdit.serve.answers import NEVER_AGAIN, answer_errors, unmade
from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.docs import mount_docs
from mxdit.serve.engine import Engines
from mxdit.serve.files import Files
from mxdit.serve.images import ImageBody
from mxdit.serve.job import COMPLETED, FAILED, Job
from mxdit.serve.jobs import Full, Jobs
from mxdit.serve.metrics import Figures
from mxdit.serve.openapi import document
from mxdit.serve.schema import VideoBody, data_of, shown
from mxdit.serve.served import Catalog
from mxdit.version import __version__

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
LOOK = 1.0  # seconds between two looks at a job that one waits for, whatever is told meanwhile
BEAT = 15.0  # seconds after which a stream without news says that it lives


def make_app(offer: Catalog | Engines, jobs: Jobs, dispatcher: Dispatcher) -> FastAPI:
    """The server as an ASGI application; its lifetime is the dispatcher's.

    Args:
        offer: the models, and what turns a request into a job.
    """
    files, news = dispatcher.files, _News()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        dispatcher.told = partial(asyncio.get_running_loop().call_soon_threadsafe, news.tell)
        dispatcher.start()
        yield
        app.state.closing = True
        await run_in_threadpool(dispatcher.stop)
        jobs.close()

    # A path that is wrong by a slash is wrong: where a redirect leads is what the client's Host says.
    options: Any = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="mxdit", version=__version__, lifespan=lifespan, **options)
    app.openapi = partial(document, app)
    app.state.closing = False
    answer_errors(app)

    def known(id: str) -> Job:
        job = jobs.get(id)
        if job is None:
            raise HTTPException(404, "no such video")
        return job

    def seen(job: Job) -> dict[str, Any]:
        return shown(job, jobs.positions([job]).get(job.id))

    async def submitted(request: Request) -> Job:
        """The job of a request's body, accepted."""
        body, data = await _body(request)
        key = request.headers.get("idempotency-key")
        return await run_in_threadpool(_accept, offer, jobs, files, body, data, key)

    async def ended(request: Request, made: list[Job]) -> list[Job]:
        """They, when all are completed or one has failed. Raises HTTPException, and ClientDisconnect where the client went."""
        while True:
            heard, made = news.now(), [known(job.id) for job in made]
            if all(job.ended for job in made) or any(job.status == FAILED for job in made):
                return made
            if await request.is_disconnected():
                _cancel_all(jobs, made)
                raise ClientDisconnect
            if app.state.closing:
                # Under a key it is the same job that is asked for again, and without one another.
                again = {} if "idempotency-key" in request.headers else NEVER_AGAIN
                raise HTTPException(503, "the server shuts down; the job goes on with the next one", again)
            await news.after(heard)

    @app.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        return seen(await submitted(request))

    @app.post("/v1/videos/sync")
    async def create_and_wait(request: Request) -> Response:
        (job,) = await ended(request, [await submitted(request)])
        if job.status != COMPLETED:
            return unmade(job)
        headers = {"X-Request-Id": job.id, "X-Model": job.model, "X-Inference-Time-S": f"{job.seconds:.3f}"}
        return FileResponse(files.made(job), media_type=job.media_type, headers=headers)

    @app.post("/v1/images/generations")
    async def create_images(request: Request) -> Response:
        body = ImageBody.model_validate(await _json(request))
        model = images.maker(offer.models(), offer.image_tasks, body.model)
        key, made = request.headers.get("idempotency-key"), []
        try:
            for number, each in enumerate(body.each(model)):
                own = None if key is None else f"image {number} of {key}"
                made.append(await run_in_threadpool(_accept, offer, jobs, files, each, None, own, still=True))
        except Full:
            _cancel_all(jobs, made)
            raise
        made = await ended(request, made)
        failed = next((job for job in made if job.status == FAILED), None)
        if failed is not None:
            _cancel_all(jobs, made)
            return unmade(failed)
        answer = await run_in_threadpool(images.answer, [(job, files.made(job)) for job in made])
        return JSONResponse(answer, headers={"X-Model": model["id"]})

    @app.get("/v1/videos")
    def list_videos(after: str | None = None, limit: int = 20, order: str = "desc") -> dict[str, Any]:
        if not 1 <= limit <= 100:
            raise InputError("not a number of videos", field="limit", got=limit, expected="1 to 100")
        if order not in ("asc", "desc"):
            raise InputError("not an order", field="order", got=repr(order), expected="asc or desc")
        try:
            found, more = jobs.page(limit, after, newest_first=order == "desc")
        except KeyError:
            raise InputError("no such video", field="after", got=repr(after)) from None
        positions = jobs.positions(found)
        data = [shown(job, positions.get(job.id)) for job in found]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, **ends, "has_more": more}

    @app.get("/v1/videos/{id}")
    def retrieve(id: str) -> dict[str, Any]:
        return seen(known(id))

    @app.get("/v1/videos/{id}/content")
    def content(id: str) -> Response:
        job = known(id)
        if job.status != COMPLETED:
            raise HTTPException(409, f"the video is {job.status}")
        made = files.made(job)
        if not made.is_file():
            raise HTTPException(404, "the video's file is gone")
        return FileResponse(made, media_type=job.media_type, filename=made.name)

    @app.get("/v1/videos/{id}/input")
    def given(id: str) -> Response:
        job = known(id)
        if not job.image or not files.given(job.id).is_file():
            raise HTTPException(404, "the video has no first frame")
        # Its bytes are a user's: never a page, whatever they are.
        return FileResponse(files.given(job.id), media_type="application/octet-stream", filename="first-frame")

    @app.post("/v1/videos/{id}/cancel")
    def cancel(id: str) -> dict[str, Any]:
        job = known(id)
        if job.ended:
            raise HTTPException(409, f"the video is {job.status}")
        jobs.cancel(id)
        job = known(id)
        if job.ended:
            files.given(id).unlink(missing_ok=True)
        return seen(job)

    @app.delete("/v1/videos/{id}")
    def delete(id: str) -> dict[str, Any]:
        job = known(id)
        jobs.cancel(id, forget=True)
        if jobs.remove(id):
            files.remove(job)
        return {"id": id, "object": "video.deleted", "deleted": True}

    @app.get("/v1/videos/{id}/events")
    async def events(id: str) -> StreamingResponse:
        known(id)

        async def stream() -> AsyncIterator[str]:
            last, spoke = "", time.monotonic()
            while not app.state.closing:
                heard = news.now()
                job = jobs.get(id)
                if job is None:
                    return
                told = json.dumps(seen(job))
                if told != last or job.ended:
                    yield f"event: {'done' if job.ended else 'progress'}\ndata: {told}\n\n"
                    last, spoke = told, time.monotonic()
                if job.ended:
                    return
                await news.after(heard)
                if time.monotonic() - spoke > BEAT:
                    yield ": still here\n\n"
                    spoke = time.monotonic()

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": offer.models()}

    @app.get("/v1/adapters")
    def adapters() -> dict[str, Any]:
        return {"object": "list", "data": offer.adapters()}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        if app.state.closing or not dispatcher.ready.is_set():
            raise HTTPException(503, "the server shuts down" if app.state.closing else "no model is loaded yet")
        return {"status": "ready"}

    registry = CollectorRegistry()
    registry.register(Figures(jobs, dispatcher, offer))
    ProcessCollector(registry=registry)  # memory, descriptors and CPU time of this process

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html")

    mount_docs(app)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


async def _body(request: Request) -> tuple[VideoBody, bytes | None]:
    """The fields of a JSON or multipart body, and its first frame. Raises InputError, HTTPException and ValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    data = None
    if kind == "application/json":
        fields = await _json(request)
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields = {}
        async with request.form(max_files=1, max_fields=64, max_part_size=1 << 20) as form:
            for name, value in form.multi_items():
                if name in fields or (name == "input_reference" and data is not None):
                    raise InputError("the field is there twice", field=name[:100])
                if isinstance(value, str):
                    fields[name] = value
                elif name == "input_reference":
                    data = await value.read()
                else:
                    raise InputError("no such file", field=name[:100], expected="input_reference")
    else:
        raise HTTPException(415, "the body is neither application/json nor multipart/form-data")
    body = VideoBody.model_validate({name: value for name, value in fields.items() if value != ""})
    if body.image_reference is not None:
        if data is not None:
            raise InputError("two first frames", field="image_reference", expected="this or input_reference")
        data = data_of(body.image_reference.image_url)
    return body, data


async def _json(request: Request) -> dict[str, Any]:
    """The fields of a JSON body. Raises HTTPException."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body is not application/json")
    try:
        fields = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is no JSON") from None
    if not isinstance(fields, dict):
        raise HTTPException(400, "the body is no JSON object")
    return fields


def _cancel_all(jobs: Jobs, some: list[Job]) -> None:
    for job in some:
        jobs.cancel(job.id)


def _accept(
    offer: Catalog | Engines,
    jobs: Jobs,
    files: Files,
    body: VideoBody,
    data: bytes | None,
    key: str | None,
    *,
    still: bool = False,
) -> Job:
    """A job of a checked body and its first frame, or the one that was accepted under this key; `still` makes a PNG of it."""
    order = offer.order(body, data)
    # Of the bytes that were sent, so that a key with another request is found.
    digest = hashlib.sha256(body.model_dump_json().encode() + (data or b"")).hexdigest()
    id = f"video_{uuid.uuid4().hex}"
    return jobs.add(
        id,
        order.model,
        order.fields,
        steps=order.steps,
        media_type="image/png" if still else order.media_type,
        image=data is not None,
        key=key,
        digest=digest,
        before=lambda: files.give(id, data) if data is not None else None,
    )


class _News:
    """Wakes those who wait for a job to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """In the loop's own thread."""
        self._event.set()
        self._event = asyncio.Event()  # those who wait from now on wait for the next

    def now(self) -> asyncio.Event:
        """To be asked for before the jobs are looked at, for `after`."""
        return self._event

    @staticmethod
    async def after(heard: asyncio.Event) -> None:
        """Until something was told since `heard`, or `LOOK` is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(heard.wait(), LOOK)
