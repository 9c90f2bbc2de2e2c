"""Ctrl-C between two steps, where the state of a run is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ctrl_c_noted"]


@contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it in the middle of an update.

    Yields
    ------
    callable
        Tells whether Ctrl-C was pressed. The second one is raised at once.
    """
    heard: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals, and their handlers, are the main thread's alone
        return

    def note(*_: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
