"""Running the unmodified engine and reading what it did.

`run` starts vLLM-Omni once, has it make two videos, and ends it: a `Record`. An engine takes about as long to start as a whole
test file elsewhere, so tests share records (`conftest.py`), and ask for many things of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

SESSION = Path(__file__).with_name("session.py")
TIMEOUT = 300  # seconds for one engine, from start to end; what takes longer hangs
PATIENCE = 30  # seconds that a process has to end when it is asked to
CPU = "mxdit_omni_cpu"  # name of the plugins without which the engine does not run on a CPU

STEPS = 4  # two for each expert, at the boundary and the shift of the directories
SAMPLING = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
}
SEEDS = (42, 43)  # one video each
PROMPT = {"prompt": "a red seven moving left", "negative_prompt": "blue"}
# The environment of every process: one thread for each, because two ranks share two cores; and nothing from a hub.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class EngineFailed(Exception):
    """The engine did not start, or did not make a video. The text is what it printed."""


@dataclass(frozen=True)
class Linear:
    """One linear of one rank, as the engine has it.

    layer, method  names of the classes of the layer and of what computes it.
    tensors        its parameters and buffers on this rank, and the first call of it: ``input``, ``partial``, ``output``
                   (`mxdit_omni_cpu.worker`).
    """

    layer: str
    method: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rank:
    """One worker. loading: bytes of anonymous memory ``before`` the model was loaded, at its ``peak``, and ``after``."""

    loading: Mapping[str, int]
    linears: Mapping[str, Linear]


@dataclass(frozen=True)
class Record:
    """What one engine did, in the folder where `run` had it written."""

    folder: Path

    @cached_property
    def ranks(self) -> list[Rank]:
        return [_rank(self.folder / f"rank{r}.json") for r in range(len([*self.folder.glob("rank*.json")]))]

    @cached_property
    def times(self) -> dict[str, Any]:
        """``start`` of the engine, and each of ``requests``, in seconds."""
        return json.loads((self.folder / "times.json").read_text())

    def video(self, seed: int = SEEDS[0]) -> np.ndarray:
        """(frames, height, width, 3) in [0, 1]."""
        return np.load(self.folder / f"video{SEEDS.index(seed)}.npy")


def run(
    model: Path,
    folder: Path,
    options: Mapping[str, Any] | None = None,
    *,
    plugins: str | None = None,
    image: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Record:
    """Start an engine on a directory, make a video for each of `SEEDS`, and end it.

    Args:
        folder: an empty one, where the record is kept.
        options: keyword arguments of `Omni`. Tensor parallelism is ``tensor_parallel_size``: what is given as
            ``parallel_config`` is dropped without a word.
        plugins: the only ones to load, by name, separated by commas.
        image: the first frame, for I2V.

    Raises EngineFailed with what the engine printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompt = PROMPT | ({"image": str(image)} if image else {})
    wanted = {
        "model": str(model),
        "options": dict(options or {}),
        "requests": [{"prompt": prompt, "sampling": {**SAMPLING, "seed": seed}} for seed in SEEDS],
    }
    (folder / "session.json").write_text(json.dumps(wanted))
    chosen = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    log = folder / "log.txt"
    process = start([sys.executable, SESSION, folder], log, {**chosen, **(environment or {})})
    try:
        code: int | str = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        code = f"no end after {TIMEOUT} s"
    finally:
        stop(process)
    if code != 0:
        raise EngineFailed(f"{code}\n{log.read_text()}")
    return Record(folder)


def start(command: list[Any], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A command in a process group of its own, with what it prints in `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [*map(str, command)],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, so that it frees the memory it shares; and then whatever it started and left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rank(path: Path) -> Rank:
    said, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    linears = {
        name: Linear(
            **kind,
            tensors={
                key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")
            },
        )
        for name, kind in said["linears"].items()
    }
    return Rank(said["loading"], linears)
