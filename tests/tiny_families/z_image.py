"""Z-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def z_image(**overrides: Any) -> ZImageTransformer2DModel:
    """Two blocks of each list, d=288, so that the FFN's second linear has K=768."""
    config = {
        "in_channels": 4,
        "dim": 288,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 9,
        "n_kv_heads": 9,
        "cap_feat_dim": TEXT,
        "axes_dims": [8, 12, 12],
        "axes_lens": [128, 16, 16],
    }
    return seeded(lambda: ZImageTransformer2DModel(**(config | overrides)))


def z_image_inputs(model: Any) -> dict[str, Any]:
    """A list of one image of 4 x 4 tokens, and of its 6 tokens of text."""
    return {
        "x": [normal(model, 17, 4, 1, 8, 8)],
        "t": torch.tensor([0.3]),
        "cap_feats": [normal(model, 18, 6, TEXT)],
    }


TINY = {"ZImageTransformer2DModel": Tiny(z_image, z_image_inputs)}
