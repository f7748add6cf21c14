"""Stage 5: write the trained parts as ordinary diffusers directories, one for T2V and one for I2V.

    python tools/train_mini/assemble.py [--out build/mini] [--dst models/src/mxdit_models]

Weights are BF16. The directories load in stock diffusers, without mxdit. What both pipelines have is stored once: in the I2V
directory those files are links to the T2V directory's, which a wheel holds as files.
"""

from __future__ import annotations

import argparse
import filecmp
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from mxdit_models.digits import NEAR, Spec, render
from train_experts import SHIFT, TextConditioned

BOUNDARY = {"t2v": 0.875, "i2v": 0.9}  # as Wan2.2-T2V-A14B and -I2V-A14B
SHARED = ("vae", "text_encoder", "tokenizer")  # the same objects in both pipelines


def expert(folder: Path, task: str) -> tuple[WanTransformer3DModel, TextConditioned]:
    """The expert that a stage trained; for T2V without the image channels, which it only ever saw as zeros."""
    trained = TextConditioned()
    trained.load_state_dict(torch.load(folder / "final.pt", weights_only=True))
    config, state = dict(trained.transformer.config), trained.transformer.state_dict()
    if task == "t2v":
        config["in_channels"] = 16
        state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].contiguous()
    model = WanTransformer3DModel.from_config(config)
    model.load_state_dict(state)
    return model.to(torch.bfloat16), trained


def first_frame() -> Image.Image:
    """An image to start I2V from: a scan that nothing was trained on, as the I2V preset's prompt describes it."""
    spec = Spec(5, "yellow", "right", "quickly", "green")
    frame = render([spec], np.random.default_rng(2), "test", spread=NEAR)[0, :, 0]
    return Image.fromarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def share(folder: Path, twin: Path) -> None:
    """Make `folder`'s shared files relative links to those of `twin`, which have to hold the same bytes."""
    for component in SHARED:
        for file in sorted((folder / component).iterdir()):
            original = twin / component / file.name
            if not filecmp.cmp(file, original, shallow=False):
                raise SystemExit(f"{file} is not {original}")
            file.unlink()
            file.symlink_to(Path("../..") / twin.name / component / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    parser.add_argument("--dst", type=Path, default=Path("models/src/mxdit_models"))
    args = parser.parse_args()
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae" / "final", torch_dtype=torch.bfloat16)
    for task, pipeline_class in (("t2v", WanPipeline), ("i2v", WanImageToVideoPipeline)):
        high, trained = expert(args.out / "high-long", task)
        low, _ = expert(args.out / "low-long", task)
        pipeline = pipeline_class(
            tokenizer=trained.tokenizer,
            text_encoder=trained.text_encoder.to(torch.bfloat16),
            vae=vae,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
            ),
            transformer=high,
            transformer_2=low,
            boundary_ratio=BOUNDARY[task],
        )
        pipeline.save_pretrained(args.dst / task)
        size = sum(f.stat().st_size for f in (args.dst / task).rglob("*") if f.is_file())
        print(f"{args.dst / task}: {size / 1e6:.1f} MB")
    share(args.dst / "i2v", args.dst / "t2v")
    first_frame().save(args.dst / "first_frame.png")


if __name__ == "__main__":
    main()
