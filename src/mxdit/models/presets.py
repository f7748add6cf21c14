"""How each published model is meant to be run: `Preset`, as data.

Source of the figures: the generation configs of the Wan2.2 release (docs/wan22.md). The guidance pair there is (low, high);
here, as in diffusers, `guidance` belongs to the high-noise expert and `guidance_2` to the low-noise one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Defaults of one model and task.

    name       what to call it.
    task       "t2v" or "i2v".
    shape      (num_layers, inner dimension, experts): how the model is recognized; Wan2.1-14B is a Wan2.2 of one expert.
               None is any model.
    size       (height, width) in pixels; for I2V only their product counts, the image gives the aspect.
    frames     1 mod 4.
    fps        frames per second of the written video.
    steps      denoising steps.
    guidance, guidance_2   classifier-free guidance of the high-noise and the low-noise expert.
    flow_shift of the noise schedule; None keeps the scheduler's own.
    prompt, negative_prompt  used when none is given; None means that a prompt must be given.
    """

    name: str
    task: str
    shape: tuple[int, int, int] | None
    size: tuple[int, int]
    frames: int
    fps: int
    steps: int
    guidance: float
    guidance_2: float | None
    flow_shift: float | None
    prompt: str | None = None
    negative_prompt: str = ""


PRESETS = (
    Preset("Wan2.2-T2V-A14B", "t2v", (40, 5120, 2), (480, 832), 81, 16, 40, 4.0, 3.0, 12.0),
    Preset("Wan2.2-I2V-A14B", "i2v", (40, 5120, 2), (480, 832), 81, 16, 40, 3.5, 3.5, 5.0),
    Preset("Wan2.2-TI2V-5B", "t2v", (30, 3072, 1), (704, 1280), 121, 24, 50, 5.0, None, 5.0),
    Preset("Wan2.2-TI2V-5B", "i2v", (30, 3072, 1), (704, 1280), 121, 24, 50, 5.0, None, 5.0),
    Preset(
        "mini-T2V",
        "t2v",
        (4, 256, 2),
        (64, 64),
        17,
        8,
        20,
        3.0,
        3.0,
        3.0,
        "a red seven moving left on a blue background",
    ),
    Preset(
        "mini-I2V",
        "i2v",
        (4, 256, 2),
        (64, 64),
        17,
        8,
        20,
        3.0,
        3.0,
        3.0,
        "a yellow five moving right on a green background",
    ),
    # Any other model of the family: the A14B's figures, with the scheduler as its directory has it.
    Preset("Wan", "t2v", None, (480, 832), 81, 16, 40, 4.0, 3.0, None),
    Preset("Wan", "i2v", None, (480, 832), 81, 16, 40, 3.5, 3.5, None),
)


def preset_for(task: str, num_layers: int, inner_dim: int, experts: int) -> Preset:
    """The preset of a model, or its task's general one."""
    exact = [p for p in PRESETS if p.task == task and p.shape == (num_layers, inner_dim, experts)]
    return exact[0] if exact else next(p for p in PRESETS if p.task == task and p.shape is None)
