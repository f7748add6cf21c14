"""A request: one image or video with every choice made, and its checks against the model.

Defaults come from the model's preset, so the command line, a server and a script ask in the same words.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mxdit.config import MXConfig, check_activation
from mxdit.config.loras import LoraFile, LoraLike, assigned
from mxdit.config.steps import StepPolicy
from mxdit.errors import ConfigError, InputError
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.media import cover, fit_size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image or video: every choice made.

    Attributes:
        task: what is made: "t2v", "i2v", "t2i".
        prompt, negative_prompt: text; the negative one only counts where guidance is above 1.
        image: the first frame, for I2V.
        height, width, frames: size of the video in pixels and frames; an image is one frame.
        steps: denoising steps.
        guidance, guidance_2: guidance scale; of a cascade, of its first and its second transformer (None: the same).
        seed: of the starting noise.
        fps: frames a second of the file that is written.
        flow_shift, boundary_ratio: override the scheduler's and the pipeline's own.
        activation_steps: what the activations of quantized linears are at some steps; empty means at none.
        loras: LoRA files beside the weights, each with its transformer.
        arguments: of the pipeline's call that no other field names.

    None in a field leaves what the pipeline has.
    """

    task: str
    prompt: str
    negative_prompt: str | None = ""
    image: Image | None = None
    height: int
    width: int
    frames: int
    steps: int
    guidance: float | None = None
    guidance_2: float | None = None
    seed: int = 0
    fps: int
    flow_shift: float | None = None
    boundary_ratio: float | None = None
    activation_steps: StepPolicy | None = None
    loras: tuple[LoraFile, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def still(self) -> bool:
        """Whether an image is asked for rather than a video."""
        return self.task.endswith("2i")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable; an image is the SHA-256 of its pixels."""
        image = None if self.image is None else hashlib.sha256(self.image.tobytes()).hexdigest()
        plain = asdict(replace(self, image=None, activation_steps=None, loras=()))
        steps = None if self.activation_steps is None else self.activation_steps.to_dict()
        loras = [{"component": lora.component, "file": str(lora.file), "scale": lora.scale} for lora in self.loras]
        return {**plain, "image": image, "activation_steps": steps, "loras": loras}


def make_request(
    model: ModelDirectory,
    task: str,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    image: Image | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_2: float | None = None,
    seed: int = 0,
    fps: int | None = None,
    flow_shift: float | None = None,
    boundary_ratio: float | None = None,
    activation_steps: StepPolicy | Mapping[str, Any] | None = None,
    loras: Sequence[LoraLike] = (),
) -> Request:
    """Fill in what is not given from the model's preset, and check the whole.

    Args:
        task: one of `model.tasks`.
        size: (height, width) in pixels. By default the preset's, for I2V in the image's aspect; a pipeline that chooses
            the size by the image takes none.
        image: of any size; it is scaled to cover the frame, and what stands over is cut off.
        activation_steps: or its JSON form.
        loras: LoRA files; what is in them is not looked at here.
        the others: as in `Request`.

    Raises:
        InputError: a choice that this model cannot fulfil; `field` names it.
    """
    preset = model.preset(task)
    asked = {
        "negative_prompt": negative_prompt, "image": image, "size": size, "frames": frames, "guidance": guidance,
        "guidance_2": guidance_2, "boundary_ratio": boundary_ratio,
    }  # fmt: skip
    for name, value in asked.items():
        if value is not None and not model.takes(task, "height" if name == "size" else name):
            words = name.replace("guidance", "guidance scale").replace("_", " ")
            raise InputError(f"{preset.name} takes no {words} for {task}", field=name, got=value, hint="Leave it out.")
    if size is not None and not (isinstance(size, tuple) and len(size) == 2 and all(type(n) is int for n in size)):
        raise InputError("not a size", field="size", got=repr(size), expected="(height, width) in pixels")
    text = preset.prompt if prompt is None else prompt
    if text is None:
        raise InputError("no prompt", field="prompt", hint=f"{preset.name} has none of its own: say what to show.")
    chosen = image is not None and not model.takes(task, "height")  # by the pipeline, which then cuts the image, too
    if size is None and chosen:
        assert image is not None and model.geometry.of_image is not None
        size = model.geometry.of_image(image.height, image.width)
    elif size is None:
        size = (
            preset.size if image is None else fit_size(image, preset.size[0] * preset.size[1], model.geometry.multiple)
        )
    steps = preset.steps if steps is None else steps
    if guidance_2 is None and model.takes(task, "guidance_2"):
        guidance_2 = preset.guidance_2 if guidance is None else guidance
    request = Request(
        task=task,
        prompt=text,
        negative_prompt=preset.negative_prompt if negative_prompt is None else negative_prompt,
        image=image,
        height=size[0],
        width=size[1],
        frames=preset.frames if frames is None else frames,
        steps=steps,
        guidance=preset.guidance if guidance is None else guidance,
        guidance_2=guidance_2,
        seed=seed,
        fps=preset.fps if fps is None else fps,
        flow_shift=preset.flow_shift if flow_shift is None else flow_shift,
        boundary_ratio=boundary_ratio,
        activation_steps=policy_of(activation_steps, steps),
        loras=assigned(loras, model.components),
        arguments=preset.arguments,
    )
    _check(model, request)
    return request if image is None or chosen else replace(request, image=cover(image, *size))


def policy_of(given: StepPolicy | Mapping[str, Any] | None, steps: int, where: str | None = None) -> StepPolicy | None:
    """A policy or its JSON form as one for a request of so many steps. Raises InputError for what is none."""
    try:
        policy = None if given is None else StepPolicy.of_value(given)
        if policy is not None:
            policy.check(steps)
    except ConfigError as error:
        raise InputError(
            error.what, field=error.field, where=where, got=error.got, expected=error.expected, hint=error.hint
        ) from None
    return policy


def policies_of(
    model: ModelDirectory, configs: Mapping[str, MXConfig | None], asked: StepPolicy | None
) -> dict[str, StepPolicy]:
    """Transformer -> what its activations are at some steps: as a request asked, or else as its config states.

    Args:
        configs: transformer -> the config it is quantized with while it loads, or None.

    Raises InputError and ConfigError as `Session.policies` does.
    """
    stored = model.stored
    runs = {
        name: stored[name].run_as(config) if config and name in stored else config or stored.get(name)
        for name, config in configs.items()
    }
    quantized = {name: config for name, config in runs.items() if config is not None}
    if asked is None:
        stated = {name: config.activation_steps for name, config in quantized.items()}
        return {name: policy for name, policy in stated.items() if policy}
    if asked and not quantized:
        raise InputError(
            "activations by step, and no transformer is quantized", field="activation_steps", hint="Name a method."
        )
    for activation in asked.activations:
        for config in quantized.values():
            check_activation(config.methods, activation, where=None, field="activation_steps")
    return dict.fromkeys(quantized, asked) if asked else {}


def _check(model: ModelDirectory, request: Request) -> None:
    if not request.prompt.strip():
        raise InputError("the prompt is empty", field="prompt", hint="Say what it should show.")
    if request.image is None and model.takes(request.task, "image"):
        raise InputError("image-to-video needs a first frame", field="image", hint="Give an image.")
    geometry = model.geometry
    multiple, temporal, positions = (
        geometry.multiple,
        geometry.temporal or 1,
        geometry.positions,
    )  # an image is one frame
    for (name, value), (least, step) in zip(
        {"height": request.height, "width": request.width}.items(),
        geometry.tiles or ((multiple, multiple),) * 2,
        strict=True,
    ):
        nearest = max(0, round((value - least) / step)) * step + least
        if value != nearest:
            raise InputError(
                f"the {name} does not fit the {'tiles of the VAE' if geometry.tiles else 'patches of the model'}",
                field="size",
                got=value,
                expected=f"{least} and a multiple of {step}"
                if geometry.tiles
                else f"a positive multiple of {multiple}",
                hint=f"Nearest: {nearest}.",
            )
    scaled, size = geometry.scaled, (request.height, request.width)
    if scaled is not None and scaled(*size) != size:
        nearest = size
        while (
            all(nearest) and (again := scaled(*nearest)) != nearest
        ):  # the first has at most its area; no next one is smaller
            nearest = again
        raise InputError(
            "the pipeline makes images of one area, and would make another size of this one",
            field="size",
            got=f"{size[1]}x{size[0]}",
            expected="a size that it leaves as it is",
            hint=f"Nearest: {nearest[1]}x{nearest[0]}." if all(nearest) else "Ask for sides that are less unequal.",
        )
    nearest = geometry.nearest_frames(request.frames)
    if request.frames != nearest:
        raise InputError(
            "the number of frames does not fit the video VAE",
            field="frames",
            got=request.frames,
            expected=f"{geometry.first} more than a multiple of {temporal}",
            hint=f"Nearest: {nearest}.",
        )
    latent_frames = (request.frames - 1) // temporal + 1
    if positions is not None and max(latent_frames, request.height // multiple, request.width // multiple) > positions:
        raise InputError(
            "the video is larger than the model's position table",
            field="frames" if latent_frames > positions else "size",
            got=f"{request.width}x{request.height}, {request.frames} frames",
            expected=f"at most {positions * multiple} pixels a side and {(positions - 1) * temporal + 1} frames",
        )
    if request.steps < 1:
        raise InputError("there must be at least one step", field="steps", got=request.steps)
    if request.boundary_ratio is not None and not 0 < request.boundary_ratio < 1:
        raise InputError(
            "the boundary is a share of the schedule",
            field="boundary_ratio",
            got=request.boundary_ratio,
            expected="0 to 1",
        )
    if request.flow_shift is not None and not 0 < request.flow_shift < math.inf:
        raise InputError("the flow shift must be positive", field="flow_shift", got=request.flow_shift)
    for name, value in (("guidance", request.guidance), ("guidance_2", request.guidance_2)):
        if value is not None and not math.isfinite(value):
            raise InputError("the guidance must be a finite number", field=name, got=value)
    if not 1 <= request.fps <= 1000:
        raise InputError("no such frame rate", field="fps", got=request.fps, expected="1 to 1000 frames a second")
    if not 0 <= request.seed < 2**63:
        raise InputError("the seed is out of range", field="seed", got=request.seed, expected="0 to 2**63 - 1")
