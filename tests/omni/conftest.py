"""Directories that the engine loads, and engines that several tests look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
import tiny


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A two-expert pipeline for each task, in BF16; "deep" is a T2V one of as many blocks as TI2V-5B has."""
    root = tmp_path_factory.mktemp("directories")
    saved = {task: tiny.save(root / task, task) for task in tiny.TASKS}
    deep = tiny.pipeline("t2v")
    for seed, expert in enumerate(("transformer", "transformer_2")):
        setattr(deep, expert, tiny.transformer(seed=seed, num_layers=30).bfloat16())
    deep.save_pretrained(root / "deep")
    return saved | {"deep": root / "deep"}


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., engine.Record]:
    """`ran(directory, task, **options)`: the record of one engine, started once for each set of them."""
    records: dict[str, engine.Record] = {}

    def record(directory: Path, task: str = "t2v", **options: Any) -> engine.Record:
        key = f"{directory} {sorted(options.items())}"
        if key not in records:
            folder = tmp_path_factory.mktemp("engine")
            first = engine.IMAGE if task == "i2v" else None
            records[key] = engine.run(directory, folder, options, image=first)
        return records[key]

    return record
