"""Quantize a pipeline while diffusers loads it, make a clip, save it, and load it again.

    python examples/quickstart.py [MODEL] [OUT]

MODEL is a directory in diffusers' layout, by default the small model that comes with mxdit. OUT gets clip.gif and the
quantized pipeline.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import mxdit
import mxdit_models

model = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(mxdit_models.__file__).parent / "t2v"
out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("quickstart")
out.mkdir(parents=True, exist_ok=True)


def clip(pipe: DiffusionPipeline) -> np.ndarray:
    """The same few frames each time: (frames, height, width, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a red seven moving left on a blue background",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]


# Online: each transformer is quantized tensor by tensor while the BF16 files are read. The VAE stays in FP32.
dtypes = {"vae": torch.float32, "default": torch.bfloat16}
pipe = DiffusionPipeline.from_pretrained(
    str(model), torch_dtype=dtypes, quantization_config=mxdit.pipeline_config("mxfp4")
)
print(mxdit.report_of(pipe.transformer))  # what became of every linear
online = clip(pipe)

# Offline: the packed weights are on disk, and say themselves how they are quantized.
pipe.save_pretrained(out / "quantized")
pipe = DiffusionPipeline.from_pretrained(out / "quantized", torch_dtype=dtypes)
assert np.array_equal(clip(pipe), online), "a reload gives the same pixels"

first, *others = DiffusionPipeline.numpy_to_pil(online)
first.save(out / "clip.gif", save_all=True, append_images=others, duration=80, loop=0)
print(f"{out}/clip.gif: {len(online)} frames")
