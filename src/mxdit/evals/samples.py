"""Which videos an evaluation makes: prompts times seeds, the same for every mode."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxdit.errors import InputError
from mxdit.evals.metrics.judge import Judge, Sample, judge_for
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.media import read_image
from mxdit.generation.request import Request, make_request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Video:
    """One video of an evaluation.

    Attributes:
        index: its place.
        request: what every mode is asked for.
        asked: what the judge compares the video with; None where there is no judge.
    """

    index: int
    request: Request
    asked: Sample | None

    @property
    def group(self) -> str:
        """What it has in common with its other seeds: the prompt and the image."""
        request = self.request.to_dict()
        return hashlib.sha256(repr((request["prompt"], request["image"])).encode()).hexdigest()[:12]


def choose_videos(
    model: ModelDirectory,
    task: str,
    *,
    prompts: Path | None = None,
    count: int | None = None,
    seeds: int = 1,
    options: Mapping[str, Any],
) -> tuple[tuple[Video, ...], Judge | None]:
    """The videos, the first seed of every prompt before the second one, and who judges them.

    Args:
        prompts: a text file, one prompt a line; for I2V a tab and an image's path, from that file's directory, follow it.
            None takes the captions that the bundled model was not trained on, and their judge.
        count: how many prompts; None takes the file's, or 32 of the bundled model's.
        seeds: how many per prompt: 0, 1, ...
        options: more of `make_request`'s arguments, the same for every video.

    Raises InputError where there are no such prompts, or a request that the model cannot fulfil.
    """
    for name, number in (("count", count), ("seeds", seeds)):
        if number is not None and number < 1:
            raise InputError("there must be at least one", field=name, got=number)
    judge = judge_for(model, task) if prompts is None else None
    if prompts is not None:
        rows: Sequence[tuple[str, Image | None, Sample | None]] = [
            (prompt, image, None) for prompt, image in read_prompts(prompts, task)
        ]
    elif judge is not None:
        rows = [(sample.prompt, sample.image, sample) for sample in judge.samples(count or 32)]
    else:
        hint = "Give a file, one prompt a line; for image-to-video a tab and an image's path follow it."
        raise InputError("this model has no prompts of its own", field="prompts", got=str(model.path), hint=hint)
    if count is not None and count > len(rows):
        raise InputError("there are fewer prompts", field="count", got=count, expected=f"at most {len(rows)}")
    # The judge knows clips of one size only.
    plain = options.get("size") is None and options.get("frames") is None
    judge = judge if plain else None
    videos = [
        Video(
            seed * len(rows[:count]) + i,
            make_request(model, task, prompt=prompt, image=image, seed=seed, **options),
            asked if judge else None,
        )
        for seed in range(seeds)
        for i, (prompt, image, asked) in enumerate(rows[:count])
    ]
    first = videos[0].request
    for video in videos:
        if (video.request.height, video.request.width) != (first.height, first.width):
            raise InputError(
                "the first frames have different aspects",
                field="prompts",
                got=f"{video.request.width}x{video.request.height} beside {first.width}x{first.height}",
                hint="Give the size of all videos.",
            )
    return tuple(videos), judge


def read_prompts(path: Path, task: str) -> list[tuple[str, Image | None]]:
    """The prompts of a file, and for I2V their first frames; empty lines are passed over. Raises InputError."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError("not a readable text file", where=str(path), got=str(error)) from None
    if not lines:
        raise InputError("no prompts", where=str(path), expected="one a line")
    found = []
    for line in lines:
        prompt, _, image = (part.strip() for part in line.partition("\t"))
        if bool(image) is not (task == "i2v"):
            raise InputError(
                "not a line for this task",
                where=str(path),
                got=repr(line),
                expected="a prompt, a tab and an image's path" if task == "i2v" else "a prompt alone",
            )
        found.append((prompt, read_image(path.parent / image) if image else None))
    return found
