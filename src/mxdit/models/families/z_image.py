"""Z-Image (Turbo and base): one sequence of image and text, after a refiner for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and a patch is 2 x 2 latents; positions of rows and columns alike."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    patch = int(config["all_patch_size"][0])
    return Geometry(multiple=2 ** (stages - 1) * patch, positions=min(config["axes_lens"][1:]))


# Source of the figures: the example of diffusers' ZImagePipeline, which is Z-Image-Turbo's; it takes no guidance. The config
# of a Z-Image that is not distilled is the same: ask for its steps and guidance.
_PRESETS = (Preset("Z-Image-Turbo", "t2i", (1024, 1024), 1, 1, 8, 0.0),)


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
    # Source: skip_refiners of nunchaku's Z-Image loader.
    recipes={
        "nunchaku": "quantizes the refiners of the image and of the text, or neither of them; here only the image's, for the "
        "text's is small beside the layers, and an error in it is one of all that read the text"
    },
    timestep=lambda given: 1 - given["t"],  # it rises in the call
    pipelines={
        "ZImagePipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
            prompt_first=True,
            guidance_added=1.0,
        )
    },
    hosts=(
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageOmniPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    needed=("n_layers", "all_patch_size", "axes_lens"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Tongyi-MAI/Z-Image-Turbo"),),
)

SPECS = (Z_IMAGE,)
