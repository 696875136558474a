"""Memory and cores of containers, by their cgroups of either version."""

from __future__ import annotations

import os

import pytest

from preconditioner_service import machine


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes what a container's kernel shows; the host has 8 cores."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    return write


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("1600000 100000", 8),
    ],
)
def test_the_quota_of_cgroups_version_2(cgroups, quota, cpus):
    cgroups({"cpu.max": quota})
    assert machine.available_cpus() == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("300000", 3), ("10000", 1), ("-1", 8)])
def test_the_quota_of_cgroups_version_1(cgroups, quota, cpus):
    cgroups({"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"})
    assert machine.available_cpus() == cpus


def test_without_cgroups_the_affinity_holds(cgroups):
    assert machine.available_cpus() == 8
    assert machine.physical_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("ranks", "workers"), [("2", 3), ("4", 1), ("64", 1), ("", 7), ("0", 7), ("two", 7)])
def test_ranks_of_one_machine_share_its_cores(cgroups, monkeypatch, ranks, workers):
    cgroups({"cpu.max": "700000 100000"})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine.default_workers() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert machine.default_workers() == workers


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_of_a_container(cgroups, name):
    cgroups({name: "1000000"})
    assert machine.physical_memory() == 1_000_000
    cgroups({name: "max"})
    assert machine.physical_memory() > 1_000_000
