"""mxdit: 4-bit microscaling floats for video diffusion transformers, the same numerics on every device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mxdit import backends as backends  # register torch.ops.mxdit and its kernels; the aliases say that they are
from mxdit import ops as ops  # meant to be here
from mxdit.config import MXConfig
from mxdit.config.attention import AttentionPolicy
from mxdit.config.steps import StepPolicy
from mxdit.embedding import MXEmbedding
from mxdit.errors import (
    BackendError,
    Cancelled,
    CheckpointError,
    ConfigError,
    FormatError,
    InputError,
    ModelError,
    MXDiTError,
)
from mxdit.integrations.diffusers_steps import step_policy
from mxdit.integrations.hook import pipeline_config, register_when_imported
from mxdit.layers import MXLinear
from mxdit.numerics.codec import Packed, Scales, decode, encode
from mxdit.quantize.activations import set_activation
from mxdit.quantize.apply import quantize_
from mxdit.quantize.plan import plan
from mxdit.quantize.report import QuantReport, report_of
from mxdit.shards import Shard, shard
from mxdit.version import __version__
from mxdit.weights import quantize_weight

if TYPE_CHECKING:
    from mxdit.generation.request import Request
    from mxdit.generation.running import Result
    from mxdit.generation.session import Session
    from mxdit.integrations.diffusers_adapters import load_lora_weights
    from mxdit.integrations.diffusers_attention import attention_policy
    from mxdit.integrations.diffusers_fused import fuse_
    from mxdit.models.infer import infer_spec

register_when_imported()

# Imported when they are first asked for, so that `import mxdit` stays as fast for those who only quantize.
_LATER = {
    "attention_policy": "mxdit.integrations.diffusers_attention",
    "fuse_": "mxdit.integrations.diffusers_fused",
    "infer_spec": "mxdit.models.infer",
    "load_lora_weights": "mxdit.integrations.diffusers_adapters",
    "Request": "mxdit.generation.request",
    "Result": "mxdit.generation.running",
    "Session": "mxdit.generation.session",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


__all__ = [
    "AttentionPolicy",
    "BackendError",
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "InputError",
    "MXConfig",
    "MXDiTError",
    "MXEmbedding",
    "MXLinear",
    "ModelError",
    "Packed",
    "QuantReport",
    "Request",
    "Result",
    "Scales",
    "Session",
    "Shard",
    "StepPolicy",
    "__version__",
    "attention_policy",
    "decode",
    "encode",
    "fuse_",
    "infer_spec",
    "load_lora_weights",
    "pipeline_config",
    "plan",
    "quantize_",
    "quantize_weight",
    "report_of",
    "set_activation",
    "shard",
    "step_policy",
]
