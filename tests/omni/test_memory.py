"""What loading takes on each rank: its shards, and one tensor of the checkpoint at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quantized
import tiny
from engine import Rank
from quantized import EXPERTS

METHODS = {
    "transformer": {"quant_method": "mxfp4", "mxfp4_scale_alg": 0},
    "transformer_2": {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0},
}
WIDE: dict[str, Any] = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 4}
LARGEST = WIDE["ffn_dim"] * 1024 * 2  # bytes, in BF16
MIB = 2**20


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict[str, Path]:
    """A pipeline whose experts have 67 million parameters each in their blocks: BF16, packed and numeric."""
    root = tmp_path_factory.mktemp("wide")
    pipe = tiny.pipeline("t2v")
    for seed, expert in enumerate(EXPERTS):
        setattr(pipe, expert, tiny.transformer(seed=seed, **WIDE).bfloat16())
    pipe.save_pretrained(root / "online")
    del pipe
    quantized.write(root / "online", root / "numeric", METHODS, numeric=True)
    return {"online": root / "online", "packed": root / "numeric-packed", "numeric": root / "numeric"}


@pytest.mark.parametrize("degree", (1, 2))
@pytest.mark.parametrize("layout", ("online", "packed", "numeric"))
def test_a_rank_peaks_at_what_it_holds_and_a_tensor(wide, ran, layout, degree):
    """Beside what loading takes of the engine itself, which BF16 shows: it is read into place."""
    engines_own = max(above(rank) for rank in ran(wide["online"], tensor_parallel_size=degree).ranks)
    online = {"quantization_config": METHODS} if layout == "online" else {}
    for rank in ran(wide[layout], tensor_parallel_size=degree, **online).ranks:
        held = rank.loading["held"]
        print(
            f"{layout}, {degree} ranks: {held / MIB:.1f} MiB held, {above(rank) / MIB:.1f} above, "
            f"{engines_own / MIB:.1f} in BF16, largest {LARGEST / MIB:.1f}"
        )
        assert above(rank) < engines_own + LARGEST


def above(rank: Rank) -> int:
    """Bytes that a rank had at its peak beside what it holds."""
    return rank.loading["peak"] - rank.loading["before"] - rank.loading["held"]
