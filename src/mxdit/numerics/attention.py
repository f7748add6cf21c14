"""Reference attention of one head, in plain torch.

Each method is a function of q (L, D), k (S, D), v (S, E), a mask that is None or (L, S) (bool, or floats that are added),
the scale of the logits, and whether query i sees keys 0 to i only. It gives (L, E) fp32, zeros for a query without a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 22  # logits at once: 16 MB


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Products, softmax and sums in fp32, in no order of their own: backends agree to a tolerance."""
    k, v = k.float(), v.float()
    out = torch.empty(len(q), v.shape[1], dtype=torch.float32, device=q.device)
    rows = max(1, _PIECE // max(1, len(k)))
    for first in range(0, len(q), rows):
        part = slice(first, min(first + rows, len(q)))
        logits = masked(q[part].float() @ k.T * scale, None if mask is None else mask[part], first if causal else None)
        highest = logits.amax(1, keepdim=True) if len(k) else logits.new_zeros(len(logits), 1)
        weights = (logits - highest.clamp(min=torch.finfo(torch.float32).min)).exp()
        total = weights.sum(1, keepdim=True)
        out[part] = weights @ v / total.where(total > 0, 1)
    return out


def masked(logits: Tensor, mask: Tensor | None, first: int | None) -> Tensor:
    """Logits of some queries (rows, S), -inf where a query does not see a key: by its mask, or by its place, where ``first``
    is the place of the first of them."""
    if first is not None:
        places = torch.arange(first, first + len(logits), device=logits.device)[:, None]
        mask = torch.arange(logits.shape[1], device=logits.device) <= places
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else logits + mask.float()


METHODS = {"exact": exact}
"""How attention is computed: its arithmetic, by name."""
