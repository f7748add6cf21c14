"""OpenAI's `POST /v1/images/generations`: images as jobs of the same queue, of a model of images or of a video's one frame."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mxdit.errors import InputError
from mxdit.serve.job import Job
from mxdit.serve.schema import LONGEST, NamedAdapters, VideoBody
from mxdit.serve.served import NoSuchModel

MOST = 10  # images of one request, as OpenAI has it


class ImageBody(BaseModel):
    """`POST /v1/images/generations`. What is left out is the model's own."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(max_length=LONGEST)
    model: str | None = None
    n: int = Field(1, ge=1, le=MOST)
    size: str | None = Field(None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="WIDTHxHEIGHT in pixels.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    user: str | None = Field(None, max_length=1000)
    negative_prompt: str | None = Field(None, max_length=LONGEST)
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of the first; each other has the next.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    guidance_scale_2: float | None = Field(None, ge=0, le=100, description="Of the second (low-noise) transformer.")
    flow_shift: float | None = Field(None, gt=0, le=1000)
    lora: NamedAdapters = None

    def each(self, model: Mapping[str, Any]) -> list[VideoBody]:
        """The request of each image, as one for a video of one frame. Raises ValidationError for a seed that leads too far."""
        given = self.model_dump(exclude={"n", "response_format", "output_format", "quality"}, exclude_none=True)
        given["model"] = model["id"]
        if self.size == "auto":
            del given["size"]
        if "num_frames" in model["takes"]:
            given["num_frames"] = 1
        seeds = [{} if self.seed is None else {"seed": self.seed + number} for number in range(self.n)]
        return [VideoBody.model_validate({**given, **seed}) for seed in seeds]


def maker(models: Sequence[Mapping[str, Any]], tasks: Sequence[str], id: str | None) -> Mapping[str, Any]:
    """The model, as `/v1/models` shows it, that a request for images means; without an id the first of these tasks' models.

    Raises NoSuchModel and InputError.
    """
    of_text = [model for task in tasks for model in models if model["task"] == task]
    if id is None and not of_text:
        raise InputError("no model here makes images", field="model", expected=f"one of {' or '.join(tasks)}")
    if id is None:
        return of_text[0]
    asked = next((model for model in models if model["id"] == id), None)
    if asked is None:
        expected = " or ".join(model["id"] for model in models)
        raise NoSuchModel("no such model", field="model", got=repr(id), expected=expected)
    if asked not in of_text:
        raise InputError("the model makes no images of text alone", field="model", got=repr(id))
    return asked


def answer(made: Sequence[tuple[Job, Path]]) -> dict[str, Any]:
    """OpenAI's answer: the images themselves, each with its job's id."""
    data = [{"b64_json": base64.b64encode(file.read_bytes()).decode(), "id": job.id} for job, file in made]
    height, width = made[0][0].fields["size"]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{width}x{height}"}
