"""Train a LoRA beside quantized weights, for both experts of a cascade, and make a clip with it.

    python examples/train_lora.py [OUT] [--model DIR] [--steps 400] [--clips 96]

The model is by default the small one that comes with mxdit, and what it learns is a style: digits that burn, yellow on top and
red below, whatever colour the caption says. For a model and a style of yours replace `burning` by frames that you have, and
choose `target_modules` and the rank. OUT gets one file for each expert, which `load_lora_weights` reads, and clip.gif.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import mxdit
import mxdit_models
from mxdit_models import digits

YELLOW, RED = (torch.tensor(rgb) / 127.5 - 1 for rgb in ((255, 225, 40), (215, 25, 15)))
# The noise levels sigma that each expert is asked at: above and below the pipeline's boundary_ratio, and a little beyond.
LEVELS = {"transformer": (0.86, 1.0), "transformer_2": (0.0, 0.915)}
SHIFT = 3.0  # the scheduler's flow_shift: levels are drawn as densely as it samples them


def burning(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Clips (count, 3, frames, height, width) in [-1, 1] and their captions."""
    rng = np.random.default_rng(seed)
    avoid = frozenset(digits.heldout_specs())  # to be asked for afterwards
    specs = [digits.sample_spec(rng, avoid) for _ in range(count)]
    # The same clips in white and in red differ in their green by the digit's opacity alone.
    white, red = (
        digits.render([replace(spec, color=color) for spec in specs], np.random.default_rng(seed), spread=digits.NEAR)
        for color in ("white", "red")
    )
    opacity = (white - red)[:, 1:2] * 127.5 / (digits.COLORS["white"][1] - digits.COLORS["red"][1])
    centre = (opacity.sum(-1) * torch.arange(digits.SIZE)).sum(-1) / opacity.sum((-1, -2))
    height = (torch.arange(digits.SIZE) - centre[..., None]) / digits.GLYPH + 0.5  # 0 above the digit, 1 below
    share = height.clamp(0, 1)[..., None]
    flame = YELLOW.view(3, 1, 1, 1) * (1 - share) + RED.view(3, 1, 1, 1) * share
    white_ink = torch.tensor(digits.COLORS["white"]).view(3, 1, 1, 1) / 127.5 - 1
    return white + opacity * (flame - white_ink), [spec.caption for spec in specs]


@torch.no_grad()
def encoded(pipe: DiffusionPipeline, clips: torch.Tensor) -> torch.Tensor:
    """Latents as the transformers see them: normalized means."""
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return torch.cat([(pipe.vae.encode(part).latent_dist.mode() - mean) / std for part in clips.split(8)])


def loss_of(
    model: torch.nn.Module, latents: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor
):
    """The velocity's mean squared error, where the digit is counting more than where the background is."""
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = model(noisy.to(model.dtype), sigma * 1000, text, return_dict=False)[0].float()
    background = latents.flatten(3).median(-1).values[..., None, None]
    energy = (latents - background).square().mean(1, keepdim=True)
    weight = 1 + 6 * energy / energy.amax((2, 3, 4), keepdim=True)
    return ((velocity - (noise - latents)).square() * weight).mean()


def train(
    pipe: DiffusionPipeline, name: str, latents: torch.Tensor, texts: torch.Tensor, steps: int, lr: float
) -> None:
    """Train an adapter beside one expert."""
    model = getattr(pipe, name)
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"])
    )
    cast_training_params(model, torch.float32)  # the adapter trains in FP32, beside activations in BF16
    model.enable_gradient_checkpointing()  # blocks are computed again on the way back, from what is kept of them
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    low, high = (edge / (SHIFT - (SHIFT - 1) * edge) for edge in LEVELS[name])

    def batch(size: int, generator: torch.Generator):
        share = (
            low
            + (high - low) * (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        )
        pick = torch.randint(len(latents), (size,), generator=generator)
        text = torch.where(torch.rand(size, 1, 1, generator=generator) < 0.1, texts[-1], texts[pick])
        noise = torch.randn(size, *latents.shape[1:], generator=generator)
        return latents[pick], text, SHIFT * share / (1 + (SHIFT - 1) * share), noise

    def held_out() -> float:
        with torch.no_grad():
            return float(loss_of(model, *batch(16, torch.Generator().manual_seed(1))))

    before = held_out()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, 2 * (steps - step) / steps)
        loss = loss_of(model, *batch(8, torch.Generator().manual_seed(1000 + step)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{name} step {step}: loss {float(loss):.4f}", flush=True)
    model.disable_gradient_checkpointing()
    print(f"{name}: loss {before:.4f} before, {held_out():.4f} after", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("lora"))
    parser.add_argument("--model", type=Path, default=Path(mxdit_models.__file__).parent / "t2v")
    parser.add_argument("--method", default="mxfp4")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)  # the adapters begin with random numbers

    pipe = DiffusionPipeline.from_pretrained(
        str(args.model),
        torch_dtype={"vae": torch.float32, "default": torch.bfloat16},
        quantization_config=mxdit.pipeline_config(args.method),
    )
    pipe.set_progress_bar_config(disable=True)
    clips, captions = burning(args.clips, seed=0)
    latents = encoded(pipe, clips)
    with torch.no_grad():  # the last is what classifier-free guidance compares with
        texts = torch.cat([pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in [*captions, ""]])

    for name in LEVELS:
        train(pipe, name, latents, texts, args.steps, args.lr)
        model = getattr(pipe, name)
        layers = {key: tensor.bfloat16() for key, tensor in get_peft_model_state_dict(model).items()}
        metadata = model.peft_config["default"].to_dict()  # its alpha, which the tensors do not tell
        pipe.save_lora_weights(
            args.out, layers, weight_name=f"{name}.safetensors", transformer_lora_adapter_metadata=metadata
        )
    pipe.unload_lora_weights()  # the quantized model, as it was

    mxdit.load_lora_weights(pipe, {name: args.out / f"{name}.safetensors" for name in LEVELS}, "burning")
    frames = pipe(
        prompt="a blue seven moving left slowly on a black background",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    first, *others = pipe.numpy_to_pil(frames)
    first.save(args.out / "clip.gif", save_all=True, append_images=others, duration=80, loop=0)
    print(f"{args.out}/clip.gif: {len(frames)} frames")


if __name__ == "__main__":
    main()
