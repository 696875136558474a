"""What the service may use of this machine or container, and which addresses are this machine's alone."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def physical_memory() -> int:
    """Bytes of RAM."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int((_CGROUPS / name).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return memory


def available_cpus() -> int:
    """Whole cores that this process may use, by its affinity and its container's quota; at least 1."""
    cpus = len(os.sched_getaffinity(0))
    for quota, period in (_quota_v2(), _quota_v1()):
        if quota > 0 and period > 0:
            cpus = min(cpus, quota // period)
    return max(1, cpus)


def default_workers() -> int:
    """One for each core; where torchrun has started several ranks here, a rank's part of them.

    An embedded service inherits ``LOCAL_WORLD_SIZE`` from its rank, and every rank has one of its own.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, available_cpus() // max(1, int(ranks) if ranks.isdecimal() else 1))


def _quota_v2() -> tuple[int, int]:
    """Microseconds of CPU time, and of the period in which they may be spent; (0, 0) without a limit."""
    try:
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
        return int(quota), int(period)
    except (OSError, ValueError):  # no such controller, or "max"
        return 0, 0


def _quota_v1() -> tuple[int, int]:
    try:
        quota, period = (
            int((_CGROUPS / "cpu" / name).read_text()) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return quota, period  # -1 is no limit
    except (OSError, ValueError):
        return 0, 0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on that address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
