"""The same directory and the same request in diffusers, for what another host makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image

import engine

SHIFT = 5.0  # the engine's, where nothing else is said; it does not read the scheduler's config


def in_diffusers(directory: Path, image: Path | None = None) -> np.ndarray:
    """The first video that `engine.run` makes of a directory, as diffusers makes it: (frames, height, width, 3) in [0, 1].

    All in BF16, the VAE as well, as the engine has it.
    """
    pipe: Any = DiffusionPipeline.from_pretrained(directory, torch_dtype=torch.bfloat16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=SHIFT)
    pipe.set_progress_bar_config(disable=True)
    frame = {} if image is None else {"image": Image.open(image).convert("RGB")}
    generator = torch.Generator().manual_seed(engine.SEEDS[0])
    return pipe(**engine.PROMPT, **engine.SAMPLING, **frame, generator=generator, output_type="np").frames[0]
