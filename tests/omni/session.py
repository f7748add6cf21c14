"""One run of vLLM-Omni's offline interface, in a process of its own: `python session.py FOLDER`, or `main` in a fork.

FOLDER/session.json says what to run: ``model``, ``options`` of `Omni`, and ``requests``, each with ``prompt`` (of which
``image`` is a file) and ``sampling``, keys of `OmniDiffusionSamplingParams`. What comes of it is written beside it:
``times.json``, ``video<i>.npy`` (frames, height, width, 3), and what `RecordingWorker.write` writes for each rank.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def main(folder: Path) -> None:
    wanted = json.loads((folder / "session.json").read_text())
    begun = time.perf_counter()
    omni = Omni(**{"model": wanted["model"], "enforce_eager": True, **wanted["options"]})
    times: dict[str, Any] = {"start": time.perf_counter() - begun, "requests": []}
    try:
        if wanted["options"].get("enforce_eager", True):  # what is compiled cannot be watched
            omni.engine.collective_rpc("watch")
        for index, request in enumerate(wanted["requests"]):
            begun = time.perf_counter()
            video = generate(omni, **request)
            times["requests"].append(time.perf_counter() - begun)
            np.save(folder / f"video{index}.npy", video)
        omni.engine.collective_rpc("write", args=(str(folder),))
        (folder / "times.json").write_text(json.dumps(times))
    finally:
        omni.close()


def generate(omni: Omni, prompt: dict[str, Any], sampling: dict[str, Any]) -> np.ndarray:
    """One video, in [0, 1]."""
    text = {key: value for key, value in prompt.items() if key != "image"}
    if "image" in prompt:
        text["multi_modal_data"] = {"image": Image.open(prompt["image"]).convert("RGB")}
    (output,) = omni.generate(text, OmniDiffusionSamplingParams(**sampling), use_tqdm=False)
    if output.error:
        raise RuntimeError(output.error)
    return np.asarray(output.images[0])[0]


if __name__ == "__main__":  # the engine starts its workers by importing this file again
    main(Path(sys.argv[1]))
