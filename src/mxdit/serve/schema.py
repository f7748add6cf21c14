"""What clients send and get: OpenAI's videos, with the fields that vLLM-Omni added, and ours.

The names are the protocol's; `FIELDS` says what they are called in a request of ours.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from mxdit.errors import InputError
from mxdit.generation.request import Request
from mxdit.serve.adapters import MOST, lora_of
from mxdit.serve.job import COMPLETED, Job

# Field of a request of ours -> the protocol's.
FIELDS = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2",
    "image": "input_reference",
}
# Fields that not every model takes.
TAKES = (
    *("negative_prompt", "size", "num_frames", "guidance_scale", "guidance_scale_2", "input_reference"),
    "boundary_ratio",
)
PIXELS = 64 << 20  # most pixels of a first frame
FORMATS = ("PNG", "JPEG", "WEBP")
LONGEST = 20_000  # characters of a prompt


class ImageReference(BaseModel):
    """A first frame as a data URI; no address is ever fetched."""

    model_config = ConfigDict(extra="forbid")
    image_url: str


class NamedAdapter(BaseModel):
    """One of `GET /v1/adapters`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    scale: float = Field(1.0, ge=-MOST, le=MOST)


def _named(value: Any) -> Any:
    """A form has them as a name, or as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("no JSON") from None
    return None if value is None else lora_of(value)


NamedAdapters = Annotated[
    str | NamedAdapter | list[str | NamedAdapter] | None,
    BeforeValidator(_named),
    Field(description="Adapters of the server's, by name; of a form one name, or JSON."),
]


class VideoBody(BaseModel):
    """`POST /v1/videos`. What is left out is the model's own; `GET /v1/models` says what that is."""

    model_config = ConfigDict(extra="forbid", str_max_length=1 << 26)
    model: str | None = None
    prompt: str | None = Field(None, max_length=LONGEST)
    negative_prompt: str | None = Field(None, max_length=LONGEST)
    size: str | None = Field(None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="WIDTHxHEIGHT in pixels.")
    width: int | None = Field(None, ge=1, le=99_999)
    height: int | None = Field(None, ge=1, le=99_999)
    seconds: float | None = Field(None, gt=0, le=3600, description="Taken to the nearest number of frames there is.")
    num_frames: int | None = Field(None, ge=1, le=100_000, description="Taken to the nearest number there is.")
    fps: int | None = Field(None, ge=1, le=1000)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    guidance_scale_2: float | None = Field(None, ge=0, le=100, description="Of the second (low-noise) transformer.")
    boundary_ratio: float | None = Field(None, gt=0, lt=1)
    flow_shift: float | None = Field(None, gt=0, le=1000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    image_reference: ImageReference | None = None
    lora: NamedAdapters = None
    extra_params: dict[str, Any] | None = Field(None, description="More keys of a request: activation_steps.")
    extra_body: dict[str, Any] | None = None
    user: str | None = Field(None, max_length=1000)

    @field_validator("extra_params", "extra_body", "image_reference", mode="before")
    @classmethod
    def _of_a_form(cls, value: Any) -> Any:
        """A form has them as JSON."""
        if isinstance(value, str):
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError("no JSON") from None
        return value

    def fields(self, nearest: Callable[[int], int], fps: int, *, own_extras: bool = True) -> dict[str, Any]:
        """The fields of `make_request` that are given. Raises InputError.

        Args:
            nearest: the number of frames that the model takes, given the one that is asked for.
            fps: where none is asked for.
            own_extras: whether `extra_params` are ours, or an engine's, which are handed on as they are.
        """
        size = tuple(int(n) for n in reversed(self.size.split("x"))) if self.size else None
        if (self.width is None) != (self.height is None):
            raise InputError("width and height go together", field="width" if self.height else "height")
        if self.width and self.height:
            size = (self.height, self.width)
        frames = self.num_frames
        if frames is None and self.seconds is not None:
            frames = round(self.seconds * (self.fps or fps))
        if frames is not None:
            # As vLLM-Omni does it, whose documents ask for 80 frames; the answer says how many there are.
            frames = nearest(frames)
        adapters = self.lora if isinstance(self.lora, list) else ()
        given = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "size": size,
            "frames": frames,
            "steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
            "guidance_2": self.guidance_scale_2,
            "seed": self.seed,
            "fps": self.fps,
            "flow_shift": self.flow_shift,
            "boundary_ratio": self.boundary_ratio,
            "lora": [adapter.model_dump() for adapter in adapters if isinstance(adapter, NamedAdapter)] or None,
        }
        more = {**(self.extra_body or {}), **(self.extra_params or {})}
        unknown = [key for key in more if key != "activation_steps"]
        if not own_extras:
            more = {"extra_params": more} if more else {}
        elif unknown:
            raise InputError(
                "no such parameter", field="extra_params", got=repr(unknown[0]), expected="activation_steps"
            )
        return {name: value for name, value in {**given, **more}.items() if value is not None}


