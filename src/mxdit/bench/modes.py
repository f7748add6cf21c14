"""The modes that are measured beside BF16. Light to import: the console lists them."""

from __future__ import annotations

import torch

from mxdit.backends.carrier import slow_bfloat16

BF16, FP32 = "bf16", "fp32"
CARRIERS = {BF16: torch.bfloat16, FP32: torch.float32}  # of what is not quantized
MODES = {  # the weight's format and the activation
    "mxfp4": ("mxfp4", "mxfp4"),
    "mxfp4_dualscale": ("mxfp4_dualscale", "mxfp4"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "w4a8": ("mxfp4", "mxfp8"),
    "w4a16": ("mxfp4", "bf16"),
    "w8a16": ("mxfp8", "bf16"),
}
METHODS = ("mxfp8", "mxfp4", "mxfp4_dualscale")  # formats of weights: what memory and loading depend on


def baseline(device: str) -> str:
    """What speed is compared with on that device: "bf16", or "fp32" on a CPU where torch's BF16 is the slower one."""
    return FP32 if slow_bfloat16(device) else BF16
