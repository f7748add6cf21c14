"""An engine that stands in for vLLM-Omni: its `/v1/videos` as 0.30.0 answers it, without a model, failing where it is told to.

Sources: vllm_omni/entrypoints/openai/api_server.py, protocol/videos.py and video/generation/helpers.py of 0.30.0. Jobs are in
memory, there are no events and no steps, a failed job comes under an error's status, and the only way to stop one is DELETE.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
import uuid
from typing import Annotated, Any

import av
import numpy as np
from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import StringConstraints

from serving import Listener, free_port

FRAMES = 5


def mp4(shade: int) -> bytes:
    """Five frames of one grey."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), shade, np.uint8))))
        container.mux(stream.encode())
    return file.getvalue()


class FakeEngine:
    """One engine, on a port of its own, which it keeps when it is started again.

    Args:
        takes: seconds that a job takes.
        faults: chance of each of "busy", "refuses", "drops the answer", "job fails", "html", "cuts the file", "deletes later";
            one of a tenth happens in ten occasions at the latest, so that a test may count on it.

    Attributes:
        forms: what was accepted, in order, over all its lives.
        made: prompts of jobs that it completed.
        deleted: ids that were deleted, and what they were.
        faulted: how often each fault happened.
    """

    def __init__(self, *, takes: float = 0.1, faults: dict[str, float] | None = None, seed: int = 0) -> None:
        self.takes, self.faults, self._random = takes, faults or {}, random.Random(seed)
        self.forms: list[dict[str, Any]] = []
        self.made: list[str] = []
        self.deleted: list[tuple[str, str]] = []
        self.faulted: dict[str, int] = {}
        self._spared: dict[str, int] = {}  # occasions since a fault happened
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self._listener: Listener | None = None

    def start(self) -> FakeEngine:
        """A new life, which remembers nothing."""
        self._jobs: dict[str, dict[str, Any]] = {}
        self._listener = Listener(self._app(), self._port)
        return self

    def kill(self) -> None:
        """As a killed process: open connections break, jobs are gone."""
        if self._listener is not None:
            self._listener.kill()
        self._listener = None

    def running(self) -> list[str]:
        """Prompts of what it has not ended."""
        return [job["prompt"] for job in self._jobs.values() if job["status"] == "in_progress"]

    def _fault(self, name: str) -> bool:
        chance, spared = self.faults.get(name, 0), self._spared.get(name, 0) + 1
        if self._random.random() >= chance and spared * chance < 1:
            self._spared[name] = spared
            return False
        self._spared[name] = 0
        self.faulted[name] = self.faulted.get(name, 0) + 1
        return True

    def _app(self) -> FastAPI:
        app, jobs, gpu = FastAPI(), self._jobs, asyncio.Lock()

        async def run(job: dict[str, Any]) -> None:
            async with gpu:
                if job["id"] not in jobs:
                    return
                job["status"] = "in_progress"
                until = time.monotonic() + self.takes
                while time.monotonic() < until:
                    await asyncio.sleep(0.01)
                    if job["id"] not in jobs:
                        return
            if self._fault("job fails"):
                job.update(
                    status="failed", error={"code": "EngineGenerateError", "message": "out of memory"}, _status=500
                )
            elif job["_form"].get("negative_prompt") == "impossible":
                job.update(
                    status="failed", error={"code": "HTTPException", "message": "400: no such size"}, _status=400
                )
            else:
                self.made.append(job["prompt"])
                job.update(status="completed", progress=100, file_name=f"{job['id']}.mp4", inference_time_s=self.takes)

        def shown(job: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in job.items() if not name.startswith("_")}

        def known(id: str) -> dict[str, Any]:
            if id not in jobs:
                raise HTTPException(404, "Video not found")
            return jobs[id]

        @app.middleware("http")
        async def html(request: Request, call_next: Any) -> Response:
            if request.method == "GET" and self._fault("html"):
                return HTMLResponse("<html>Bad Gateway", 502)
            return await call_next(request)

        @app.post("/v1/videos")
        async def create(
            request: Request,
            prompt: Annotated[str, Form()],
            seconds: Annotated[str | None, StringConstraints(pattern=r"^[1-9]\d*$"), Form()] = None,
            size: Annotated[str | None, StringConstraints(pattern=r"^\d+x\d+$"), Form()] = None,
            num_frames: Annotated[int | None, Form()] = None,
            num_inference_steps: Annotated[int | None, Form()] = None,
            seed: Annotated[int | None, Form()] = None,
            model: Annotated[str | None, Form()] = None,
            input_reference: UploadFile | None = None,
        ) -> Any:
            if model not in (None, "wan"):
                raise HTTPException(404, f"The model `{model}` does not exist.")
            if self._fault("busy"):
                return JSONResponse({"detail": "engine is starting"}, 503)
            if self._fault("refuses"):
                return JSONResponse({"error": {"message": "CUDA error", "code": 500}}, 500)
            form = dict(await request.form())
            if input_reference is not None:
                form["input_reference"] = await input_reference.read()
            job = {
                "id": f"video_gen_{uuid.uuid4().hex}",
                "object": "video",
                "model": "wan",
                "prompt": prompt,
                "status": "queued",
                "progress": 0,
                "seconds": seconds or "4",
                "size": size,
                "error": None,
                "created_at": int(time.time()),
                "media_type": "video/mp4",
                "file_name": None,
                "inference_time_s": None,
                "_form": form,
            }
            self.forms.append(form)
            jobs[job["id"]] = job
            job["_task"] = asyncio.create_task(run(job))
            if self._fault("drops the answer"):
                return Response(b"{", headers={"content-length": "1000"})  # and the connection ends
            return shown(job)

        @app.get("/v1/videos/{id}")
        async def retrieve(id: str) -> Any:
            job = known(id)
            if job["status"] == "failed":
                told = shown(job)
                told["error"] = {**told["error"], "code": job["_status"]}
                return JSONResponse(told, job["_status"])
            return shown(job)

        @app.get("/v1/videos/{id}/content")
        async def content(id: str) -> Response:
            job = known(id)
            if job["status"] == "failed":
                raise HTTPException(422, "Video generation failed. Check job status for error details.")
            if job["file_name"] is None:
                raise HTTPException(404, "Generation is still in-progress")
            data = mp4(int(job["_form"].get("seed", 0)) % 256)
            if self._fault("cuts the file"):
                return Response(
                    data[: len(data) // 2], media_type="video/mp4", headers={"content-length": str(len(data))}
                )
            return Response(data, media_type="video/mp4")

        @app.delete("/v1/videos/{id}")
        async def delete(id: str) -> Any:
            job = known(id)
            if self._fault("deletes later"):
                raise HTTPException(409, "Cancellation in progress. Please try again later.")
            self.deleted.append((job["prompt"], job["status"]))
            del jobs[id]
            return {"id": id, "deleted": True, "object": "video.deleted"}

        @app.get("/v1/models")
        async def models() -> Any:
            return {"object": "list", "data": [{"id": "wan", "object": "model", "created": 1, "owned_by": "vllm-omni"}]}

        return app
