"""Keeping a process as it was while a framework is imported, or using another for that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ._launch import LAUNCH_VARIABLES

__all__ = [
    "ctrl_c_later",
    "deaf_threads",
    "last_words",
    "process_environment",
    "run_in_child",
    "silenced_stderr",
]


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Keep Ctrl-C waiting until an import is over, and its handler as it was.

    Inside OneFlow's import an exception surfaces in C++ code, as an import error or as a
    crash, and OneFlow sets a handler of its own that ends the process. So the signal is
    blocked for this thread, only noted where another thread takes it, and raised at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread hears of signals, or may set their handlers
        return
    heard = []
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else set()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if heard:
            raise KeyboardInterrupt


@contextmanager
def deaf_threads() -> Iterator[None]:
    """Have threads that begin here not hear Ctrl-C, so that only we do.

    A signal goes to any thread that does not block it. While OneFlow is imported, none may hear
    this one.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def process_environment(
    wanted: Mapping[str, str], fleeting: tuple[str, ...] = (), hidden: tuple[str, ...] = ()
) -> Iterator[None]:
    """Set variables for a while, and leave all as it was.

    Parameters
    ----------
    wanted : mapping of str to str
        Set where they are not.
    fleeting : tuple of str
        Put back too, whatever happens to them meanwhile.
    hidden : tuple of str
        Not there meanwhile.
    """
    before = {name: os.environ.get(name) for name in (*wanted, *fleeting, *hidden)}
    for name in hidden:
        os.environ.pop(name, None)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, value_before in before.items():
            if value_before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value_before


@contextmanager
def silenced_stderr() -> Iterator[Any]:
    """Catch what C++ code writes to file descriptor 2; yield a reader for it."""
    import tempfile

    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)

        def complaints() -> str:
            caught.seek(0)
            return caught.read().decode("utf-8", "replace")

        try:
            yield complaints
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def run_in_child(
    code: str, *arguments: str, timeout_s: float
) -> subprocess.CompletedProcess[str] | None:
    """Run Python code that may abort the process in one of its own.

    Returns
    -------
    subprocess.CompletedProcess or None
        With what it printed as text; None where it did not end in time.
    """
    try:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            # Where a launcher started us, OneFlow would wait in the child for the other processes.
            env={name: os.environ[name] for name in os.environ if name not in LAUNCH_VARIABLES},
        )
    except subprocess.TimeoutExpired:
        return None


def last_words(child: subprocess.CompletedProcess[str]) -> str:
    """Return the exit code and the last line of what a child complained of."""
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit code {child.returncode}: {last}"
