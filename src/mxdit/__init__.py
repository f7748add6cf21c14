"""mxdit: 4-bit microscaling floats for video diffusion transformers, the same numerics on every device."""

from mxdit import backends as backends  # register torch.ops.mxdit and its kernels; the aliases say that they are
from mxdit import ops as ops  # meant to be here
from mxdit.config import MXConfig
from mxdit.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    FormatError,
    InputError,
    ModelError,
    MXDiTError,
)
from mxdit.integrations.diffusers_hook import pipeline_config, register_when_imported
from mxdit.layers import MXLinear
from mxdit.numerics.codec import Packed, Scales, decode, encode
from mxdit.quantize.activations import set_activation
from mxdit.quantize.apply import quantize_
from mxdit.quantize.plan import plan
from mxdit.quantize.report import QuantReport, report_of
from mxdit.version import __version__
from mxdit.weights import quantize_weight

register_when_imported()

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "InputError",
    "MXConfig",
    "MXDiTError",
    "MXLinear",
    "ModelError",
    "Packed",
    "QuantReport",
    "Scales",
    "__version__",
    "decode",
    "encode",
    "pipeline_config",
    "plan",
    "quantize_",
    "quantize_weight",
    "report_of",
    "set_activation",
]
