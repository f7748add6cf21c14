"""`ModelSpec`: what mxdit has to know of a model family, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """One family of transformers. Layer names are diffusers module paths; docs/adapting-a-model.md shows how to add one.

    transformer  class name of the diffusers transformer.
    blocks       path of the ModuleList of its repeated blocks. Only linears inside the blocks are ever quantized.
    groups       linears of a block, by their path inside it, that share an input: runtimes fuse them into one product, so
                 they must have one precision and one `mul_scale`. Members that a model does not have are passed over.
    keep         globs of linears, by their path inside a block, that stay in their float dtype unless told otherwise.
    components   names that pipelines give their transformers; a cascade has several.
    pipelines    pipeline class name -> what it makes ("t2v", "i2v").
    original     module and tensor paths of the model's own release -> ours, "#" for a block's index; the longest one that a
                 path begins with counts.
    original_components  folder of a component in the model's own release -> ours.
    original_config      makes our transformer's config of the release's, given (config, tensor name -> shape).
    runtime      linear of a block -> its name in vLLM-Omni, which fuses some; others are called as here.
    """

    transformer: str
    blocks: str
    groups: tuple[tuple[str, ...], ...] = ()
    keep: tuple[str, ...] = ()
    components: tuple[str, ...] = ("transformer",)
    pipelines: Mapping[str, str] = field(default_factory=dict)
    original: Mapping[str, str] = field(default_factory=dict)
    original_components: Mapping[str, str] = field(default_factory=dict)
    original_config: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    runtime: Mapping[str, str] = field(default_factory=dict)

    def block_of(self, path: str) -> tuple[int, str] | None:
        """(block's index, path inside the block) of a module path, or None outside the blocks."""
        head, dot, rest = path.partition(f"{self.blocks}.")
        index, dot, inside = rest.partition(".")
        if head or not dot or not index.isdigit():
            return None
        return int(index), inside

    def from_original(self, name: str) -> str | None:
        """Our name of a tensor of the model's own release; None for one that is not the model's.

        Whole path components are replaced, never substrings: "head.modulation" is not "modulation".
        """
        parts = name.split(".")
        index = parts[1] if len(parts) > 1 and parts[0] == self.blocks and parts[1].isdigit() else ""
        if index:
            parts[1] = "#"
        for cut in range(len(parts), 0, -1):
            ours = self.original.get(".".join(parts[:cut]))
            if ours is not None:
                return ".".join([ours, *parts[cut:]]).replace("#", index)
        return None

    def runtime_name(self, path: str) -> str:
        """vLLM-Omni's name of the module at `path`."""
        block = self.block_of(path)
        if block is None or block[1] not in self.runtime:
            return path
        return f"{self.blocks}.{block[0]}.{self.runtime[block[1]]}"
