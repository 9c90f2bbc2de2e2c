"""What instructions the processor has, and the BLAS kernels that suit it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["openblas_core_type", "processor_flags"]


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


def openblas_core_type() -> str | None:
    """Return the OpenBLAS kernel family that suits this processor.

    The OpenBLAS of OneFlow 0.9.0 and that of NumPy 1.26 (0.3.23) take SSE kernels of 2004 for
    processors that are younger than they are: https://github.com/OpenMathLib/OpenBLAS/issues/4267.
    Naming a family that they know makes products several times as fast there
    (``benchmarks/core_type.py``). None where the processor has no AVX2, or where nobody can tell.
    """
    flags = processor_flags()
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= flags:
        return "Haswell"
    return None
