"""Stage 2: render clips, encode them with the trained VAE, and keep the latents for stages 3 and 4.

    python tools/train_mini/cache_latents.py [--out build/mini] [--device cuda]          # for the pre-training
    python tools/train_mini/cache_latents.py --spread 0.25 --folder latents-near         # for the experts

Writes chunks of 320 clips; a run that is interrupted continues at the first missing chunk. Half of the clips also get
the I2V condition exactly as `WanImageToVideoPipeline` makes it: the first frame followed by gray, encoded.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from mxdit_models.digits import heldout_specs, render, sample_spec
from train_vae import fast_on_cpu

SEED = 2
CHUNK = 320
BATCH = 16


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Normalized posterior means, as the pipelines see them: (n, 16, frames, height / 8, width / 8) bf16."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.autocast(vae.device.type, dtype=torch.bfloat16):
        z = vae._encode(clips.to(vae.device))[:, :16]
    return ((z.float().cpu() - mean) / std).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    parser.add_argument("--clips", type=int, default=6400)
    parser.add_argument("--spread", type=float, default=1.0, help="see digits.render")
    parser.add_argument("--folder", default="latents")
    parser.add_argument("--device", type=torch.device, default="cpu")
    args = parser.parse_args()
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae" / "final", torch_dtype=torch.float32).to(args.device)
    if args.device.type == "cpu":
        fast_on_cpu(vae)
    folder = args.out / args.folder
    folder.mkdir(parents=True, exist_ok=True)
    avoid = frozenset(heldout_specs())
    started = time.perf_counter()
    for chunk in range(args.clips // CHUNK):
        path = folder / f"{chunk:04d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng((SEED, chunk, round(100 * args.spread)))
        specs = [sample_spec(rng, avoid) for _ in range(CHUNK)]
        latents, conditions = [], []
        for first in range(0, CHUNK, BATCH):
            clips = render(specs[first : first + BATCH], rng, spread=args.spread)
            latents.append(encode(vae, clips))
            if first < CHUNK // 2:
                gray = torch.zeros_like(clips)
                gray[:, :, 0] = clips[:, :, 0]
                conditions.append(encode(vae, gray))
        captions = [[s.caption, s.caption_without_speed] for s in specs]
        state = {"latents": torch.cat(latents), "conditions": torch.cat(conditions), "captions": captions}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        print(f"chunk {chunk + 1}/{args.clips // CHUNK}  elapsed {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
