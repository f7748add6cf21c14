"""What a quantized linear of the engine computes: ``torch.ops.mxdit.linear`` over the rank's shard."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm_omni.diffusion.config import get_current_diffusion_config

from mxdit.backends import Layout, layout_for
from mxdit.config import ACTIVATIONS, MXConfig
from mxdit.errors import FormatError
from mxdit.integrations.vllm_omni.loading import Loader
from mxdit.integrations.vllm_omni.steps import StepSwitch
from mxdit.numerics.formats import PARTS, block_format, scheme_for
from mxdit.quantize.plan import Decision

_BYTES = torch.float8_e4m3fn
"""Of one byte, and a float: HSDP, which shards floats only, takes it, and casts it to nothing."""


class MXLinearMethod(LinearMethodBase):
    """One quantized linear, whatever its format: the engine makes an instance for each.

    A rank's result is that of its shard (docs/numerics.md section 5.5); the engine adds up those of row-parallel ranks.

    Args:
        config: of the linear's transformer.
        decision: what becomes of the linear.
        prefix: its name in the engine.
        switch: of the transformer, where its activations differ by step.
    """

    def __init__(self, config: MXConfig, decision: Decision, prefix: str, switch: StepSwitch | None = None) -> None:
        assert decision.method is not None and decision.activation is not None
        self.method, self.activation, self.prefix = decision.method, decision.activation, prefix
        self._switch = switch
        self._config, self._rule = config, config.rule_of(decision.method)
        # Looked up once, not at each call and in each graph of a block that the engine compiles.
        schemes = {name: scheme_for(self.method, name) for name in ACTIVATIONS[self.method]}
        self._schemes = {name: (one.name, one.output_dtypes(self.method)) for name, one in schemes.items()}
        self._layout: Layout | None = None
        self._loader: Loader | None = None
        self._phase = 0
        self._sharded = bool(get_current_diffusion_config().parallel_config.use_hsdp)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The linear's parameters, as `Loader` makes them; the engine's own loader is not used."""
        assert isinstance(layer, LinearBase), "a config gives this method to nothing else"
        self._loader = Loader(
            layer,
            self.prefix,
            self.method,
            self._rule,
            serialized=self._config.is_checkpoint_serialized,
            require_smooth=self._config.require_smooth_scale and block_format(self.method).smooths,
            dtype=params_dtype,
            inputs=input_size_per_partition,
            outputs=output_partition_sizes,
        )
        self._phase = self._loader.phase

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that the linear is whole, and bring its weight into the layout that its device multiplies fastest."""
        if self._loader is None:
            return  # called again
        self._loader.finish()
        self._loader = None
        if self._sharded:
            for name in PARTS:
                part = getattr(layer, name, None)
                if part is not None and part.dtype is torch.uint8:
                    setattr(layer, name, nn.Parameter(part.data.view(_BYTES), requires_grad=False))
            return
        weight = layer.get_parameter("weight").data
        self._layout = layout_for(weight.device, self.method)
        if self._layout is not None:
            layer.weight = nn.Parameter(self._layout.pack(weight), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) bf16, fp16 or fp32 to (..., N) in x's dtype, as `mxdit.MXLinear.forward`."""
        activation = self.activation_now()
        scheme, outputs = self._schemes[activation]
        if x.dtype not in outputs:
            if x.dtype is not torch.float32:
                raise FormatError(
                    "activations have a dtype that no scheme takes", where=self.prefix, got=x.dtype, expected=outputs
                )
            return self.apply(layer, x.to(torch.bfloat16), bias).to(x.dtype)
        if self._phase:
            x = F.pad(x, (self._phase, 0))
        held: Any = layer
        codes, scale = held.weight, held.weight_scale
        if self._sharded:
            codes, scale = codes.view(torch.uint8), scale.view(torch.uint8)
        dual = getattr(held, "weight_dual_scale", None)
        return torch.ops.mxdit.linear(
            x,
            codes,
            scale,
            None if dual is None else dual.squeeze(-1),
            getattr(held, "mul_scale", None),
            bias,
            scheme,
            self._rule if activation == "mxfp4" and self._rule else "ocp",
            "packed" if self._layout is None else self._layout.name,
        )

    def activation_now(self) -> str:
        """What activations are quantized to: what the request's step asks for, if it goes with the weight, or the layer's own."""
        if self._switch is None:
            return self.activation
        asked = self._switch.asked(self.prefix)
        return asked if asked in self._schemes else self.activation
