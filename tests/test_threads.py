"""The quota of control groups, as both versions of Linux' interface write it, and the kernels' threads under it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxdit.backends import threads
from mxdit.backends.threads import core_quota

GROUPS = {
    "version 2": ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
    "the least above": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000", "cpu.max": "400000 100000"}, 1),
    "less than a core": ("0::/a", {"a/cpu.max": "5000 100000"}, 1),
    "no limit": ("0::/a", {"a/cpu.max": "max 100000"}, None),
    "a container": ("0::/../docker/x", {"cpu.max": "300000 100000"}, 3),
    "version 1": ("4:cpu,cpuacct:/a\n0::/", {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 3),
    "version 1 without a limit": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "another controller": ("3:memory:/a", {"memory/a/cpu.max": "100000 100000"}, None),
}  # fmt: skip


@pytest.mark.parametrize("groups, files, expected", GROUPS.values(), ids=GROUPS.keys())
def test_the_least_quota_counts(tmp_path: Path, groups: str, files: dict[str, str], expected: int | None):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert core_quota(tmp_path) == expected


def test_where_there_are_no_control_groups_there_is_no_quota(tmp_path: Path):
    assert core_quota(tmp_path) is None


def test_kernels_use_no_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for quota, expected in ((None, 3), (2, 2), (5, 3)):
            monkeypatch.setattr(threads, "core_quota", lambda quota=quota: quota)
            threads._limit.cache_clear()
            assert threads.usable_threads() == expected
    finally:
        torch.set_num_threads(before)
        threads._limit.cache_clear()