def data_of(uri: str) -> bytes:
    """What a data URI of an image holds. Raises InputError."""
    head, comma, text = uri.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise InputError(
            "not an image in the request",
            field="image_reference",
            got=repr(uri[:40]),
            expected="data:image/png;base64,...",
            hint="Addresses are not fetched: send the image itself.",
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("not base64", field="image_reference", got=str(error)) from None


def stand_in(data: bytes) -> Any:
    """A black image of the size that a first frame has, by its header alone. Raises InputError for what is no such image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            exif, (width, height) = Image.Exif(), image.size
            exif.load(image.info.get("exif", b""))  # `getexif` would decode a whole PNG to look behind its pixels
            turned = exif.get(0x0112, 1) >= 5
    except (
        *(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, struct.error),
        Image.DecompressionBombError,
    ) as error:  # whatever a damaged header makes of the reader
        raise InputError(
            "not a readable image", field="image", got=type(error).__name__, expected=", ".join(FORMATS)
        ) from None
    if width * height > PIXELS:
        raise InputError("too many pixels", field="image", got=f"{width}x{height}", expected=f"at most {PIXELS}")
    return Image.new("L", (height, width) if turned else (width, height))


def shown(job: Job, position: int | None) -> dict[str, Any]:
    """A job as clients see it."""
    fields = job.fields
    done = job.status == COMPLETED
    steps = job.steps or 100
    length = fields["frames"] / fields["fps"] if {"frames", "fps"} <= fields.keys() else fields.get("seconds")
    size = f"{fields['size'][1]}x{fields['size'][0]}" if "size" in fields else None
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": 100 if done else min(99, 100 * job.step // steps),
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "prompt": fields["prompt"],
        "size": size,
        "seconds": None if length is None else f"{length:g}",
        "quality": "standard",
        "remixed_from_video_id": None,
        "error": {"code": job.error_code, "message": job.error} if job.error_code else None,
        "step": (job.steps if done else job.step) if job.steps else None,
        "steps": job.steps or None,
        "eta_seconds": job.eta,
        "queue_position": position,
        "attempts": job.attempts,
        "inference_time_s": job.seconds,
        "file_size": job.bytes,
        "media_type": job.media_type,
        "fps": fields.get("fps"),
        "num_frames": fields.get("frames"),
        "duration_s": length,
        "parameters": {
            **{FIELDS.get(name, name): value for name, value in fields.items() if name != "size"},
            "size": size,
            "has_image": job.image,
        },
    }


def stored(request: Request) -> dict[str, Any]:
    """The fields of `make_request` that make this request again, JSON-serializable, every choice made."""
    steps = request.activation_steps
    fields = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "size": [request.height, request.width],
        "frames": request.frames,
        "steps": request.steps,
        "guidance": request.guidance,
        "guidance_2": request.guidance_2,
        "seed": request.seed,
        "fps": request.fps,
        "flow_shift": request.flow_shift,
        "boundary_ratio": request.boundary_ratio,
        "activation_steps": None if steps is None else steps.to_dict(),
    }
    return {name: value for name, value in fields.items() if value is not None}


def again(fields: Mapping[str, Any], takes: Any) -> dict[str, Any]:
    """Stored fields as `make_request` takes them, without those that the model does not take, and without adapters."""
    given = {**fields, "size": tuple(fields["size"])}
    always = {"prompt", "steps", "seed", "fps", "flow_shift", "activation_steps"}
    return {k: v for k, v in given.items() if k in always or takes("height" if k == "size" else k)}


def _whole(time: float | None) -> int | None:
    return None if time is None else math.floor(time)
