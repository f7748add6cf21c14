"""Stage 1: train the mini `AutoencoderKLWan` on rendered clips, from single frames to whole clips.

    python tools/train_mini/train_vae.py [--out build/mini] [--device cuda]

Seeded and resumable: a run that is interrupted continues from its last checkpoint. The posterior's variance is held
fixed (SIGMA), so the KL term is a plain L2 pull on the mean; single frames come first, without noise, because the
decoder learns slowly under it. Pixels are scored on the *unclamped* decoder: `decode` clamps to [-1, 1], where the
gradient dies.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from journal import Journal
from mxdit_models.digits import FRAMES, render, sample_spec

SEED = 1
SIGMA = 0.1  # posterior standard deviation, fixed
BETA = 1e-4  # weight of the KL term


@dataclass(frozen=True)
class Phase:
    steps: int
    batch: int
    frames: int
    lr: float
    noise: float  # standard deviation of what is added to the latents, or the most of it where it varies
    encoder: bool = True  # whether the encoder trains too


# The last two phases unroll the decoder over whole clips: trained on 9 frames it drifts from the tenth on (30 dB down to 11).
# The encoder is left as it is there, so latents cached before them stay valid. The last one adds noise of 0 to `noise`, for
# the latents that an expert makes are never quite right, and weights clips against their contrast.
PHASES = (
    Phase(3500, 8, 1, 3e-4, 0.0),
    Phase(2200, 4, 5, 3e-4, SIGMA),
    Phase(500, 3, 9, 1.5e-4, SIGMA),
    Phase(900, 2, 17, 3e-4, SIGMA, encoder=False),
    Phase(1500, 4, 17, 3e-4, 3 * SIGMA, encoder=False),
)


def build_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, num_res_blocks=1)
    with torch.no_grad():  # the last z_dim outputs are log-variances: constant
        vae.quant_conv.weight[16:].zero_()
        vae.quant_conv.bias[16:].fill_(2 * math.log(SIGMA))
    return vae


def fast_on_cpu(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """oneDNN runs small channel counts 2-5x faster in this layout."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def decode_unclamped(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """`AutoencoderKLWan._decode` without its final clamp."""
    vae.clear_cache()
    x = vae.post_quant_conv(z)
    chunks = []
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, 2)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of images in [-1, 1]."""
    return 10 * torch.log10(4 / F.mse_loss(a.clamp(-1, 1), b))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: int = 256) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the posterior mean over full clips."""
    rng = np.random.default_rng(SEED + 1)
    batches = (render([sample_spec(rng) for _ in range(16)], rng).to(vae.device) for _ in range(clips // 16))
    z = torch.cat([vae._encode(batch)[:, :16] for batch in batches]).transpose(0, 1).flatten(1)
    return z.mean(1).tolist(), z.std(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    parser.add_argument("--device", type=torch.device, default="cpu")
    args = parser.parse_args()
    device: torch.device = args.device

    torch.manual_seed(SEED)
    vae = build_vae().to(device)
    if device.type == "cpu":
        fast_on_cpu(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-4, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    journal = Journal(args.out / "vae", vae=vae, optimizer=optimizer)
    total = sum(p.steps for p in PHASES)
    for step in range(journal.resume(), total):
        past = step
        for phase in PHASES:
            if past < phase.steps:
                break
            past -= phase.steps
        lr = phase.lr * min(1, (past + 1) / 50) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * past / phase.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(step)
        # Cut from anywhere on the path, so that every position is seen.
        first = int(rng.integers(FRAMES - phase.frames + 1))
        specs = [sample_spec(rng) for _ in range(phase.batch)]
        clip = render(specs, rng, first=first, frames=phase.frames).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            with torch.set_grad_enabled(phase.encoder):
                mean = vae._encode(clip)[:, :16]
            noise = torch.full((phase.batch, 1, 1, 1, 1), phase.noise, device=device)
            if phase is PHASES[-1]:
                noise *= torch.rand_like(noise)
            out = decode_unclamped(vae, mean + noise * torch.randn_like(mean))
        out = out.float()
        error = ((out - clip).square() + 0.1 * (out - clip).abs()).mean((1, 2, 3, 4))
        if phase is PHASES[-1]:
            contrast = clip.std((2, 3, 4)).square().mean(1)
            weight = (contrast.median() / contrast).clamp(0.5, 4.0)
            error = error * weight / weight.mean()
        loss = error.mean() + BETA * 0.5 * mean.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if not phase.encoder:  # no gradient is not enough: AdamW would still decay these weights
            for part in (vae.encoder, vae.quant_conv):
                part.zero_grad(set_to_none=True)
        optimizer.step()
        with torch.no_grad():
            vae.quant_conv.weight[16:].zero_()
            vae.quant_conv.bias[16:].fill_(2 * math.log(SIGMA))
        journal.write(
            step,
            total,
            loss=loss.detach(),
            psnr=psnr(out.detach(), clip),
            grad=norm,
            latent_rms=mean.detach().float().square().mean().sqrt(),
            frames=phase.frames,
        )

    mean, std = measure_latents(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.to(torch.bfloat16).save_pretrained(args.out / "vae" / "final")


if __name__ == "__main__":
    main()
