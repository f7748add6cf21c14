"""``mxdit bench memory``: what a pipeline takes in memory and on disk, and the totals of models that do not fit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxdit.bench.processes import TIDY, alone
from mxdit.bench.variants import Variant, variants
from mxdit.checkpoint.files import read_json
from mxdit.config import MXConfig
from mxdit.generation.directory import ModelDirectory, bundled
from mxdit.generation.loading import show_loading
from mxdit.generation.memory import Sampler, status
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.models import COMPONENTS, spec_of
from mxdit.models.skeleton import skeleton_of

# -- a transformer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertMemory:
    """What loading one transformer took, in bytes.

    Attributes:
        mode: the `Variant`'s name.
        baseline: memory that no file backs before the load; what imports and thread pools take is in it.
        peak, held: the same while it loads and after, over the baseline.
        rss: the largest resident set, mapped files included.
        device: most that an accelerator's allocator gave out, 0 on a CPU.
        model: all tensors; `block` of them in the first block.
        largest: the largest tensor of the files.
        files: the weights on disk.
        seconds: of the load.
    """

    mode: str
    baseline: int
    peak: int
    held: int
    rss: int
    device: int
    model: int
    block: int
    largest: int
    files: int
    seconds: float


def load_transformer(variant: Variant, device: str = "cpu") -> ExpertMemory:
    """Load a transformer's directory in this process, which is best a fresh one (`alone`), and say what that took."""
    from safetensors import safe_open

    show_loading(False)
    config = None if variant.method is None else MXConfig(variant.method)
    where = variant.path / "config.json"
    kind: Any = type(skeleton_of(read_json(where), str(where)))

    def loaded(path: Path, config: MXConfig | None) -> Any:
        return kind.from_pretrained(path, torch_dtype=torch.bfloat16, quantization_config=config).to(device)

    # A small load first: what imports, thread pools and allocators take once in a process is not the model's.
    loaded(bundled("t2v") / "transformer", config or MXConfig("mxfp4_dualscale"))
    gc.collect()
    baseline, started = status("RssAnon"), time.perf_counter()
    with Sampler(device) as sampler:
        model = loaded(variant.path, config)
    seconds, files, largest = time.perf_counter() - started, sorted(variant.path.glob("*.safetensors")), 0
    for file in files:
        with safe_open(file, "pt") as stored:
            largest = max([largest, *(stored.get_tensor(name).nbytes for name in sorted(stored.keys()))])
    return ExpertMemory(
        variant.name,
        baseline,
        sampler.anon - baseline,
        status("RssAnon") - baseline,
        sampler.rss,
        sampler.device,
        tensor_bytes(model),
        tensor_bytes(model.get_submodule(f"{spec_of(model).blocks[0]}.0")),
        largest,
        sum(file.stat().st_size for file in files),
        seconds,
    )


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, those that it has under two names once."""
    return sum({t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}.values())


# -- a pipeline ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PipelineMemory:
    """What a whole pipeline took, in bytes.

    Attributes:
        mode: the `Variant`'s name.
        files: weights on disk, all components'.
        weights: tensors by component, as they are on the device.
        loading, generating: the most memory that no file backs while it loads, and while it makes a clip, over what imports take.
        rss: the largest resident set up to the end of the clip, mapped files included.
        device_loading, device_generating: an accelerator's counters, 0 on a CPU.
        expert: what loading the first expert alone took, in a process of its own.
    """

    mode: str
    files: int
    weights: dict[str, int]
    loading: int
    generating: int
    rss: int
    device_loading: int
    device_generating: int
    expert: ExpertMemory

    @property
    def both(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def one(self) -> int:
        """Bytes of all weights with one expert, the larger one, resident at a time."""
        experts = [nbytes for name, nbytes in self.weights.items() if name in COMPONENTS]
        return self.both - sum(experts) + max(experts)


def measure(
    model: ModelDirectory,
    request: Request,
    methods: Sequence[str],
    scratch: Path,
    device: str,
    tell: Callable[[str], None],
) -> Iterator[PipelineMemory]:
    """Load a pipeline in every mode, each in a process of its own, and make a clip.

    Args:
        model: BF16, or stored quantized, which is then the only mode.
        request: the clip.
        methods: of `mxdit.bench.modes.METHODS`.
        scratch: where the offline checkpoints are written.
        tell: is told what is being done.
    """
    for variant in variants(model.path, bool(model.stored), methods, scratch, tell):
        tell(variant.name)
        figures = alone(_measure, variant, request, device, environment=TIDY)
        alone_expert = Variant(variant.name, variant.path / next(iter(model.components)), variant.method)
        yield PipelineMemory(**figures, expert=alone(load_transformer, alone_expert, device, environment=TIDY))


def _measure(variant: Variant, request: Request, device: str) -> dict[str, Any]:
    show_loading(False)
    # The bundled model first: what imports, thread pools and allocators take once in a process is not the model's.
    Session.open(method=variant.method, device=device).load()
    gc.collect()
    baseline, session = status("RssAnon"), variant.session(request.task, device)
    with Sampler(device) as loading:
        pipeline = session.load()
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    with Sampler(device) as generating:
        session.run(request)
    return {
        "mode": variant.name,
        "files": weight_files(variant.path),
        "weights": {name: tensor_bytes(part) for name, part in parts.items()},
        "loading": loading.anon - baseline,
        "generating": generating.anon - baseline,
        "rss": max(loading.rss, generating.rss),
        "device_loading": loading.device,
        "device_generating": generating.device,
    }


def weight_files(directory: Path) -> int:
    """Bytes of the weights in a directory and in the ones in it."""
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
