"""What instructions the processor has."""

from __future__ import annotations

from pathlib import Path

__all__ = ["processor_flags"]


def processor_flags() -> frozenset[str]:
    """Return the processor's features by Linux's names; none where nobody can tell."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
