"""Z-Image (Turbo and base): one sequence of image and text, after a refiner for each."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

Z_IMAGE = ModelSpec(
    title="Z-Image",
    transformer="ZImageTransformer2DModel",
    # Not `context_refiner` and `siglip_refiner`: two blocks each, which see the text or a given image alone, and whose
    # output every layer takes.
    blocks=("noise_refiner", "layers"),
    groups=(
        ("attention.to_q", "attention.to_k", "attention.to_v"),
        ("feed_forward.w1", "feed_forward.w3"),
    ),
    keep={"adaLN_modulation.0": MODULATION},
    timestep=lambda given: 1 - given["t"],  # it rises in the call
    hosts=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageOmniPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Tongyi-MAI/Z-Image-Turbo"),),
)

SPECS = (Z_IMAGE,)
