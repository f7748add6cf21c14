"""Metrics that need trained networks of others: LPIPS, VBench and FVD, from weights in a directory that a user fills.

Nothing is ever downloaded: `why_not` says which file or package is missing, and how to get it. What was run here: LPIPS with
random weights in the right shapes, and FVD's distance on features. What was not: the published weights of all three, and
VBench, whose package pins libraries that mxdit does not run with (an environment of its own can have both).
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from mxdit.errors import InputError
from mxdit.generation.media import write_mp4

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # (reference, clip), each (frames, height, width, 3) uint8
FVD_FRAMES = 10  # what I3D's strides need at least
VBENCH_DIMENSIONS = ("subject_consistency", "motion_smoothness", "imaging_quality")


@dataclass(frozen=True)
class Adapter:
    """One metric of another project.

    package   what must be importable.
    install   how to get it.
    files     path in the weights directory -> where it comes from.
    measure   (weights directory, pairs, frames a second) -> {metric: a value for each pair}; FVD, which compares the sets,
              gives one value for all.
    """

    package: str
    install: str
    files: Mapping[str, str]
    measure: Callable[[Path, Pairs, float], dict[str, list[float]]]

    def why_not(self, weights: Path | None) -> str | None:
        """What is missing to run it, one sentence, or None."""
        wanted = "; ".join(f"{name} ({source})" for name, source in self.files.items())
        if weights is None:
            return f"no --weights-dir is given; it would hold {wanted}"
        missing = [
            f"{weights / name} ({source})" for name, source in self.files.items() if not (weights / name).exists()
        ]
        if missing:
            return f"missing {'; '.join(missing)}"
        if find_spec(self.package) is None:
            return f"{self.package} is not installed; {self.install}"
        try:
            if self.package != "vbench":  # which reads where its weights are when it is imported
                importlib.import_module(self.package)
        # A torchvision that was built for another torch raises RuntimeError.
        except (ImportError, RuntimeError, OSError) as error:
            return f"{self.package} cannot be imported ({error}); {self.install}"
        return None


def measure(name: str, weights: Path | None, pairs: Pairs, fps: float) -> dict[str, list[float]]:
    """Run one of `ADAPTERS`. Raises InputError for an unknown name, and for what is missing."""
    if name not in ADAPTERS:
        raise InputError("no such metric", got=name, expected=", ".join(ADAPTERS))
    adapter = ADAPTERS[name]
    reason = adapter.why_not(weights)
    if weights is None or reason:
        raise InputError(f"{name} cannot be computed", field="weights_dir", got=reason)
    return adapter.measure(weights, pairs, fps)


def _frames(clip: np.ndarray) -> torch.Tensor:
    """(frames, 3, height, width) fp32 in [-1, 1]."""
    return torch.from_numpy(clip).permute(0, 3, 1, 2) / 127.5 - 1


def _lpips(weights: Path, pairs: Pairs, fps: float) -> dict[str, list[float]]:
    lpips = importlib.import_module("torchmetrics.functional.image.lpips")
    # The linear layers come with torchmetrics; the backbone starts random, because otherwise it is downloaded.
    model = lpips._NoTrainLpips(net="alex", pnet_rand=True)
    state = torch.load(weights / LPIPS_FILE, weights_only=True)
    own = model.net.state_dict()  # "slice1.0.weight" is AlexNet's "features.0.weight"
    model.net.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in own})
    values = []
    with torch.inference_mode():
        for reference, clip in pairs:
            frames = zip(_frames(reference).split(1), _frames(clip).split(1), strict=True)
            values.append(float(np.mean([float(model(a, b)) for a, b in frames])))
    return {"lpips": values}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between the Gaussians of two sets of features, each (samples, features), two samples or more."""
    means, covariances = zip(
        *((x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], -1)) for x in (a, b)), strict=True
    )
    # The trace of the root of a product of covariances: its eigenvalues are real and not negative, but for rounding.
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    spread = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(eigenvalues).sum()
    return float(np.square(means[0] - means[1]).sum() + spread)


def _fvd(weights: Path, pairs: Pairs, fps: float) -> dict[str, list[float]]:
    network = torch.jit.load(weights / FVD_FILE).eval()
    features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    with torch.inference_mode():
        for pair in pairs:
            for clip, found in zip(pair, features, strict=True):
                if len(clip) < FVD_FRAMES:
                    raise InputError("too few frames for FVD", got=len(clip), expected=f"{FVD_FRAMES} or more")
                video = (
                    torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float()
                )  # 0 to 255; the network scales and resizes
                found.append(network(video, rescale=True, resize=True, return_features=True)[0].numpy())
    if len(features[0]) < 2:
        raise InputError("FVD compares sets of videos", got=len(features[0]), expected="2 or more")
    return {"fvd": [frechet(*(np.stack(found).astype(np.float64) for found in features))]}


def _vbench(weights: Path, pairs: Pairs, fps: float) -> dict[str, list[float]]:
    os.environ["VBENCH_CACHE_DIR"] = str(weights.resolve())  # read when vbench is imported
    vbench = importlib.import_module("vbench")
    info = Path(str(vbench.__file__)).parent / "VBench_full_info.json"
    with tempfile.TemporaryDirectory() as folder:
        videos, out = Path(folder) / "videos", Path(folder) / "out"
        videos.mkdir()
        for i, (_, clip) in enumerate(pairs):
            write_mp4(videos / f"{i:05d}.mp4", clip, round(fps))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vbench.VBench(device, str(info), str(out)).evaluate(
            videos_path=str(videos),
            name="mxdit",
            dimension_list=list(VBENCH_DIMENSIONS),
            local=True,
            mode="custom_input",
            imaging_quality_preprocessing_mode="longer",
        )
        found = json.loads((out / "mxdit_eval_results.json").read_text())
    # Of each dimension: its mean, and a value for every video.
    return {
        f"vbench_{name}": [row["video_results"] for row in sorted(found[name][1], key=lambda row: row["video_path"])]
        for name in VBENCH_DIMENSIONS
    }


LPIPS_FILE = "alexnet-owt-7be5be79.pth"
FVD_FILE = "i3d_torchscript.pt"
ADAPTERS: Mapping[str, Adapter] = {
    "lpips": Adapter(
        "torchvision",
        "install the build that fits this torch",
        {LPIPS_FILE: "torchvision's AlexNet weights, IMAGENET1K_V1"},
        _lpips,
    ),
    "vbench": Adapter(
        "vbench",
        "`pip install vbench`",
        {
            "dino_model/facebookresearch_dino_main": "a clone of facebookresearch/dino",
            "dino_model/dino_vitbase16_pretrain.pth": "DINO's ViT-B/16",
            "amt_model/amt-s.pth": "AMT's small model",
            "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": "IQA-PyTorch's release v0.1-weights",
        },
        _vbench,
    ),
    "fvd": Adapter("torch", "", {FVD_FILE: "StyleGAN-V's TorchScript of I3D, trained on Kinetics-400"}, _fvd),
}
