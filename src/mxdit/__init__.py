"""mxdit: 4-bit microscaling floats for video diffusion transformers, the same numerics on every device."""

from mxdit import backends as backends  # register torch.ops.mxdit and its kernels; the aliases say that they are
from mxdit import ops as ops  # meant to be here
from mxdit.codec import Packed, decode, encode
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
from mxdit.integrations import pipeline_config, register_when_imported
from mxdit.layers import MXLinear
from mxdit.quantize import plan, quantize_, report_of, set_activation
from mxdit.report import QuantReport
from mxdit.version import __version__

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
    "__version__",
    "decode",
    "encode",
    "pipeline_config",
    "plan",
    "quantize_",
    "report_of",
    "set_activation",
]
