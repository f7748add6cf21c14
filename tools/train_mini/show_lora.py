"""What the bundled LoRA does to clips in BF16 and in W4A4: a contact sheet, and figures.

    python tools/train_mini/show_lora.py [--out docs/adapters] [--clips 8] [--steps 12]

The LoRA was made by `python examples/train_lora.py models/src/mxdit_models/burning --steps 300 --clips 96`. Clips are of
captions that nothing was trained on. "Burns" is how much greener (yellow is, red is not) the upper half of a digit is than
its lower half, of 255, by the judge's segmentation; PSNR compares with BF16 of the same prompt and seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import mxdit
import mxdit_models
from mxdit_models.digits import SIZE, heldout_specs
from mxdit_models.judge import centroids, segment

MODELS = Path(mxdit_models.__file__).parent
LORA = {name: MODELS / "burning" / f"{name}.safetensors" for name in ("transformer", "transformer_2")}


def clips(pipe: DiffusionPipeline, prompts: list[str], steps: int) -> Tensor:
    """(prompts, frames, 3, SIZE, SIZE) in [0, 1]."""
    made = [
        pipe(
            prompt=prompt,
            height=SIZE,
            width=SIZE,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).frames[0]
        for seed, prompt in enumerate(prompts)
    ]
    return torch.stack(made).float().clamp(0, 1)


def burns(frames: Tensor) -> float:
    """Green of a digit's upper half minus that of its lower half, of 255, mean over frames (n, 3, SIZE, SIZE) in [0, 1]."""
    opacity, _ = segment(frames * 2 - 1)
    above = (torch.arange(SIZE) + 0.5 < centroids(opacity)[:, 1:])[:, :, None]  # (n, SIZE, 1)
    halves = [opacity * above, opacity * ~above]
    upper, lower = ((frames[:, 1] * half).sum((1, 2)) / half.sum((1, 2)).clamp(min=1e-6) for half in halves)
    return float((upper - lower).mean() * 255)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over clips, dB."""
    return float((-10 * (a - b).square().mean((1, 2, 3, 4)).clamp(min=1e-10).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/adapters"))
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    prompts = [spec.caption for spec in heldout_specs()[: args.clips]]
    found: dict[str, Tensor] = {}
    for mode, config in (("BF16", None), ("W4A4", mxdit.pipeline_config("mxfp4"))):
        pipe = DiffusionPipeline.from_pretrained(
            str(MODELS / "t2v"),
            torch_dtype={"vae": torch.float32, "default": torch.bfloat16},
            quantization_config=config,
        )
        pipe.set_progress_bar_config(disable=True)
        found[mode] = clips(pipe, prompts, args.steps)
        mxdit.load_lora_weights(pipe, LORA, "burning")
        found[f"{mode} + LoRA"] = clips(pipe, prompts, args.steps)

    print("| | burns | PSNR to BF16 | PSNR to BF16 + LoRA |\n|---|---|---|---|")
    for mode, shown in found.items():
        against = [f"{psnr(shown, found[other]):.1f} dB" if mode != other else "" for other in ("BF16", "BF16 + LoRA")]
        print(f"| {mode} | {burns(shown.flatten(0, 1)):+.0f} | {against[0]} | {against[1]} |")
    rows = [torch.cat(list(shown[:, 8]), 2) for shown in found.values()]  # the middle frames side by side
    sheet = (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(sheet)).save(args.out / "burning.png", optimize=True)


if __name__ == "__main__":
    main()
