"""Our layout, docs/format.md: canonical tensors, and a `quantization_config` with the key `layout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from mxdit.checkpoint.component import Component, Stored
from mxdit.checkpoint.layout import Folder, Layout, Written
from mxdit.config import MXConfig
from mxdit.config.encoders import is_stated, read_stated
from mxdit.quantize.plan import plan
from mxdit.version import __version__


def recognizes(folder: Folder) -> bool:
    return folder.named and isinstance(folder.stated, Mapping) and "layout" in folder.stated


def read(folder: Folder) -> Stored:
    config = read_stated(folder.stated) if is_stated(folder.stated) else MXConfig.from_dict(folder.stated)
    return Stored(folder.path, PACKED.name, folder.tensors, folder.config, config)


def write(component: Component) -> Written:
    config = component.quantization
    assert config is not None
    return Written(component.parts, replace(config, producer={"mxdit": __version__}).to_dict())


def floats(config: MXConfig, skeleton: nn.Module) -> dict[str, bool]:
    return {path: not decision.scheme for path, decision in plan(skeleton, config).items()}


PACKED = Layout("packed", recognizes, read, write, runtime="diffusers + mxdit", floats=floats)
