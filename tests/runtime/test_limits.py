"""What containers and jobs allow, read from control groups of both versions."""

import os
from pathlib import Path

import pytest

from hardpatch.data.loader.loading import default_workers
from hardpatch.runtime import machine as limits

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Pretend that these control groups are there: own (as in /proc/self/cgroup), files by path."""
    real = limits._read

    def pretend(own, files, *, available=64 * GIB):
        root = tmp_path / "cgroup"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{content}\n")
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(limits, "GROUPS", root)
        monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")
        meminfo = f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n"
        monkeypatch.setattr(limits, "_read", lambda file: meminfo if file == Path("/proc/meminfo") else real(file))

    return pretend


V2_CONTAINER = {"cpu.max": "400000 100000", "memory.max": 8 * GIB, "memory.current": 6 * GIB,
                "memory.stat": f"anon 1\ninactive_file {2 * GIB}\nactive_file {GIB}"}  # fmt: skip


def test_a_container_of_version_2(groups):
    groups("0::/\n", V2_CONTAINER)
    assert limits.processor_quota() == 4
    assert limits.free_memory() == 5 * GIB  # files that were read are given back when memory is needed


def test_a_job_has_the_least_of_the_groups_around_it(groups):
    groups("0::/slurm/job_7/step_0\n", {
        "cpu.max": "max 100000", "memory.max": "max", "memory.current": 50 * GIB,
        "slurm/job_7/cpu.max": "250000 100000", "slurm/job_7/memory.max": 4 * GIB, "slurm/job_7/memory.current": GIB,
        "slurm/job_7/step_0/cpu.max": "max 100000", "slurm/job_7/step_0/memory.max": "max",
    })  # fmt: skip
    assert limits.processor_quota() == 2.5
    assert limits.free_memory() == 3 * GIB


def test_version_1(groups):
    groups("5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n", {
        "cpu,cpuacct/cpu.cfs_quota_us": 150000, "cpu,cpuacct/cpu.cfs_period_us": 100000,
        "memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": GIB,
        "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}",
    })  # fmt: skip
    assert limits.processor_quota() == 1.5
    assert limits.free_memory() == 1.5 * GIB


def test_version_1_without_limits(groups):
    groups("5:memory:/\n3:cpu:/\n", {
        "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000,
        "memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": GIB,
    })  # fmt: skip
    assert limits.processor_quota() is None
    assert limits.free_memory() == 64 * GIB


def test_no_groups_at_all(groups):
    groups("", {})
    assert limits.processor_quota() is None
    assert limits.free_memory() == 64 * GIB


def test_a_group_that_holds_more_than_it_may_has_nothing_left(groups):
    groups("0::/\n", {"memory.max": GIB, "memory.current": 2 * GIB})
    assert limits.free_memory() == 0


@pytest.mark.parametrize(("quota", "cores"), [(None, 16), (2.5, 3), (0.5, 1), (64, 16)])
def test_usable_cores(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(limits, "processor_quota", lambda: quota)
    assert limits.usable_cores() == cores


def test_data_processes_keep_to_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(limits, "processor_quota", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_workers() == 3


def test_this_machine():
    assert limits.usable_cores() >= 1
    assert 10**6 < limits.free_memory() < 10**14
