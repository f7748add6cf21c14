"""What every training stage shares: a CSV of every step, progress on the terminal, and checkpoints to resume from."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHOW = 50  # steps between lines on the terminal


class Journal:
    """Log and checkpoint one stage in `folder`. `parts` are the objects with a `state_dict` that a resume restores."""

    def __init__(self, folder: Path, *, every: int = 250, **parts: Any) -> None:
        self.folder, self.every, self.parts = folder, every, parts
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float | Tensor]] = []
        self.started = time.perf_counter()

    def resume(self) -> int:
        """Restore the last checkpoint if there is one; returns the first step that is still to be done."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        print(f"resuming {self.folder} at step {state['step']}", flush=True)
        return state["step"]

    def write(self, step: int, total: int, **figures: float | Tensor) -> None:
        """Note one step. A figure may be a tensor of one element on any device: it is read every SHOW steps only, since
        reading it waits for the device."""
        self.rows.append({"step": step, **figures})
        done = step + 1
        if done % SHOW == 0:
            recent = self._settled()[-SHOW:]
            means = {k: sum(r[k] for r in recent) / len(recent) for k in figures}
            text = "  ".join(f"{k} {v:.4g}" for k, v in means.items())
            print(f"{done:6d}/{total}  {text}  elapsed {time.perf_counter() - self.started:.0f} s", flush=True)
        if done % self.every == 0 or done == total:
            self.save(done)

    def _settled(self) -> list[dict[str, float]]:
        settled = [{k: float(v) for k, v in row.items()} for row in self.rows]
        self.rows[:] = settled
        return settled

    def save(self, done: int) -> None:
        state = {"step": done, **{name: part.state_dict() for name, part in self.parts.items()}}
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")  # never a half-written checkpoint
        rows = self._settled()
        log = self.folder / "log.csv"
        known = log.exists()
        with log.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            if not known:
                writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
        self.rows.clear()
