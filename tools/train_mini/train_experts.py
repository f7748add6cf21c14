"""Stages 3 and 4: one pre-training over all noise levels, then a high-noise and a low-noise expert from it.

    python tools/train_mini/train_experts.py pretrain [--out build/mini]
    python tools/train_mini/train_experts.py high|low

Every model here has the I2V input (16 latent + 4 mask + 16 image channels). Half of every batch sees the image, half sees
zeros there: dropping those input channels of the patch embedding afterwards gives a T2V model exactly, so one training
serves both tasks. The text encoder trains along in the pre-training and stays as it is from then on.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from journal import Journal
from text import TEXT_DIM, build_text_encoder, build_tokenizer

SEED = 3
BATCH = 16
SHIFT = 3.0  # of the noise levels, as the scheduler samples with
CONTEXT = 512  # text tokens that the pipelines pad to, with zeros
TOKENS = 16  # longest caption has 12; one length for all keeps the compiled graph's shapes constant
DROP_CAPTION = 0.1  # for classifier-free guidance


@dataclass(frozen=True)
class Stage:
    data: str  # folder of cached latents
    steps: int
    lr: float
    ema: float
    low: float  # range of noise levels sigma
    high: float
    focus: float  # how much more an error in the digit counts


# The ranges overlap a little beyond the two boundaries, 0.875 (T2V) and 0.9 (I2V), that an expert may be asked at.
STAGES = {
    "pretrain": Stage("latents", 10000, 6e-4, 0.9995, 0.0, 1.0, 0.0),
    "high": Stage("latents-near", 10500, 5e-4, 0.999, 0.86, 1.0, 6.0),
    "low": Stage("latents-near", 10500, 5e-4, 0.999, 0.0, 0.915, 6.0),
}


class PaddedCrossAttention(WanAttnProcessor):
    """Cross-attention to n tokens and one zero token that stands for the CONTEXT - n the pipelines pad with.

    Equal tokens have equal scores, so adding log(count) to one of them gives the softmax over all of them.
    """

    bias: Tensor  # (batch, 1, 1, tokens)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


class TextConditioned(nn.Module):
    """The transformer with its text encoder: what the pre-training trains and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=36,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=1536,
            num_layers=4,
        )
        processor = PaddedCrossAttention()
        for block in self.transformer.blocks:
            block.attn2.set_processor(processor)
        self.cross_attention = processor

    def forward(self, x: Tensor, timestep: Tensor, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt")
        mask = tokens.attention_mask
        text = self.text_encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
        text = F.pad(text, (0, 0, 0, 1))  # the zero token
        bias = torch.zeros(text.shape[:2]).masked_fill(F.pad(mask, (0, 1)) == 0, -math.inf)
        bias[:, -1] = torch.log(CONTEXT - mask.sum(1).float())
        self.cross_attention.bias = bias[:, None, None]
        return self.transformer(x, timestep, text, return_dict=False)[0]


class Latents:
    """All cached latents in memory; a batch is a function of the step alone, so a resumed run sees the same."""

    def __init__(self, folder: Path) -> None:
        chunks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
        # Clips with a condition come first in a chunk, and here in all three lists.
        parts = [slice(None, len(c["conditions"])) for c in chunks], [slice(len(c["conditions"]), None) for c in chunks]
        self.latents = torch.cat(
            [c["latents"][part] for slices in parts for c, part in zip(chunks, slices, strict=True)]
        )
        self.captions = [
            t for slices in parts for c, part in zip(chunks, slices, strict=True) for t in c["captions"][part]
        ]
        self.conditions = torch.cat([c["conditions"] for c in chunks])

    def batch(self, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
        """Model input (batch, 36, ...), noise levels (batch,), velocity target (batch, 16, ...), its weight, captions."""
        images = BATCH // 2
        pick = torch.randint(len(self.latents), (BATCH,), generator=generator)
        pick[:images] = torch.randint(len(self.conditions), (images,), generator=generator)
        clean = self.latents[pick].float()
        noise = torch.randn(clean.shape, generator=generator)

        # One noise level from each of BATCH equal shares of the stage's range, in the scheduler's density.
        edges = torch.tensor([stage.low, stage.high]).double()
        edges = edges / (SHIFT - (SHIFT - 1) * edges)
        share = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        share = edges[0] + (edges[1] - edges[0]) * share[torch.randperm(BATCH, generator=generator)]
        sigma = (SHIFT * share / (1 + (SHIFT - 1) * share)).float()

        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        frame = torch.zeros(BATCH, 4, *clean.shape[2:])
        condition = torch.zeros_like(clean)
        frame[:images, :, 0] = 1
        condition[:images] = self.conditions[pick[:images]].float()

        drop = torch.rand(BATCH, generator=generator) < DROP_CAPTION
        short = torch.rand(BATCH, generator=generator) < 0.25
        captions = ["" if drop[i] else self.captions[int(pick[i])][int(short[i])] for i in range(BATCH)]

        # Where the latent is not the background's there is a digit: a quarter of the picture, and all that is hard.
        background = clean.flatten(3).median(-1).values[..., None, None]
        energy = (clean - background).square().mean(1, keepdim=True)
        weight = 1 + stage.focus * energy / energy.amax((2, 3, 4), keepdim=True)
        return torch.cat([noisy, frame, condition], 1), sigma, noise - clean, weight / weight.mean(), captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    args = parser.parse_args()
    stage = STAGES[args.stage]

    torch.manual_seed(SEED)
    data = Latents(args.out / stage.data)
    model = TextConditioned()
    if args.stage != "pretrain":
        model.load_state_dict(torch.load(args.out / "pretrain" / "final.pt", weights_only=True))
        model.text_encoder.requires_grad_(False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(stage.ema))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    journal = Journal(args.out / args.stage, every=500, model=model, average=average, optimizer=optimizer)
    model.transformer.compile()
    generator = torch.Generator()
    for step in range(journal.resume(), stage.steps):
        lr = stage.lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        started = time.perf_counter()
        x, sigma, target, weight, captions = data.batch(stage, generator.manual_seed(SEED * 1_000_000 + step))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = model(x, sigma * 1000, captions)
        squares = (velocity.float() - target).square()
        loss = (squares * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update_parameters(model)
        error = squares.detach().mean((1, 2, 3, 4))
        high, low = error[sigma > 0.875], error[sigma <= 0.875]
        journal.write(
            step,
            stage.steps,
            loss=loss.item(),
            high=high.mean().item() if len(high) else math.nan,
            low=low.mean().item() if len(low) else math.nan,
            grad=norm.item(),
            seconds=time.perf_counter() - started,
        )
    torch.save(average.module.state_dict(), args.out / args.stage / "final.pt")


if __name__ == "__main__":
    main()
