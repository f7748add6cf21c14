"""`ModelSpec`: what mxdit has to know of a model family, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    """

    transformer: str
    blocks: str
    groups: tuple[tuple[str, ...], ...] = ()
    keep: tuple[str, ...] = ()
    components: tuple[str, ...] = ("transformer",)
    pipelines: Mapping[str, str] = field(default_factory=dict)

    def block_of(self, path: str) -> tuple[int, str] | None:
        """(block's index, path inside the block) of a module path, or None outside the blocks."""
        head, dot, rest = path.partition(f"{self.blocks}.")
        index, dot, inside = rest.partition(".")
        if head or not dot or not index.isdigit():
            return None
        return int(index), inside
