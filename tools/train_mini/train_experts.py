"""Stages 3 and 4: one pre-training over all noise levels, then a high-noise and a low-noise expert from it.

    python tools/train_mini/train_experts.py pretrain [--out build/mini] [--device cuda]
    python tools/train_mini/train_experts.py high|low|high-long|low-long

Every model here has the I2V input (16 latent + 4 mask + 16 image channels). A quarter of every batch sees the image, the rest
zeros there: dropping those input channels of the patch embedding afterwards gives a T2V model exactly, so one training
serves both tasks. The text encoder trains along in the pre-training and stays as it is from then on.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerBase

from journal import Journal
from text import TEXT_DIM, build_text_encoder, build_tokenizer

SEED = 3
IMAGES = 4  # one clip in so many has its first frame given
SHIFT = 3.0  # of the noise levels, as the scheduler samples with
CONTEXT = 512  # text tokens that the pipelines pad to, with zeros
TOKENS = 16  # longest caption has 12; one length for all keeps the compiled graph's shapes constant
DROP_CAPTION = 0.1  # for classifier-free guidance
FOCUS = 6.0  # how much more an error in the digit counts than one in the background


@dataclass(frozen=True)
class Stage:
    start: str | None  # the stage whose result it starts from
    data: str  # folder of cached latents
    steps: int
    batch: int
    lr: float
    ema: float
    low: float  # range of noise levels sigma
    high: float


# The ranges overlap a little beyond the two boundaries, 0.875 (T2V) and 0.9 (I2V), that an expert may be asked at.
STAGES = {
    "pretrain": Stage(None, "latents", 10000, 16, 6e-4, 0.9995, 0.0, 1.0),
    "high": Stage("pretrain", "latents-near", 10500, 16, 5e-4, 0.999, 0.86, 1.0),
    "low": Stage("pretrain", "latents-near", 10500, 16, 5e-4, 0.999, 0.0, 0.915),
    "high-long": Stage("high", "latents-near", 3000, 32, 5e-4, 0.999, 0.86, 1.0),
    "low-long": Stage("low", "latents-near", 6000, 32, 5e-4, 0.999, 0.0, 0.915),
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

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        mask = tokens != self.tokenizer.pad_token_id
        text = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        text = F.pad(text, (0, 0, 0, 1))  # the zero token
        bias = torch.zeros(text.shape[:2], device=text.device).masked_fill(~F.pad(mask, (0, 1)), -math.inf)
        bias[:, -1] = torch.log(CONTEXT - mask.sum(1).float())
        self.cross_attention.bias = bias[:, None, None]
        return self.transformer(x, timestep, text, return_dict=False)[0]


class Latents:
    """All cached latents on one device; a batch is a function of the generator's seed alone, so a resumed run sees the same."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        chunks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
        # Clips with a condition come first in a chunk, and here in all three tensors.
        parts = [slice(None, len(c["conditions"])) for c in chunks], [slice(len(c["conditions"]), None) for c in chunks]
        pairs = [(c, part) for slices in parts for c, part in zip(chunks, slices, strict=True)]
        self.latents = torch.cat([c["latents"][part] for c, part in pairs]).to(device)
        self.conditions = torch.cat([c["conditions"] for c in chunks]).to(device)
        captions = [text for c, part in pairs for texts in c["captions"][part] for text in texts]
        tokens = tokenizer([*captions, ""], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        self.tokens = tokens[:-1].unflatten(0, (-1, 2)).to(device)  # (clips, with and without speed, TOKENS)
        self.no_caption = tokens[-1].to(device)

    def batch(self, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Model input (batch, 36, ...), noise levels (batch,), velocity target (batch, 16, ...), its weight, tokens."""

        def uniform() -> Tensor:
            return torch.rand(stage.batch, generator=generator, device=generator.device)

        pick = (uniform() * len(self.latents)).long()
        images = stage.batch // IMAGES
        pick[:images] = (uniform()[:images] * len(self.conditions)).long()
        clean = self.latents[pick].float()
        noise = torch.randn(clean.shape, generator=generator, device=generator.device)

        # One noise level from each of as many equal shares of the stage's range, in the scheduler's density.
        low, high = (edge / (SHIFT - (SHIFT - 1) * edge) for edge in (stage.low, stage.high))
        share = low + (high - low) * (uniform().argsort() + uniform()) / stage.batch
        sigma = SHIFT * share / (1 + (SHIFT - 1) * share)

        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        frame = clean.new_zeros(stage.batch, 4, *clean.shape[2:])
        condition = torch.zeros_like(clean)
        frame[:images, :, 0] = 1
        condition[:images] = self.conditions[pick[:images]].float()

        tokens = self.tokens[pick, (uniform() < 0.25).long()]
        tokens = torch.where((uniform() < DROP_CAPTION)[:, None], self.no_caption, tokens)

        # Where the latent is not the background's there is a digit: a quarter of the picture, and all that is hard. A
        # faint digit has a small error whatever its shape, so clips are weighted against their contrast.
        background = clean.flatten(3).median(-1).values[..., None, None]
        energy = (clean - background).square().mean(1, keepdim=True)
        peak = energy.amax((2, 3, 4), keepdim=True)
        weight = (1 + FOCUS * energy / peak) * (peak.median() / peak).clamp(0.5, 4.0)
        return torch.cat([noisy, frame, condition], 1), sigma, noise - clean, weight / weight.mean(), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    parser.add_argument("--device", type=torch.device, default="cpu")
    args = parser.parse_args()
    stage: Stage = STAGES[args.stage]
    device: torch.device = args.device

    torch.manual_seed(SEED)
    model = TextConditioned()
    data = Latents(args.out / stage.data, model.tokenizer, device)
    if stage.start:
        model.load_state_dict(torch.load(args.out / stage.start / "final.pt", weights_only=True))
        model.text_encoder.requires_grad_(False)
    model.to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(stage.ema))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    journal = Journal(args.out / args.stage, every=500, model=model, average=average, optimizer=optimizer)
    model.transformer.compile()
    generator = torch.Generator(device)
    for step in range(journal.resume(), stage.steps):
        lr = stage.lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, sigma, target, weight, tokens = data.batch(stage, generator.manual_seed(SEED * 1_000_000 + step))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity = model(x, sigma * 1000, tokens)
        squares = (velocity.float() - target).square()
        loss = (squares * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update_parameters(model)
        error, high = squares.detach().mean((1, 2, 3, 4)), sigma > 0.875
        journal.write(
            step,
            stage.steps,
            loss=loss.detach(),
            high=(error * high).sum() / high.sum(),  # NaN where a stage has no such noise levels
            low=(error * ~high).sum() / (~high).sum(),
            grad=norm,
        )
    torch.save(average.module.cpu().state_dict(), args.out / args.stage / "final.pt")


if __name__ == "__main__":
    main()
