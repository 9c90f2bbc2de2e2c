"""Ctrl-C between two steps, where the state of a run is whole."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ctrl_c_noted"]

# A launcher passes Ctrl-C on as a signal of its own, to processes that a terminal told as well.
_ECHO_S = 2.0


@contextmanager
def ctrl_c_noted(*, launched: bool = False) -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it in the middle of an update.

    Parameters
    ----------
    launched : bool
        A launcher started this process: SIGTERM counts too, and what comes within two seconds
        counts once.

    Yields
    ------
    callable
        Tells whether Ctrl-C was pressed. The second one is raised at once.
    """
    heard: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals, and their handlers, are the main thread's alone
        return

    def note(*_: Any) -> None:
        now = time.monotonic()
        if heard and not (launched and now - heard[0] < _ECHO_S):
            raise KeyboardInterrupt
        heard.append(now)

    signals = (signal.SIGINT, signal.SIGTERM) if launched else (signal.SIGINT,)
    before = {one: signal.signal(one, note) for one in signals}
    try:
        yield lambda: bool(heard)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler or signal.default_int_handler)
