"""What every number of an evaluation means: `DEFINITIONS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PSNR_CEILING = 100.0  # dB; what equal clips count as
# One viewer for both perceptual metrics, a usual desk: a 24-inch Full HD screen (200 cd/m2, 250 lux) seen from 0.6 m.
DISPLAY = "standard_fhd"  # ColorVideoVDP's name of it
PIXELS_PER_DEGREE = 37.8  # the same geometry, for FLIP


@dataclass(frozen=True)
class Metric:
    """One number.

    title       what a table calls it.
    level       "layer", "model", "trajectory", "video" or "meaning": how far from the arithmetic it is taken.
    definition  one sentence, the formula in words.
    unit        "" for a plain ratio; "share" is shown as a percentage.
    better      "higher", "lower", or None where neither is.
    source      who defined or computes it.
    """

    title: str
    level: str
    definition: str
    unit: str
    better: str | None
    source: str


def _right(what: str) -> str:
    return f"Share of clips whose {what}, as the judge reads it, is the one that the prompt asks for."


JUDGE = "the judge of the bundled model, docs/mini-model.md"
VBENCH = "VBench (Huang et al., 2024), computed by its package; the mode's own clips, without a reference"

DEFINITIONS: Mapping[str, Metric] = {
    "sqnr_db": Metric(
        "SQNR",
        "layer",
        "10 log10 of the energy of a linear's exact output over the energy of the quantized one's error, on inputs captured from real "
        "BF16 steps; the summary is the mean over the quantized linears.",
        "dB",
        "higher",
        "signal to quantization noise ratio",
    ),
    "embedding_error": Metric(
        "Embedding error",
        "model",
        "Norm of the difference of the prompt's embedding, as the pipeline gives it to the transformer, from BF16's, over the norm "
        "of BF16's; of modes whose text encoder is quantized.",
        "",
        "lower",
        "relative L2",
    ),
    "velocity_error": Metric(
        "Velocity error",
        "model",
        "Norm of the difference of the predicted velocity from BF16's, over the norm of BF16's, both given the latents of "
        "the BF16 trajectory (teacher-forced), so that errors do not add up over steps.",
        "",
        "lower",
        "relative L2",
    ),
    "velocity_cosine": Metric(
        "Velocity cosine",
        "model",
        "Cosine between the predicted velocity and BF16's, both given the latents of the BF16 trajectory.",
        "",
        "higher",
        "cosine",
    ),
    "guided_error": Metric(
        "Guided error",
        "model",
        "Velocity error of what the sampler follows, v_u + g (v_c - v_u) with the expert's guidance g, teacher-forced; root mean "
        "square over the steps.",
        "",
        "lower",
        "relative L2",
    ),
    "accumulated_error": Metric(
        "Accumulated error",
        "model",
        "Norm of the sum over all steps of the step's length times the guided velocity's error, over the norm of the same sum of "
        "BF16's guided velocities, teacher-forced: what is left of the errors when they are added up.",
        "",
        "lower",
        "relative L2 of the Euler sum",
    ),
    "slope": Metric(
        "Slope",
        "model",
        "Least-squares factor of the conditional velocity's error on that velocity, over all steps, teacher-forced: below zero "
        "velocities shrink, at every step alike.",
        "",
        None,
        "linear regression through the origin",
    ),
    "guidance_slope": Metric(
        "Guidance slope",
        "model",
        "The same of the error of v_c - v_u on it: below zero guidance is weaker than asked for.",
        "",
        None,
        "linear regression through the origin",
    ),
    "latent_error": Metric(
        "Latent error",
        "trajectory",
        "Norm of the difference of the latents from BF16's after a step, over the norm of BF16's, each mode running free "
        "from the same noise; the summary is after the last step.",
        "",
        "lower",
        "relative L2",
    ),
    "latent_cosine": Metric(
        "Latent cosine",
        "trajectory",
        "Cosine between the latents and BF16's after a step, each mode running free from the same noise; the summary is "
        "after the last step.",
        "",
        "higher",
        "cosine",
    ),
    "psnr_db": Metric(
        "PSNR",
        "video",
        "10 log10 of 255 squared over the mean squared error of all pixels of the clip against BF16's; equal clips count as "
        f"{PSNR_CEILING:g} dB.",
        "dB",
        "higher",
        "peak signal to noise ratio",
    ),
    "ssim": Metric(
        "SSIM",
        "video",
        "Structural similarity to BF16's frames, 11 x 11 Gaussian window (sigma 1.5), averaged over channels and frames; 1 "
        "is equal.",
        "",
        "higher",
        "Wang et al., 2004, computed by torchmetrics",
    ),
    "ms_ssim": Metric(
        "MS-SSIM",
        "video",
        "SSIM over up to five scales, averaged over frames; a clip too small for five (shorter side below 176 pixels) has the "
        "first scales that fit, their weights scaled to sum to 1: three at 64 x 64.",
        "",
        "higher",
        "Wang et al., 2003, computed by torchmetrics",
    ),
    "cvvdp_jod": Metric(
        "ColorVideoVDP",
        "video",
        "Quality against BF16's clip in just-objectionable-difference units, from a model of colour and motion vision: 10 is "
        "no visible difference, 1 less is preferred by 3 of 4 viewers; a 24-inch Full HD screen, 200 cd/m2, in an office, "
        "seen from 0.6 m, one clip pixel a screen pixel.",
        "JOD",
        "higher",
        "Mantiuk et al., 2024, computed by cvvdp",
    ),
    "flip": Metric(
        "FLIP",
        "video",
        "LDR-FLIP difference from BF16's frames as seen when flipping between them, 0 to 1, averaged over pixels and frames "
        f"at {PIXELS_PER_DEGREE:g} pixels per degree, ColorVideoVDP's screen.",
        "",
        "lower",
        "Andersson et al., 2020, computed by flip-evaluator",
    ),
    "flicker": Metric(
        "Flicker",
        "video",
        "Mean absolute change from frame to frame of the error against BF16, in 8-bit levels: an error that stands still "
        "does not count, one that jumps does.",
        "levels",
        "lower",
        "own; frame differences as in ITU-T P.910's temporal information",
    ),
    "flicker_ratio": Metric(
        "Motion ratio",
        "video",
        "Mean absolute difference of neighbouring frames over that of BF16's clip: 1 is the same amount of change, above 1 "
        "more, below 1 less.",
        "",
        None,
        "the frame difference of VBench's temporal flickering, relative to BF16",
    ),
    "lpips": Metric(
        "LPIPS",
        "video",
        "Weighted squared distance of AlexNet features from BF16's frames, averaged over frames; 0 is equal.",
        "",
        "lower",
        "Zhang et al., 2018, v0.1, computed by torchmetrics",
    ),
    "fvd": Metric(
        "FVD",
        "video",
        "Frechet distance between the I3D features of all the mode's clips and all of BF16's; biased upwards for few clips "
        "(it is published for 2048), so compare it only at equal n.",
        "",
        "lower",
        "Unterthiner et al., 2018",
    ),
    "vbench_subject_consistency": Metric(
        "Subject consistency",
        "video",
        "Similarity of DINO features between the frames of a clip.",
        "",
        "higher",
        VBENCH,
    ),
    "vbench_motion_smoothness": Metric(
        "Motion smoothness",
        "video",
        "How well a frame interpolator predicts every other frame of a clip.",
        "",
        "higher",
        VBENCH,
    ),
    "vbench_imaging_quality": Metric(
        "Imaging quality", "video", "Freedom of the frames from distortion, as MUSIQ scores it.", "", "higher", VBENCH
    ),
    "digit": Metric("Digit right", "meaning", _right("digit"), "share", "higher", JUDGE),
    "color": Metric("Color right", "meaning", _right("digit's color"), "share", "higher", JUDGE),
    "direction": Metric("Direction right", "meaning", _right("direction of movement"), "share", "higher", JUDGE),
    "background": Metric("Background right", "meaning", _right("background color"), "share", "higher", JUDGE),
    "first_frame_psnr_db": Metric(
        "First frame",
        "meaning",
        f"PSNR of the clip's first frame against the image that it was given; equal ones count as {PSNR_CEILING:g} dB.",
        "dB",
        "higher",
        "peak signal to noise ratio",
    ),
}
