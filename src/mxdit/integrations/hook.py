"""Registering with diffusers and transformers when they are imported, without importing them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig


# Where each host's table lives, of quantizers or of attention, and the guest. They have no entry point for guests and ask to
# import them.
HOSTS = {
    "diffusers.models.attention_dispatch": "mxdit.integrations.diffusers_attention",
    "diffusers.quantizers.auto": "mxdit.integrations.diffusers",
    "transformers.quantizers.auto": "mxdit.integrations.transformers",
}


def pipeline_config(method: str, **overrides: Any) -> PipelineQuantizationConfig:
    """The `quantization_config=` of a pipeline's `from_pretrained`; see `mxdit.integrations.diffusers_config.pipeline_config`."""
    return importlib.import_module("mxdit.integrations.diffusers_config").pipeline_config(method, **overrides)


def register_when_imported() -> None:
    """Register with each host as soon as it is imported, or now if it is, so that `import mxdit` is all a user writes.

    Without this, `import mxdit` followed by a plain `from_pretrained` of a converted directory would fail with "Unknown
    quantization type", unless mxdit imported all of diffusers (seconds) or every user a module of ours by its long name.
    """
    waiting = {finder.host for finder in sys.meta_path if isinstance(finder, _Finder)}
    for host, guest in HOSTS.items():
        if host in sys.modules:
            importlib.import_module(guest)
        elif host not in waiting:
            sys.meta_path.insert(0, _Finder(host))


class _Finder(MetaPathFinder):
    """Python's own import hook: sees the host's first import, lets it happen as ever, and imports the guest after it."""

    def __init__(self, host: str) -> None:
        self.host = host

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.host:
            return None
        sys.meta_path.remove(self)  # once is enough, and the search below must not meet this finder again
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, HOSTS[self.host])
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, guest: str) -> None:
        self.inner, self.guest = inner, guest

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What looks at a module later (inspect, pickle) finds the loader it would have found without us.
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        importlib.import_module(self.guest)
