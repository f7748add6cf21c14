"""The layouts in which a component can be stored, one module each; a layout is added by its module and its entry here."""

from __future__ import annotations

from mxdit.checkpoint.layout import Layout
from mxdit.checkpoint.layouts.auto_round import AUTO_ROUND
from mxdit.checkpoint.layouts.diffusers import DIFFUSERS
from mxdit.checkpoint.layouts.modelslim import MODELSLIM
from mxdit.checkpoint.layouts.original import ORIGINAL
from mxdit.checkpoint.layouts.packed import PACKED
from mxdit.checkpoint.layouts.sglang import SGLANG
from mxdit.checkpoint.layouts.single_file import COMFYUI, GGUF
from mxdit.checkpoint.layouts.vllm_omni import VLLM_OMNI

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (PACKED, VLLM_OMNI, SGLANG, MODELSLIM, AUTO_ROUND, ORIGINAL, DIFFUSERS, COMFYUI, GGUF)
}
TARGETS = tuple(name for name, layout in LAYOUTS.items() if layout.write)
