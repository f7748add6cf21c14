"""A worker that writes down what its linears are, hold, take and give. `Platform.get_diffusion_worker_cls` is the hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from vllm.model_executor.layers.linear import LinearBase
from vllm_omni.diffusion.worker.diffusion_worker import DiffusionWorker

from mxdit.generation.memory import Sampler, status

EXPERTS = ("transformer", "transformer_2")


class RecordingWorker(DiffusionWorker):
    """The engine's worker. `watch` and `write` are called on every rank by `collective_rpc`.

    Attributes:
        loading: anonymous memory of this process before the model is loaded, at most meanwhile, and after, and what the
            model's tensors take of it, in bytes.
        calls: of the first call of each linear since `watch`, by name: ``input`` as its method gets it, ``partial`` as its
            method returns it, ``output`` as the layer returns it, after whatever ranks exchange.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        before = status("RssAnon")
        with Sampler() as memory:
            super().load_model(*args, **kwargs)
        assert self.model_runner is not None and self.model_runner.pipeline is not None
        tensors = [*self.model_runner.pipeline.parameters(), *self.model_runner.pipeline.buffers()]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        self.loading = {"before": before, "peak": memory.anon, "after": status("RssAnon"), "held": held}

    def linears(self) -> dict[str, LinearBase]:
        """The linears of the experts that the engine made itself, by their names in it."""
        assert self.model_runner is not None
        experts = {name: getattr(self.model_runner.pipeline, name, None) for name in EXPERTS}
        return {
            f"{expert}.{name}": module
            for expert, model in experts.items()
            if isinstance(model, nn.Module)
            for name, module in model.named_modules()
            if isinstance(module, LinearBase)
        }

    def watch(self) -> None:
        """Keep the first call of each linear from now on."""
        self.calls: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.linears().items():
            _watch(layer, self.calls.setdefault(name, {}))

    def write(self, folder: str) -> None:
        """`rank<r>.json` says what the linears are, and what was compiled; `rank<r>.safetensors` has the linears' tensors and
        what `watch` kept."""
        linears = self.linears()
        tensors = {
            f"{name}.{key}": tensor
            for name, layer in linears.items()
            for key, tensor in {**_tensors(layer), **getattr(self, "calls", {}).get(name, {})}.items()
        }
        kinds = {
            name: {"layer": type(layer).__name__, "method": type(layer.quant_method).__name__}
            for name, layer in linears.items()
        }
        stem = Path(folder) / f"rank{self.rank}"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, stem.with_suffix(".safetensors"))
        compiled = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
        said = {"loading": self.loading, "linears": kinds, "compiled": compiled}
        stem.with_suffix(".json").write_text(json.dumps(said))


def _watch(watched: LinearBase, call: dict[str, Tensor]) -> None:
    method = watched.quant_method
    assert method is not None, "the engine gives every linear a method"
    apply = method.apply

    def applied(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        partial = apply(layer, x, bias)
        if layer is watched and "partial" not in call:  # a method may be shared
            call.update(input=x.detach().clone(), partial=partial.detach().clone())
        return partial

    def returned(_: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, Tensor | None]) -> None:
        if "output" not in call:
            call["output"] = (output if isinstance(output, Tensor) else output[0]).detach().clone()

    method.apply = applied
    watched.register_forward_hook(returned)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; of one that is sharded over ranks, this rank's part."""
    found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in found.items()
    }
