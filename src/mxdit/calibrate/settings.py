"""`Settings`: what is calibrated, on which prompts, and what it may cost to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mxdit.calibrate.linears import Recipe
from mxdit.calibrate.prompts import PROMPTS
from mxdit.errors import InputError
from mxdit.evals.metrics.judge import judge_for
from mxdit.evals.samples import read_prompts
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.request import Request, make_request

EVALUATED = 64  # of the bundled model's own captions, the first ones are left to `mxdit eval`
LEARNED = 64  # captions of the bundled model to learn from, unless told otherwise
HELD = 16  # captions to judge by: clips of fewer do not tell recipes apart
LEAST_HELD = 4


# Matrix units do twice as many products with half the bits, as NVIDIA's data sheet has it for Blackwell (dense FP4, FP8, BF16).
# The CPU kernels are nearer to 1, 1.9 and 1.9 (docs/results.md).
TIMES: Mapping[str, float] = MappingProxyType({"mxfp4": 1.0, "mxfp8": 2.0, "bf16": 4.0})


@dataclass(frozen=True)
class Budget:
    """What may be spent on more bits than four.

    Attributes:
        share: of the parameters of all blocks that may stay in BF16.
        step_share: of the denoising steps that may have MXFP8 activations.
        max_bytes: most bytes of the transformers' blocks, in place of `share`.
        target: the predicted error to come down to, as a share of that of four bits throughout, in place of `share`.
        max_cost: most time of all block linears over a clip, as a multiple of what the recipe's activations take, in place of
            `share`. It buys MXFP8 activations over four-bit weights, too, which take no bytes.
        times: format of the activations -> time of a product relative to four bits, for `max_cost`.
    """

    share: float = 0.0
    step_share: float = 0.0
    max_bytes: int | None = None
    target: float | None = None
    max_cost: float | None = None
    times: Mapping[str, float] = field(default_factory=lambda: dict(TIMES))

    def __post_init__(self) -> None:
        for name in ("share", "step_share", "target"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError("no share", field=name, got=value, expected="0 to 1")
        asked = [name for name in ("max_bytes", "target", "max_cost") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise InputError("two budgets at once", field=asked[1], got=f"and {asked[0]} {getattr(self, asked[0])}")
        if self.max_cost is not None and not 1 <= self.max_cost < float("inf"):
            raise InputError(
                "no time that a budget could be", field="max_cost", got=self.max_cost, expected="1 or more"
            )
        if self.times.keys() != TIMES.keys() or not all(0 < time < float("inf") for time in self.times.values()):
            raise InputError(
                "not the time of each format",
                field="times",
                got=dict(self.times),
                expected=f"something like {dict(TIMES)}",
            )

    @property
    def buys_layers(self) -> bool:
        """Whether any linear may have more bits."""
        return bool(self.share) or any(value is not None for value in (self.max_bytes, self.target, self.max_cost))


PRESETS: Mapping[str, Budget] = MappingProxyType(
    {"fast": Budget(), "balanced": Budget(0.125, 0.1), "quality": Budget(0.25, 0.1)}
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is calibrated, and how.

    Attributes:
        model: the unquantized model.
        task: what its clips are made as.
        recipe: what is done to each linear.
        budget: what is spent beside it.
        fit, held: clips to learn from, and clips to judge by. No prompt is in both.
        dtype: of everything that is not quantized.
        device: a torch device's name.
        offload: whether weights come to it for no longer than they are used. It changes no number.
        seed: of everything that is chosen by chance.
    """

    model: ModelDirectory
    task: str
    recipe: Recipe
    budget: Budget
    fit: tuple[Request, ...]
    held: tuple[Request, ...]
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    offload: bool = False
    seed: int = 0

    @classmethod
    def choose(
        cls,
        model: ModelDirectory,
        *,
        task: str | None = None,
        prompts: Path | None = None,
        count: int | None = None,
        held: int | None = None,
        request: Mapping[str, Any],
        **settings: Any,
    ) -> Settings:
        """Fill in what is not given.

        Args:
            prompts: a file of them, as `mxdit eval` takes it; None takes the bundled model's captions, none of those that
                `mxdit eval` begins with, or for another T2V model the list that comes with mxdit.
            count: captions to learn from.
            held: captions to judge by.
            request: more fields of every request.
            settings: the other fields.

        Raises InputError where there are too few prompts, or for a model that is quantized already.
        """
        if model.stored:
            raise InputError(
                "the model is quantized already",
                where=str(model.path),
                got=", ".join(f"{name}: {' and '.join(config.methods)}" for name, config in model.stored.items()),
                expected="a BF16, FP16 or FP32 model",
            )
        task = model.tasks[0] if task is None else task
        model.check_task(task)
        judge = judge_for(model, task) if prompts is None else None
        if prompts is not None:
            rows = read_prompts(prompts, task)
        elif judge is not None:
            rows = [(sample.prompt, sample.image) for sample in judge.samples(EVALUATED + LEARNED + HELD)[EVALUATED:]]
        elif task == "i2v":
            raise InputError(
                "no first frames", field="prompts", expected="a file: a prompt, a tab and an image's path a line"
            )
        else:
            rows = [(prompt, None) for prompt in PROMPTS]
        judged = min(HELD, max(LEAST_HELD, len(rows) // 4)) if held is None else held
        learned = len(rows) - judged if count is None else count
        if learned < 1 or judged < LEAST_HELD or learned + judged > len(rows):
            raise InputError(
                "too few prompts",
                field="prompts",
                where=None if prompts is None else str(prompts),
                got=f"{len(rows)}, {judged} of them to judge by"
                + ("" if count is None else f" and {count} to learn from"),
                expected=f"at least {LEAST_HELD} to judge by and 1 to learn from",
            )
        requests = [
            make_request(model, task, prompt=prompt, image=image, seed=index, **request)
            for index, (prompt, image) in enumerate(rows)
        ]
        # Those to judge by come last: with more or fewer to learn from they stay the same.
        return cls(
            model=model,
            task=task,
            fit=tuple(requests[:learned]),
            held=tuple(requests[len(rows) - judged :]),
            **settings,
        )
