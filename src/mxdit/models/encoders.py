"""Text encoders of transformers: where their blocks are. Nothing else about them is particular to a family.

A pipeline computes an embedding once a prompt, so what counts is their memory. `spec_of` makes a `ModelSpec` of a row.
"""

from __future__ import annotations

from torch import nn

from mxdit.models.spec import ModelSpec

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # the names that diffusers' pipelines give them

_T5 = ("encoder.block",)
_CLIP = (
    "text_model.encoder.layers",
    "encoder.layers",
)  # transformers 4.57, and 5, whose CLIPTextModel has no text_model
_DECODER = ("model.layers",)
_INNER = ("layers",)
# Of a model that also sees images only the language model: its vision tower stays, for a prompt without an image skips it.
_SEEING = ("model.language_model.layers",)

# Class name -> paths of the list of its blocks, in the versions of transformers that there are.
BLOCKS: dict[str, tuple[str, ...]] = {
    "UMT5EncoderModel": _T5,
    "T5EncoderModel": _T5,
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "LlamaModel": _INNER,
    "LlamaForCausalLM": _DECODER,
    "Qwen2Model": _INNER,
    "Qwen2ForCausalLM": _DECODER,
    "Qwen2_5_VLTextModel": _INNER,
    "Qwen2_5_VLForConditionalGeneration": _SEEING,
    "Gemma2Model": _INNER,
    "Gemma2ForCausalLM": _DECODER,
    "Gemma3TextModel": _INNER,
    "Gemma3ForCausalLM": _DECODER,
    "Gemma3ForConditionalGeneration": _SEEING,
}

# Those whose files have the names of their modules, in every version: a checkpoint of theirs is read without transformers.
PLAIN = ("UMT5EncoderModel", "T5EncoderModel")

TABLES = ("shared", "encoder.embed_tokens")  # of those, one table


def encoder_spec(model: nn.Module) -> ModelSpec | None:
    """The spec of a text encoder, which may be of a subclass; None for a class that is not in the table."""
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in BLOCKS), None)
    if name is None:
        return None
    modules = dict(model.named_modules())
    blocks = next((path for path in BLOCKS[name] if path in modules), BLOCKS[name][0])
    tables = TABLES if name in PLAIN else ()
    return ModelSpec(transformer=name, blocks=(blocks,), tables=tables, components=TEXT_ENCODERS)
