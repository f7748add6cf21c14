"""How a run fits into a budget of memory: what stays, what comes and goes, and what that costs, before anything is loaded.

A `Policy` is one way to hold a pipeline. `Planner` predicts what each takes in every phase of a run, and takes the one that fits
and costs the least time. docs/memory.md has the model, and measurements beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch

from mxdit.backends.threads import usable_threads
from mxdit.config import MXConfig
from mxdit.errors import InputError
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.footprint import Weights, weights_of
from mxdit.generation.memory import status
from mxdit.generation.work import Work, Works

MIB, GIB = 2**20, 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": MIB, "gi": GIB, "ti": 2**40}

# Rates that make seconds of bytes and operations. They only put the ways in an order, and need be right to a factor.
READ = 2e9  # bytes a second from a disk
COPY = 1e10  # bytes a second from the host to a device
DECODE = {"cpu": 1e11}  # operations a second of the VAE's convolutions
DECODE_ELSEWHERE = 2e13

# What a process's first run takes beside what is counted: code of the libraries that is first used, and their own room.
FIRST_RUN = 32 * MIB
PRODUCT, PRODUCT_THREAD = 35 * MIB, 2 * MIB  # most scratch of a quantized product (mxdit.backends.cpu)
COMPILER = 96 * MIB  # what torch.compile and its graphs keep of the process (docs/memory.md)
CONTEXT = 512 * MIB  # of a device: its context, and what its allocator cannot fill

STAY, DROP, SWAP, BLOCKS, WHOLE, TILES = "resident", "dropped", "one at a time", "a block at a time", "whole", "tiled"


@dataclass(frozen=True)
class Policy:
    """One way to hold a pipeline.

    text         the text encoder: "resident", or "dropped" once a prompt is encoded, and read again for another prompt.
    transformers "resident"; "one at a time": there from its first step on until another component works; or "a block at a time".
    vae          "whole", or "tiled", the only way that changes pixels.
    """

    text: str = STAY
    transformers: str = STAY
    vae: str = WHOLE

    def __str__(self) -> str:
        return f"text encoder {self.text}, transformers {self.transformers}, VAE {self.vae}"


@dataclass(frozen=True)
class Phase:
    """What one phase of a run takes: bytes of weights by component, and of everything else that is alive."""

    name: str
    weights: Mapping[str, int]
    work: int

    @property
    def total(self) -> int:
        """Without what the process has of its own."""
        return sum(self.weights.values()) + self.work


@dataclass(frozen=True)
class Plan:
    """A policy for one size of clip, and what it takes.

    Attributes:
        policy: what is done.
        device: name of a torch device.
        size, frames: (height, width) of the clip in pixels, and its frames.
        budget: bytes that were allowed, None where nobody said.
        floor: bytes that the process has before anything is loaded, and its kernels' scratch; of a device its context.
        phases: of a run, in their order.
        seconds: what the policy costs a run in time, by arithmetic.
    """

    policy: Policy
    device: str
    size: tuple[int, int]
    frames: int
    budget: int | None
    floor: int
    phases: tuple[Phase, ...]
    seconds: float

    @property
    def peak(self) -> int:
        """Most bytes that the run takes: of the process on a CPU, else of the device."""
        return self.floor + max(phase.total for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {**asdict(self), "peak": self.peak, "phases": [{**asdict(p), "total": p.total} for p in self.phases]}

    def __str__(self) -> str:
        return f"{self.policy}: {self.peak / GIB:.2f} GiB at most"


class Planner:
    """Plans for one model as it will be loaded.

    Args:
        model, task, configs, dtype, device, variant, compiled: as a `Session` has them.
    Raises InputError for a family that no plan is made for, and CheckpointError for a component that cannot be read.
    """

    def __init__(
        self,
        model: ModelDirectory,
        task: str,
        configs: Mapping[str, MXConfig | None],
        dtype: torch.dtype,
        device: str,
        variant: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.task, self.device, self.dtype = model, task, device, dtype
        self._cpu = torch.device(device).type == "cpu"
        self._works = Works(model, task, dtype)
        self._configs, self._variant, self._compiled = configs, variant, compiled

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """Of each component that has any."""
        float32 = self.model.called(self.task).float32
        found = {}
        for name in self.model.parts:
            if name in self.model.components or name in ("vae", "image_encoder") or name in self.model.text_encoders:
                dtype = torch.float32 if name in float32 else self.dtype
                found[name] = weights_of(self.model, name, self._configs.get(name), dtype, self._variant)
        return found

    @cached_property
    def floor(self) -> int:
        """Bytes that the process has of its own; measured when it is first asked for, with the libraries imported."""
        if not self._cpu:
            return CONTEXT
        size, frames = self.smallest
        self._works.at(*size, frames)  # imports what it needs
        return status("VmRSS") + FIRST_RUN + PRODUCT + PRODUCT_THREAD * usable_threads() + COMPILER * self._compiled

    @property
    def smallest(self) -> tuple[tuple[int, int], int]:
        """((height, width), frames) of the smallest clip."""
        side = self.model.geometry.multiple
        return (side, side), 1

    def refused(self) -> dict[str, str]:
        """What cannot be done with this model here -> why not."""
        reasons = {}
        if not self.model.called(self.task).embeddings:
            reasons[DROP] = "its pipeline takes no text that was encoded before"
        if self._compiled:
            reasons[BLOCKS] = "blocks whose weights come and go are not compiled"
        if self._cpu:
            reasons[BLOCKS] = "on a CPU the system itself lets go of pages of files that are used least"
            own = [name for name in self.model.components if self.weights[name].own > self.weights[name].total // 2]
            if own:
                reasons[SWAP] = (
                    f"{', '.join(own)}: quantized or cast while it loads, there is no file whose pages could be let go; "
                    "`mxdit quantize` writes one"
                )
        return reasons

    def policies(self) -> Iterator[Policy]:
        """All that can be carried out."""
        refused = self.refused()
        for text, transformers, vae in product((STAY, DROP), (STAY, SWAP, BLOCKS), (WHOLE, TILES)):
            if not {text, transformers, vae} & refused.keys():
                yield Policy(text, transformers, vae)

    def plan(
        self,
        size: tuple[int, int],
        frames: int,
        policy: Policy,
        steps: int = 40,
        loras: int = 0,
        budget: int | None = None,
    ) -> Plan:
        """What a policy takes and costs for a clip of (height, width) pixels, with so many bytes of LoRA beside the weights."""
        work = self._works.at(*size, frames)
        beside = max(0, work.kept - PRODUCT) if self._cpu else 0  # products and attention have one buffer
        return Plan(
            policy,
            self.device,
            size,
            frames,
            budget,
            self.floor + beside,
            tuple(self._phases(policy, work, loras)),
            self._seconds(policy, work, steps),
        )

    def plans(
        self, size: tuple[int, int], frames: int, steps: int = 40, loras: int = 0, budget: int | None = None
    ) -> list[Plan]:
        """One for each policy that can be carried out, those that cost least time first."""
        found = [self.plan(size, frames, policy, steps, loras, budget) for policy in self.policies()]
        return sorted(found, key=lambda plan: (plan.seconds, plan.peak))

    def choose(self, budget: int, size: tuple[int, int], frames: int, steps: int = 40, loras: int = 0) -> Plan:
        """The policy that fits into `budget` bytes and costs the least time.

        Raises InputError where none fits; it names the smallest budget that works, and the longest clip of that size that fits.
        """
        plans = self.plans(size, frames, steps, loras, budget)
        fitting = [plan for plan in plans if plan.peak <= budget]
        if fitting:
            return fitting[0]
        least = min(plans, key=lambda plan: plan.peak)
        raise InputError(
            f"{size[1]}x{size[0]} and {frames} frames do not fit",
            field="memory",
            where=str(self.model.path),
            got=f"{budget / MIB:.0f} MiB",
            expected=f"at least {least.peak / MIB + 1:.0f}MiB, with the {least.policy}",
            hint=self._instead(budget, size, frames, loras),
        )

    def _instead(self, budget: int, size: tuple[int, int], frames: int, loras: int) -> str:
        step = self.model.geometry.temporal or 1
        fits, over = -1, (frames - 1) // step  # in latent frames beside the first
        while over - fits > 1:
            middle = (fits + over) // 2
            least = min(self.plan(size, 1 + middle * step, policy, loras=loras).peak for policy in self.policies())
            fits, over = (middle, over) if least <= budget else (fits, middle)
        if fits >= 0:
            return f"Of this size at most {1 + fits * step} frames fit."
        why = "; ".join(
            f"not {what}: {reason}" for what, reason in self.refused().items() if what != BLOCKS or not self._cpu
        )
        return f"Not even one frame of this size fits. Name more memory{f' ({why})' if why else ''}."

    def _phases(self, policy: Policy, work: Work, loras: int) -> Iterator[Phase]:
        held = {name: self._there(weights) for name, weights in self.weights.items()}
        texts = {name: held[name] for name in self.model.text_encoders}
        experts = {name: held[name] for name in self.model.components}
        always = {name: nbytes for name, nbytes in held.items() if name not in texts and name not in experts}
        if policy.text == STAY:
            always |= texts
        if loras:
            always |= {"LoRA": loras}
        at_rest = dict(experts)
        if policy.transformers == SWAP:  # of what is mapped nothing stays
            at_rest = {name: self.weights[name].own if self._cpu else 0 for name in experts}
        elif policy.transformers == BLOCKS:
            at_rest = {name: w.total - w.blocks for name, w in self.weights.items() if name in experts}
        tiled = policy.vae == TILES
        yield Phase("text", always | texts | at_rest, work.text)
        if work.image:
            yield Phase("first frame", always | at_rest, work.image_tiled if tiled else work.image)
        for name in experts:
            running = at_rest
            if policy.transformers == SWAP:
                running = at_rest | {name: experts[name]}
            elif policy.transformers == BLOCKS:
                running = at_rest | {name: at_rest[name] + self.weights[name].block}
            yield Phase(f"steps of {name}", always | running, work.denoise)
        yield Phase("VAE", always | at_rest, work.decode_tiled if tiled else work.decode)
        yield Phase("pixels", always | at_rest, work.pixels)

    def _there(self, weights: Weights) -> int:
        return weights.total - (weights.rows if self._cpu else 0)

    def _seconds(self, policy: Policy, work: Work, steps: int) -> float:
        """What a run loses: bytes that come again, each as often as it does, and what the VAE computes twice."""
        seconds = 0.0
        if policy.text == DROP:
            seconds += sum(self.weights[name].read for name in self.model.text_encoders) / READ
        experts = [self.weights[name] for name in self.model.components]
        if policy.transformers == SWAP:
            seconds += sum(w.mapped for w in experts) / READ if self._cpu else sum(w.total for w in experts) / COPY
        elif policy.transformers == BLOCKS:  # each step runs one expert, twice where there is guidance
            seconds += 2 * steps * sum(w.blocks for w in experts) / len(experts) / COPY
        if policy.vae == TILES:
            rate = DECODE.get(torch.device(self.device).type, DECODE_ELSEWHERE)
            seconds += (work.tiles - 1) * work.operations / rate
        return seconds


def budget_of(memory: str | int) -> int:
    """Bytes of "24GiB", "24GB", "12000MiB", or a number of bytes. Raises InputError for anything else."""
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)b", memory.strip().lower()) if isinstance(memory, str) else None
    if not found or float(found[1]) <= 0:
        raise InputError("not a size of memory", field="memory", got=repr(memory), expected="24GiB, 24GB or 12000MiB")
    return int(float(found[1]) * UNITS[found[2]])
