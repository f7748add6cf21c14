"""Transformer classes of diffusers that no spec knows, and why: what errors and docs/supported-models.md say of them.

Source: the classes' own code in `diffusers.models.transformers` of the release that `READ` names. tests/test_supported_models.py
holds the list against the release that is installed: a class is in `SPECS` or here.
"""

from __future__ import annotations

READ = (0, 42)  # the newest release of diffusers that the list is of; older ones lack some of the classes

_AUDIO = "makes audio; mxdit knows images and videos"
_PART = "a part of U-Nets between their convolutions, no transformer of a pipeline"
_UNWRITTEN = "no spec yet; `mxdit info --propose` makes one"

UNSUPPORTED: dict[str, str] = {
    "AceStepTransformer1DModel": _AUDIO,
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": "a small language model that predicts codes of audio; no diffusion transformer",
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "T5FilmDecoder": "makes spectrograms of audio; diffusers lists its pipeline as deprecated",
    "RFD4ProteinaTransformer": "makes protein backbones: its blocks also carry a row for each pair of residues",
    "DreamLiteTransformer2DModel": _PART,
    "DualTransformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "Transformer2DModel": "an older class of three kinds of inputs, mostly a part of U-Nets; DiT and PixArt have classes of their own",
    "PriorTransformer": "predicts one CLIP embedding of a prompt, so it sees no tokens of an image; its pipelines decode with a "
    "U-Net",
    "DiTTransformer2DModel": "takes a class of ImageNet and no prompt, which a request of mxdit cannot ask for",
    "SanaWMTransformer3DModel": "recurrent layers (gated delta rules, short convolutions) between its attention; errors of 4 bits "
    "may add up over frames there, and nobody measured it",
    "SanaWMLTX2RefinerTransformer3DModel": "refines a video chunk by chunk with a cache of keys and values, and is called by its "
    "pipeline's own refiner",
    "NucleusMoEImageTransformer2DModel": "93 % of its weights are experts in stacked tensors, and mxdit quantizes linears only",
    "BriaFiboTransformer2DModel": _UNWRITTEN,
    "BriaTransformer2DModel": _UNWRITTEN,
    "CogView3PlusTransformer2DModel": _UNWRITTEN,
    "ConsisIDTransformer3DModel": _UNWRITTEN,
    "HunyuanDiT2DModel": _UNWRITTEN,
    "JoyImageEditPlusTransformer3DModel": _UNWRITTEN,
    "JoyImageEditTransformer3DModel": _UNWRITTEN,
    "LatteTransformer3DModel": _UNWRITTEN,
    "LuminaNextDiT2DModel": _UNWRITTEN,
    "OmniGenTransformer2DModel": _UNWRITTEN,
    "PRXTransformer2DModel": _UNWRITTEN,
}
"""Class name of a transformer -> why mxdit does not support it, a clause without a full stop."""
