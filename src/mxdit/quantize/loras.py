"""What the tensors of a LoRA must be, whether they are merged into a model's weights or put beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mxdit.errors import CheckpointError
from mxdit.layers import linears_of
from mxdit.numerics.formats import FLOATS

PREFIX = "transformer"  # of the tensors in a LoRA's file, whichever expert it goes to
DOWN, UP, BIAS = LEAVES = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
# What a peft LoraConfig may say: how strong the tensors are, which is read, or what says nothing of them once they are there. Any
# other key must be unset: it would read, replace or add to the model's own weights (DoRA, bias="all", modules_to_save), or nobody
# has checked it.
SILENT = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "init_lora_weights"),
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}
INITS = (
    True,
    False,
    None,
    "gaussian",
)  # the others (PiSSA, OLoRA, LoftQ, ...) take a part out of the model's own weights


class Shaped(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...


T = TypeVar("T", bound=Shaped)


def named(given: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    """What of a LoRA's tensors, or of its config, is for a transformer: by peft's names, without the prefix, as diffusers'
    `load_lora_adapter` makes them."""
    start = f"{prefix}." if prefix else ""
    found = {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}
    if any(isinstance(value, Tensor) for value in found.values()) and "lora_A" not in next(iter(found)):
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

        return convert_unet_state_dict_to_peft(found)
    return found


def layers_of(tensors: Mapping[str, T], where: str) -> dict[str, dict[str, T]]:
    """Path of a linear -> leaf -> tensor, of a LoRA's by peft's names, `named`.

    Every layer has a `DOWN` (rank, in) and an `UP` (out, rank), and may have a `BIAS`, in BF16, FP16 or FP32.

    Raises CheckpointError for what is no LoRA, or not whole; `where` is what it was read from.
    """
    layers: dict[str, dict[str, T]] = {}
    if not tensors:
        raise CheckpointError("there is no LoRA", where=where, expected=f"names like {PREFIX}.PATH.{DOWN}")
    for name, tensor in tensors.items():
        leaf = next((leaf for leaf in LEAVES if name.endswith(f".{leaf}")), None)
        if leaf is None:
            raise CheckpointError(
                "a DoRA, which is neither merged nor put beside packed weights"
                if "magnitude" in name or "dora" in name
                else "no tensor of a LoRA",
                where=f"{where}: {name}",
                expected=f"names that end in {', '.join(LEAVES)}",
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                "a dtype that no LoRA has", where=f"{where}: {name}", got=tensor.dtype, expected="BF16, FP16 or FP32"
            )
        layers.setdefault(name[: -len(leaf) - 1], {})[leaf] = tensor
    for path, parts in layers.items():
        missing = next((leaf for leaf in (DOWN, UP) if leaf not in parts), None)
        if missing:
            raise CheckpointError("half of a LoRA's layer is missing", where=f"{where}: {path}.{missing}")
        down, up = tuple(parts[DOWN].shape), tuple(parts[UP].shape)
        if len(down) != 2 or len(up) != 2 or not down[0] or down[0] != up[1]:
            raise CheckpointError(
                "the two matrices have no common rank",
                where=f"{where}: {path}",
                got=f"{up} and {down}",
                expected="(out, rank) and (rank, in)",
            )
    return layers


def check_layers(layers: Mapping[str, Mapping[str, Shaped]], model: nn.Module, where: str) -> None:
    """Raise CheckpointError unless each layer, as `layers_of` gives them, is of a linear of `model`, and has its shape.

    Args:
        model: a transformer, float or quantized, on any device, `meta` too; with adapters or without.
    """
    linears, others = dict(linears_of(model)), dict(model.named_modules())
    for path, parts in layers.items():
        linear = linears.get(path)
        if linear is None:
            raise CheckpointError(
                "the LoRA changes no linear"
                if path in others
                else "the LoRA changes a module that the model does not have",
                where=f"{where}: {path}",
                got=type(others[path]).__name__ if path in others else None,
                expected=f"a linear of {type(model).__name__}",
                hint="Is it one for another model?",
            )
        rank = parts[DOWN].shape[0]
        n, k = linear.out_features, linear.in_features
        for leaf, shape in zip(LEAVES, ((rank, k), (n, rank), (n,)), strict=True):
            if leaf in parts and tuple(parts[leaf].shape) != shape:
                raise CheckpointError(
                    "the LoRA does not fit the linear",
                    where=f"{where}: {path}.{leaf}",
                    got=tuple(parts[leaf].shape),
                    expected=shape,
                    hint="Is it one for another model?",
                )
        if BIAS in parts and linear.bias is None:
            raise CheckpointError("the LoRA changes a bias that the linear does not have", where=f"{where}: {path}")


def check_config(config: Mapping[str, Any], where: str, usual: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError for an adapter of another kind than a plain LoRA, told from the fields of its peft config.

    Args:
        config: as peft writes it; none at all says nothing.
        usual: what the installed peft says by default, of keys that this list may not know yet.
    """
    kind = str(getattr(kind := config.get("peft_type") or "LORA", "value", kind))
    odd = {
        key: value
        for key, value in config.items()
        if value and key not in SILENT and (key, value) != ("bias", "none") and value != (usual or {}).get(key)
    }
    if config.get("init_lora_weights") not in INITS:
        odd["init_lora_weights"] = config["init_lora_weights"]
    if kind != "LORA":
        odd = {"peft_type": kind}
    if odd:
        raise CheckpointError(
            "an adapter that is no plain LoRA, which alone leaves the model's own weights as they are",
            where=where,
            got=", ".join(f"{key}={value!r}" for key, value in odd.items()),
            hint="Use it on the model in BF16, without merging it.",
        )
