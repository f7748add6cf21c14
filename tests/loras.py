"""LoRA files for tests, in every form of names that diffusers knows for Wan: seeded, with matrices that change something."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

import tiny
from mxdit.models import SPECS, spec_of

RANK = 4


def layers(
    model: nn.Module | None = None,
    paths: Iterable[str] | None = None,
    *,
    seed: int = 0,
    rank: int = RANK,
    dtype: Any = torch.float32,
) -> dict[str, dict[str, Tensor]]:
    """Path of a linear -> {"A": (rank, in), "B": (out, rank), "bias": (out,)}; by default of all linears in the blocks."""
    model = tiny.transformer() if model is None else model
    spec, generator = spec_of(model), torch.Generator().manual_seed(seed)
    linears = {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    chosen = [path for path in linears if spec.place_of(path)] if paths is None else list(paths)

    def values(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).to(dtype)

    return {
        path: {"A": values(rank, of.in_features), "B": values(of.out_features, rank), "bias": values(of.out_features)}
        for path, of in ((path, linears[path]) for path in chosen)
    }


def diffusers(
    made: dict[str, dict[str, Tensor]], *, prefix: str = "transformer.", bias: bool = False
) -> dict[str, Tensor]:
    """As `save_lora_weights` names them."""
    found = {}
    for path, of in made.items():
        found[f"{prefix}{path}.lora_A.weight"], found[f"{prefix}{path}.lora_B.weight"] = of["A"], of["B"]
        if bias:
            found[f"{prefix}{path}.lora_B.bias"] = of["bias"]
    return found


def original(
    made: dict[str, dict[str, Tensor]],
    *,
    down: str = "lora_down",
    up: str = "lora_up",
    alpha: float | None = None,
    bias: bool = False,
) -> dict[str, Tensor]:
    """As ComfyUI and lightx2v's releases name them: the model's own names behind `diffusion_model.`."""
    found, spec = {}, SPECS["WanTransformer3DModel"]
    for path, of in made.items():
        name = f"diffusion_model.{spec.to_original(path)}"
        found[f"{name}.{down}.weight"], found[f"{name}.{up}.weight"] = of["A"], of["B"]
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha, dtype=of["A"].dtype)
        if bias:
            found[f"{name}.diff_b"] = of["bias"]
    return found


def kohya(made: dict[str, dict[str, Tensor]], *, alpha: float) -> dict[str, Tensor]:
    """As musubi-tuner names them."""
    named = original(made, alpha=alpha)
    found = {}
    for name, tensor in named.items():
        path, leaf = next(
            (name[: -len(end)], end) for end in (".lora_down.weight", ".lora_up.weight", ".alpha") if name.endswith(end)
        )
        found[f"lora_unet_{path.removeprefix('diffusion_model.').replace('.', '_')}{leaf}"] = tensor
    return found


def save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, file, {"format": "pt", **(metadata or {})}
    )
    return file


def made(file: Path, **options: Any) -> Path:
    """A file in diffusers' names for all linears in the blocks of the tiny model."""
    return save(file, diffusers(layers(**options)))


def peft_file(file: Path) -> Path:
    """As a training script saves it: with peft's config, patterns in it, in the header."""
    model = tiny.transformer(seed=5)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v", "ffn.net.2"], init_lora_weights=False, use_rslora=True,
        rank_pattern={"blocks.1.attn1.to_q": 8}, alpha_pattern={"ffn.net.2": 3},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.add_adapter(config)
    told = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    options: Any = {"transformer_lora_adapter_metadata": told}
    state: Any = get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(file.parent, state, weight_name=file.name, **options)
    return file
