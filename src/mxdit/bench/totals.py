"""What Wan2.2's models take, added up from one block of theirs as it was loaded: for devices that they do not fit on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mxdit.bench.memory import ExpertMemory, load_transformer
from mxdit.bench.modes import BF16
from mxdit.bench.processes import TIDY, alone
from mxdit.bench.shapes import TEXT_ENCODER, Wan
from mxdit.bench.standins import make_checkpoint, skeleton
from mxdit.bench.variants import variants
from mxdit.config import MXConfig
from mxdit.quantize.plan import fallback_blocks

# docs/wan22.md, GiB: of one expert by its mode, and of the whole A14B pipeline with both experts and with one.
PUBLISHED = {
    "A14B": {"bf16": 26.6, "mxfp8": 13.9, "mxfp4": 7.39, "mxfp4_dualscale": 7.50, "dual + 5 BF16 blocks": 9.89},
    "TI2V-5B": {"bf16": 9.31, "mxfp8": 4.89, "mxfp4": 2.60, "mxfp4_dualscale": 2.64, "dual + 5 BF16 blocks": 3.75},
}
PUBLISHED_WHOLE = {("A14B", "bf16", "both"): 64.3, ("A14B", "mxfp4_dualscale", "both"): 26.0} | {
    ("A14B", "mxfp4_dualscale", "one"): 18.5
}


@dataclass(frozen=True)
class Line:
    """One line of a total: ``count`` times ``each`` bytes."""

    what: str
    count: int
    each: int

    @property
    def nbytes(self) -> int:
        """Their product."""
        return self.count * self.each


@dataclass(frozen=True)
class Total:
    """What a model of Wan2.2's size takes, from a block and the rest as they were loaded.

    Attributes:
        model, mode: which.
        lines: of one expert.
        others: text encoder and VAE.
        experts: how many there are.
        loading: most that loading one expert takes: the expert, plus what loading the stand-in took above its weights.
        published: GiB of one expert in docs/wan22.md; `published_both` and `published_one` of the whole, where it says.
    """

    model: str
    mode: str
    lines: tuple[Line, ...]
    others: tuple[Line, ...]
    experts: int
    loading: int
    published: float
    published_both: float | None = None
    published_one: float | None = None

    @property
    def expert(self) -> int:
        """Bytes of one expert's tensors; its files have a header more."""
        return sum(line.nbytes for line in self.lines)

    @property
    def both(self) -> int:
        """Bytes of the pipeline."""
        return self.one + (self.experts - 1) * self.expert

    @property
    def one(self) -> int:
        """Bytes of the pipeline with one expert resident."""
        return self.expert + sum(line.nbytes for line in self.others)


def totals(
    name: str, wan: Wan, methods: Sequence[str], scratch: Path, device: str, tell: Callable[[str], None]
) -> list[Total]:
    """Load one block of this shape with everything around it in every mode, from files of random weights, and add up.

    Args:
        name: of `PUBLISHED`, and ``wan`` its shapes.
        methods, scratch, device, tell: as for `measure`.
    """
    source = scratch / BF16
    tell(f"writing one block of {wan.name} ({2 * _parameters(skeleton(wan, 1)) / 2**30:.1f} GiB)")
    make_checkpoint(source, wan, 1)
    measured = {}
    for variant in variants(source, False, methods, scratch, tell):
        tell(f"{wan.name}, {variant.name}")
        measured[variant.name] = alone(load_transformer, variant, device, environment=TIDY)
    return add_up(name, wan, methods, measured)


def add_up(name: str, wan: Wan, methods: Iterable[str], measured: dict[str, ExpertMemory]) -> list[Total]:
    """The totals of what one block of that shape took by mode, in BF16 and, online and offline, in every method."""
    plain, others, found = measured[BF16], _others(wan), []
    for mode in (BF16, *(f"{method} {how}" for method in methods for how in ("online", "offline"))):
        row, method = measured[mode], mode.partition(" ")[0]
        above = row.peak - row.held if row.device == 0 else row.device - row.model
        counts = [0, fallback_blocks(MXConfig(method), wan.blocks)] if method != BF16 else [0]
        for kept in dict.fromkeys(counts):
            lines = [Line(f"blocks in {method}", wan.blocks - kept, row.block)]
            lines += [Line("leading blocks in BF16", kept, plain.block)] * bool(kept)
            lines.append(Line("embeddings, head, tables", 1, row.model - row.block))
            expert = sum(line.nbytes for line in lines)
            total = Total(
                name,
                f"{mode}, {kept} BF16 blocks" if kept else mode,
                tuple(lines),
                others,
                wan.experts,
                expert + above,
                PUBLISHED[name][f"dual + {kept} BF16 blocks" if kept else method],
                None if kept else PUBLISHED_WHOLE.get((name, method, "both")),
                None if kept else PUBLISHED_WHOLE.get((name, method, "one")),
            )
            found.append(total)
    return found


def _others(wan: Wan) -> tuple[Line, ...]:
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        encoder, vae = UMT5EncoderModel(UMT5Config(**TEXT_ENCODER)), AutoencoderKLWan(**wan.vae)
    return (
        Line("UMT5-XXL's parameters in BF16", _parameters(encoder), torch.bfloat16.itemsize),
        Line("the VAE's parameters in FP32", _parameters(vae), torch.float32.itemsize),
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
