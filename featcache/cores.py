"""How many processor cores this process may keep busy.

In a container or on a shared node the affinity mask and the control group's quota allow fewer
cores than the machine has; a thread for each of its cores would only slow the others down.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .errors import RecipeError

THREADS_VARIABLE = "FEATCACHE_THREADS"

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of threads that engines and decoders may use together.

    The least of the cores in the affinity mask, the control group's quota (rounded up) and the
    machine's count; the environment variable ``FEATCACHE_THREADS`` overrides all three.
    """
    wish = os.environ.get(THREADS_VARIABLE, "").strip()
    if wish:
        if not (wish.isascii() and wish.isdigit() and int(wish) >= 1):
            raise RecipeError(
                f"{THREADS_VARIABLE}: expected a whole number from 1, found {wish!r}; "
                f"unset it, or try {THREADS_VARIABLE}=2"
            )
        return int(wish)
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # Linux alone
        counts.append(len(os.sched_getaffinity(0)))
    quota = quota_cores()
    if quota is not None:
        counts.append(math.ceil(quota))
    return max(1, min(counts))


@cache  # a dozen files, for every array that is read
def quota_cores(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> float | None:
    """Return the processor time that the control groups grant, in cores.

    Version 2 writes ``cpu.max`` ("150000 100000"), version 1 ``cpu.cfs_quota_us`` and
    ``cpu.cfs_period_us``: https://docs.kernel.org/admin-guide/cgroup-v2.html and
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    quotas = [
        quota
        for folder in _group_folders(membership, mount)
        for quota in (_quota_v2(folder), _quota_v1(folder))
        if quota is not None
    ]
    return min(quotas, default=None)


def _group_folders(membership: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of the process's groups, each followed by those around it.

    A container often sees its own group as the mount itself while the kernel's list names it by
    the host's path; folders that are not there are skipped by the readers.
    """
    for line in (_read(membership) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2 has one hierarchy and names no controller
            roots = [mount]
        elif "cpu" in controllers.split(","):
            roots = [mount / "cpu", mount / controllers]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth])


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = (_read(folder / "cpu.max") or "").strip().partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    quota = (_read(folder / "cpu.cfs_quota_us") or "").strip()
    return _ratio(quota, (_read(folder / "cpu.cfs_period_us") or "").strip())


def _ratio(quota: str, period: str) -> float | None:
    """Return quota / period; no limit is written ``max`` in version 2 and -1 in version 1."""
    if not (quota.isdigit() and period.isdigit() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
