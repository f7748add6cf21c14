"""Running the unmodified engine and reading what it did.

`run` starts vLLM-Omni once, has it make two videos, and ends it: a `Record`. An engine takes about as long to start as a whole
test file elsewhere, so tests share records (`conftest.py`), and ask for many things of each.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
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
BUNDLED = Path(__file__).parents[2] / "models/src/mxdit_models"  # a trained pipeline for each task
IMAGE = BUNDLED / "first_frame.png"
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
os.environ.update(OMP_NUM_THREADS="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

# To import vLLM-Omni takes longer than anything that these tests do with it. One process imports it, before any thread is
# started, and every engine is a fork of that; its workers, where there are several, the engine starts from nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["vllm_omni.entrypoints.omni", "vllm_omni.inputs.data", "vllm_omni.diffusion.models.wan2_2"]
)


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
    """One worker.

    loading   bytes of anonymous memory ``before`` the model was loaded, at its ``peak``, and ``after``.
    compiled  how many ``graphs`` torch.compile made, and how often one broke, by the reason (``breaks``).
    """

    loading: Mapping[str, int]
    compiled: Mapping[str, Any]
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
    image: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Record:
    """Start an engine on a directory, make a video for each of `SEEDS`, and end it.

    Args:
        folder: an empty one, where the record is kept.
        options: keyword arguments of `Omni`. Tensor parallelism is ``tensor_parallel_size``: what is given as
            ``parallel_config`` is dropped without a word. Blocks are compiled where ``enforce_eager`` is False; no call of a
            linear is recorded then.
        image: the first frame, for I2V.
        environment: variables of the engine's processes. The engine reads some while it is imported, so that takes a
            Python from the start; without, it is forked from one that has imported it.

    Raises EngineFailed with what the engine printed.
    """
    prompt = PROMPT | ({"image": str(image)} if image else {})
    requests = [{"prompt": prompt, "sampling": {**SAMPLING, "seed": seed}} for seed in SEEDS]
    wanted = {"model": str(model), "options": dict(options or {}), "requests": requests}
    (folder / "session.json").write_text(json.dumps(wanted))
    log = folder / "log.txt"
    if environment is None:
        forked = FORKS.Process(target=_session, args=(folder, log))
        forked.start()
        forked.join(TIMEOUT)
        code = forked.exitcode
        _kill(forked.pid)
    else:
        process = start([sys.executable, SESSION, folder], log, environment)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    if code != 0:
        ended = f"no end after {TIMEOUT} s" if code is None else f"exit code {code}"
        raise EngineFailed(f"{ended}\n{log.read_text()}")
    return Record(folder)


def start(command: list[Any], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A command in a process group of its own, with what it prints in `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [*map(str, command)],
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, so that it frees the memory it shares; and then whatever it started and left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    _kill(process.pid)
    process.wait()


def _kill(group: int | None) -> None:
    assert group is not None, "it was started"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _session(folder: Path, log: Path) -> None:
    os.setsid()
    with log.open("wb") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    import session

    session.main(folder)


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
    return Rank(said["loading"], said["compiled"], linears)
