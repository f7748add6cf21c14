"""Servers of `/v1/videos` as what jobs run on: vLLM-Omni's, or `mxdit serve` on other machines.

An engine keeps its jobs in memory, or is gone for a while. The row of a job says which engine has it and by what name, so that
it is found again after this server's restart, and given to an engine once more where that one has forgotten it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av

from mxdit.checkpoint.writer import sync
from mxdit.client import Client, ServerError, Unreachable, Video
from mxdit.errors import InputError
from mxdit.serve.adapters import FIELD
from mxdit.serve.dispatch import LOOK, Desk
from mxdit.serve.job import CANCELLED, Job
from mxdit.serve.schema import FIELDS, TAKES, VideoBody, stand_in
from mxdit.serve.served import NoSuchModel, Order

log = logging.getLogger(__name__)

ASK = 0.5  # seconds between two looks at a job
HEALTH = 10.0  # seconds between two looks at an engine without a job
DELETES = 20  # times that an engine is asked to drop a job
LOST = 30.0  # seconds without an answer after which others may have an engine's jobs
SLOW = 60.0  # seconds without a byte that are no answer
UNTAKEN = (429, 502, 503, 504)  # of busy servers, and of proxies without one: nobody has the job


class NoEngine(Exception):
    """None has answered yet."""


class Engines:
    """What the engines offer, together: models by the ids that they use. May be called from any thread."""

    image_tasks = ("t2i",)  # over `/v1/videos` a video of one frame stays one

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self._lock = threading.Lock()
        self._models: dict[str, dict[str, Any]] = {}
        self._up = dict.fromkeys(addresses, False)

    def answered(self, address: str, models: Sequence[Mapping[str, Any]] | None) -> None:
        """Note what an engine offers, or that it did not answer. A model that was there once stays: its jobs can wait."""
        with self._lock:
            self._up[address] = models is not None
            for model in models or ():
                self._models[model["id"]] = dict(model)

    def up(self) -> dict[str, bool]:
        """Address -> whether the engine answered the last time."""
        with self._lock:
            return dict(self._up)

    def models(self) -> list[dict[str, Any]]:
        """As the engines tell them; of one that tells no more than a name, every field is taken, and no default is known."""
        with self._lock:
            told = list(self._models.values())
        blank = {"object": "model", "created": 0, "owned_by": "engine", "mode": "none", "loaded": True}
        blank |= dict.fromkeys(("attention", "compile", "fused", "task", "experts"))  # which vLLM-Omni does not say
        return [{**blank, "name": model["id"], "takes": list(TAKES), "defaults": {}, **model} for model in told]

    def adapters(self) -> list[dict[str, Any]]:
        """None: those of an engine are its own, and it says which they are."""
        return []

    def order(self, body: VideoBody, data: bytes | None) -> Order:
        """What a request asks for; the engine knows the model, and has the last word. Raises InputError and NoEngine."""
        models = {model["id"]: model for model in self.models()}
        if not models:
            raise NoEngine
        name = next(iter(models)) if body.model is None else body.model
        if name not in models:
            raise NoSuchModel("no such model", field="model", got=repr(name), expected=" or ".join(models))
        defaults = models[name]["defaults"]
        fields = body.fields(int, 1, own_extras=False)
        if FIELD in fields and FIELD not in models[name]["takes"]:
            raise InputError(
                "the engine takes no adapters by name",
                field=FIELD,
                got=fields[FIELD][0]["name"],
                hint="`mxdit serve` as an engine does, those of its own data directory.",
            )
        fields.setdefault("prompt", defaults.get("prompt"))
        if fields["prompt"] is None:
            raise InputError("a prompt is needed", field="prompt")
        if body.seconds is not None and body.num_frames is None:
            if body.seconds != int(body.seconds):
                raise InputError("not whole", field="seconds", got=body.seconds, hint="num_frames says it exactly.")
            fields["seconds"] = int(body.seconds)
            del fields["frames"]
        fields.setdefault("seed", secrets.randbelow(1 << 31))
        if data is not None:
            stand_in(data)
        still = (models[name]["task"] or "").endswith("2i")
        return Order(name, fields, 0, "image/png" if still else "video/mp4")


class EngineRunner:
    """Gives one engine a job at a time, and follows it.

    Args:
        address: of the engine.
        engines: which it tells what this one offers.
        key: that the engine asks for, if any.
    """

    def __init__(self, address: str, engines: Engines, key: str | None = None) -> None:
        self._address, self._engines = address, engines
        # It is tried again here, where what became of the job is known.
        self._client = Client(address, api_key=key, timeout=SLOW, retries=0)
        self._lost: float | None = None  # since when there is no answer
        self.name = address

    def serve(self, desk: Desk) -> None:
        models, asked = (), -HEALTH
        while not desk.stopping.wait(LOOK):
            if time.monotonic() - asked >= HEALTH:
                models, asked = self._models(desk), time.monotonic()
            if not models:
                asked = time.monotonic() - HEALTH  # look again soon
                desk.stopping.wait(1.0)
                continue
            job = desk.take(models, self._address)
            if job is not None and not self._run(desk, job):
                models = ()
        self._client.close()

    def _models(self, desk: Desk) -> tuple[str, ...]:
        """The ids of what the engine offers; none where it does not answer."""
        try:
            told = [model for model in self._client.models() if isinstance(model.get("id"), str)]
        except (ServerError, Unreachable, KeyError, TypeError, AttributeError) as error:
            if self._lost is None:
                log.warning("%s does not answer: %s", self._address, error)
            self._engines.answered(self._address, None)
            if self._gone():
                desk.release([self._address])
            return ()
        if self._lost is not None:
            log.warning("%s answers again", self._address)
        self._lost = None
        self._engines.answered(self._address, told)
        desk.ready.set()
        return tuple(model["id"] for model in told)

    def _gone(self) -> bool:
        """Note that no answer came. Whether it is so long ago, and there are others, that those shall have the jobs."""
        now = time.monotonic()
        self._lost = self._lost or now
        return now - self._lost > LOST and len(self._engines.addresses) > 1

    # -- one job -------------------------------------------------------------------------------------------------------

    def _run(self, desk: Desk, job: Job) -> bool:
        """See a job through, or let it wait again. Whether the engine answers."""
        remote = job.remote
        if remote is None:
            try:
                remote = self._submit(desk, job)
            except Unreachable:
                desk.put_back(job, counts=False)
                return False
            except ServerError as error:
                if error.status in UNTAKEN:
                    desk.put_back(job, counts=False)
                elif error.status is not None and 400 <= error.status < 500:
                    desk.end(job, error.code or "engine_refused", error.what)
                    return True
                else:
                    desk.put_back(job, because=("engine_failed", error.what))
                return False
            desk.sent(job, remote)
        return self._follow(desk, job, remote)

    def _submit(self, desk: Desk, job: Job) -> str:
        fields = {FIELDS.get(name, name): value for name, value in job.fields.items()}
        if "size" in fields:
            fields["size"] = f"{fields['size'][1]}x{fields['size'][0]}"
        image = desk.files.given(job.id) if job.image else None
        # A server that knows such keys makes one job of an attempt that was sent twice, as when this one was killed meanwhile.
        key = f"{job.id}-{job.attempts}"
        prompt = fields.pop("prompt")
        return self._client.submit(prompt, image=image, idempotency_key=key, model=job.model, **fields).id

    def _follow(self, desk: Desk, job: Job, remote: str) -> bool:
        begun, last = time.monotonic(), None
        while True:
            if desk.cancelled(job):
                desk.end(job, CANCELLED, "the job was cancelled")
                return self._forget(desk, remote)
            if desk.stopping.is_set():
                desk.put_back(job, counts=False, keep=True)  # and the engine goes on
                return True
            try:
                video = self._client.get(remote)
                if video.status == "completed":
                    path = desk.files.unfinished(job)
                    self._client.download(remote, path)
                    if desk.cancelled(job):  # meanwhile
                        continue
                    sync(path)
                    seconds = video.inference_time_s
                    found = {} if job.media_type == "image/png" else _found_in(path)
                    desk.complete(job, time.monotonic() - begun if seconds is None else seconds, found)
                    return self._forget(desk, remote)
            except av.FFmpegError as error:
                log.error("%s: %s", job.id, error)
                desk.put_back(job, because=("engine_failed", "the engine's file is no video"))
                return False
            except (InputError, OSError) as error:
                log.error("%s: %s", job.id, error)
                desk.put_back(job, because=("internal_error", "the server could not keep the video"))
                return True
            except (Unreachable, ServerError) as error:
                if isinstance(error, ServerError) and error.status == 404:
                    desk.put_back(job, because=("engine_failed", "the engine ended before the job did"))
                    return False
                if self._lost is None:
                    log.warning("%s: %s", self._address, error)
                if self._gone():
                    desk.put_back(job, because=("engine_failed", f"no answer from its engine: {error.what}"))
                    return False
                desk.stopping.wait(ASK)
                continue
            self._lost = None
            if video.ended:
                return self._failed(desk, job, remote, video)
            told = (video.progress, None) if video.steps is None or video.step is None else (video.step, video.steps)
            if told != last:
                desk.stepped(job, *told)
                last = told
            desk.stopping.wait(ASK)

    def _failed(self, desk: Desk, job: Job, remote: str, video: Video) -> bool:
        """A number for a code is HTTP's: the request's fault below 500, the engine's from there on, which may go away."""
        code, message = video.error_code or "failed", video.error or "the engine does not say why"
        if code.isdigit() and int(code) >= 500:
            self._forget(desk, remote)
            desk.put_back(job, because=("engine_failed", message))
            return False
        desk.end(job, "failed" if code.isdigit() else code, message)
        return self._forget(desk, remote)

    def _forget(self, desk: Desk, remote: str) -> bool:
        """Let the engine stop the job if it runs, and drop it. Whether it answers; if not, what it has kept is lost with it."""
        for _ in range(DELETES):
            try:
                self._client.delete(remote)
            except ServerError as error:
                if error.status == 409:  # vLLM-Omni: it is being stopped, ask again later
                    if desk.stopping.wait(ASK):
                        break
                    continue
            except Unreachable:
                return False
            return True
        log.warning("%s does not let go of %s", self._address, remote)
        return True


def _found_in(path: Path) -> dict[str, Any]:
    """What a video is: the engine's choice where the request left it open. Raises FFmpegError for what is none."""
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        rate, frames = stream.average_rate or stream.base_rate, stream.frames
        fps = float(rate) if rate else 0.0
        found = {"size": [stream.height, stream.width], "frames": frames, "fps": int(fps) if fps.is_integer() else fps}
        return {name: value for name, value in found.items() if value}
