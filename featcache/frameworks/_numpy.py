"""NumPy, with the kernels that suit this processor, and threads that do not hear Ctrl-C."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
import threading

from ._process import process_environment
from ._processor import openblas_core_type

__all__ = ["import_numpy", "old_openblas"]


def import_numpy() -> None:
    """Import NumPy, unless somebody did.

    Its BLAS starts with Ctrl-C blocked, so that only we hear it: a signal goes to any thread that
    does not block it, and while OneFlow is imported, none may hear this one. NumPy 1's is told
    which kernels to use.
    """
    if "numpy" in sys.modules:
        return
    core_type = openblas_core_type() if old_openblas() else None
    on_main = threading.current_thread() is threading.main_thread()
    may_block = on_main and hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if may_block else set()
    try:
        with process_environment({"OPENBLAS_CORETYPE": core_type} if core_type else {}):
            import numpy  # noqa: F401
    finally:
        if may_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def old_openblas() -> bool:
    """Return whether the installed NumPy's OpenBLAS is older than many processors."""
    try:
        return importlib.metadata.version("numpy").startswith("1.")
    except importlib.metadata.PackageNotFoundError:  # somebody else put it there
        return False
