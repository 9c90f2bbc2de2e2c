"""Threads that do not hear Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["start_deaf_threads"]


def start_deaf_threads() -> None:
    """Have the threads of NumPy's BLAS start with Ctrl-C blocked, so that only we hear it.

    A signal goes to any thread that does not block it. While OneFlow is imported, none may hear
    this one: see `frameworks`.
    """
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import numpy  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
