"""What the benchmarks share: their options, and how those are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxdit.bench.modes import METHODS
from mxdit.cli.console import app, check_output, need, path_of, size_of
from mxdit.errors import InputError
from mxdit.models import tasks

if TYPE_CHECKING:
    from mxdit.generation.request import Request
    from mxdit.generation.session import Session

PROMPT = "a boat on a lake"  # where a model has none of its own; what it says changes neither bytes nor seconds

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory beside BF16, in the same run, on this machine. docs/measuring.md says what the numbers mean.",
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")

Task = Annotated[str | None, typer.Option(help=f"{', '.join(tasks())}. Default: what the model makes.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every number to this file as well.", metavar="FILE")]
Methods = Annotated[
    list[str] | None,
    typer.Option(help=f"Only this method: {', '.join(METHODS)}. May be repeated.", metavar="METHOD"),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Where checkpoints are made and removed; the system's by default. Needs room for one of each method, for A14B about "
        "60 GB and three times what is not quantized."
    ),
]


def choices(
    option: str,
    given: Sequence[str] | None,
    known: Sequence[str] | Mapping[str, Any],
    default: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """What was named, or all that is known, or a narrower default."""
    wrong = next((name for name in given or () if name not in known), None)
    if wrong is not None:
        raise InputError("no such choice", where=option, got=repr(wrong), expected=" or ".join(known))
    return tuple(dict.fromkeys(given or default or known))


def rounds_of(given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise InputError("there must be at least one round", where="--rounds", got=given)
    return given or default


def open_session(directory: str, task: str | None, **options: Any) -> Session:
    """What can load the pipeline's directory, for a task that it can do."""
    from mxdit.generation.session import Session

    need("diffusers", "transformers")
    if task is not None:
        choices("--task", [task], tasks())
    return Session.open(path_of(directory), task=task, **options)


def clip(session: Session, steps: int, size: str | None, frames: int | None) -> Request:
    """A request: a gray first frame where one is needed, whose content changes neither bytes nor seconds."""
    from PIL import Image

    model, task = session.model, session.task
    preset = model.preset(task)
    wanted = preset.size if size is None else size_of(size)
    image = Image.new("RGB", (wanted[1], wanted[0]), "gray") if model.takes(task, "image") else None
    given = wanted if size is not None or model.takes(task, "height") else None
    return session.request(prompt=preset.prompt or PROMPT, image=image, size=given, frames=frames, steps=steps)


def check_outputs(report: Path | None, plot: Path | None = None) -> None:
    if report is not None:
        check_output(report, ".json")
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise InputError("no such kind of picture", where="--plot", got=str(plot), expected=".png, .svg or .pdf")
        try:
            need("matplotlib")
        except InputError:
            hint = "Install what reports need: pip install 'mxdit[eval]'."
            raise InputError("a package is not installed", where="matplotlib", hint=hint) from None
        check_output(plot)


@contextmanager
def scratch_room(scratch: Path | None) -> Iterator[Path]:
    """A directory for checkpoints, which is gone after the block."""
    if scratch is not None and not scratch.is_dir():
        raise InputError("no such directory", where=str(scratch), hint="Create it first.")
    with tempfile.TemporaryDirectory(dir=scratch) as room:
        yield Path(room)
