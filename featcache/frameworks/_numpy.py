"""NumPy, with the kernels that suit this processor, and threads that do not hear Ctrl-C."""

from __future__ import annotations

import importlib.metadata
import sys

from ._process import deaf_threads, process_environment
from ._processor import openblas_core_type

__all__ = ["import_numpy", "old_openblas"]


def import_numpy() -> None:
    """Import NumPy, unless somebody did.

    The threads of its BLAS do not hear Ctrl-C, and NumPy 1's is told which kernels to use.
    """
    if "numpy" in sys.modules:
        return
    core_type = openblas_core_type() if old_openblas() else None
    wanted = {"OPENBLAS_CORETYPE": core_type} if core_type else {}
    with deaf_threads(), process_environment(wanted):
        import numpy  # noqa: F401


def old_openblas() -> bool:
    """Return whether the installed NumPy's OpenBLAS is older than many processors."""
    try:
        return importlib.metadata.version("numpy").startswith("1.")
    except importlib.metadata.PackageNotFoundError:  # somebody else put it there
        return False
