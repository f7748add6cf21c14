"""`Job`: what was asked for and what became of it, as its row in the table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
CANCELLED, INVALID_IMAGE = "cancelled", "invalid_image"  # codes of a failed job
STOP, FORGET = 1, 2  # `cancel` of one that is to stop, and of one of which nothing is to stay


@dataclass(frozen=True)
class Job:
    """One row.

    number      in the order in which they were accepted.
    fields      of `make_request`, JSON-serializable; an image lies beside the database.
    image       whether there is one.
    step, steps that are done, and that there are; where `steps` is 0 nobody knows, and `step` is in percent.
    stepped_at, first_stepped_at  when the last step ended, and the first that this run told of.
    seconds     that the run took.
    bytes       of the file.
    cancel      whether it is to stop: STOP, or FORGET where nothing of it is to stay.
    engine      address of the engine that it is at, if any, and `remote` what that one calls it.
    Times are in seconds since 1970.
    """

    number: int
    id: str
    model: str
    status: str
    fields: Mapping[str, Any]
    image: bool
    step: int
    steps: int
    attempts: int
    created_at: float
    started_at: float | None
    stepped_at: float | None
    completed_at: float | None
    expires_at: float | None
    error_code: str | None
    error: str | None
    seconds: float | None
    bytes: int | None
    media_type: str
    cancel: int
    idempotency_key: str | None
    digest: str | None
    first_stepped_at: float | None
    engine: str | None
    remote: str | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status in (COMPLETED, FAILED)

    @property
    def eta(self) -> float | None:
        """Seconds that its steps will still take, as long as those took that lie behind the first, with which a model is loaded
        and the prompt is encoded. None before the second, and once it has ended."""
        if self.ended or self.step < 2 or self.stepped_at is None or self.first_stepped_at is None:
            return None
        return (self.stepped_at - self.first_stepped_at) / (self.step - 1) * ((self.steps or 100) - self.step)
