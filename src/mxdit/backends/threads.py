"""How many threads the CPU kernels use: torch's number, or the cores' time that Linux' control groups grant."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import torch


def usable_threads() -> int:
    """How many threads an op uses at most. The quota is read once: that takes longer than a small product."""
    return min(torch.get_num_threads(), _limit())


@cache
def _limit() -> int:
    return core_quota() or sys.maxsize


def core_quota(root: Path = Path("/")) -> int | None:
    """The least quota of the process's control group and those above it, in cores, rounded up; None where there is none.

    Threads beyond it gain nothing: each uses up the time that all share, and then all stand still until the period ends.
    Version 2 has a quota in ``cpu.max``, version 1 in ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (Linux:
    Documentation/admin-guide/cgroup-v2.rst, Documentation/scheduler/sched-bwc.rst).

    Args:
        root: the file system that is asked.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return max(1, math.ceil(min(quotas))) if quotas else None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that may limit the process, from its own up. In a container the folder that its group has on the
    host is missing, and the topmost one is its own."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts = ["sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            mounts = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            yield from (root / mount / group for group in (inside, *inside.parents))


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None  # no such folder, or one without a quota
    return None if quota in ("max", "-1") else int(quota) / int(period)
