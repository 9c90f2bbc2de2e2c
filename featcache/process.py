"""Keeping a process as it was while a framework is imported, or using another for that."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar


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
            # Under torchrun, OneFlow would wait in the child for the other processes.
            env={name: os.environ[name] for name in os.environ if name not in LAUNCH_VARIABLES},
        )
    except subprocess.TimeoutExpired:
        return None


def last_words(child: subprocess.CompletedProcess[str]) -> str:
    """Return the exit code and the last line of what a child complained of."""
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit code {child.returncode}: {last}"


# What torchrun tells its processes. OneFlow reads these too, and would wait for the others.
LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def torchrun_rank() -> int | None:
    """Return this process's rank if torchrun started it together with others; else None."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or not (rank.isdecimal() and size.isdecimal()):
        return None
    return int(rank) if int(rank) < int(size) > 1 else None


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


T = TypeVar("T")
R = TypeVar("R")
Stop = threading.Event


def work_ahead(
    function: Callable[[T, Stop], R], items: Iterable[T], *, workers: int, ahead: int
) -> Generator[R, None, None]:
    """Yield ``function(item, stop)`` of every item, in order, computed ahead by threads.

    Close the iterator when leaving early (``contextlib.closing``): that ends the threads,
    and waits until they have ended. An error, Ctrl-C or the last result does the same.

    Parameters
    ----------
    function : callable
        Runs in a thread. ``stop`` is set once nobody waits for results any more: work of
        several steps looks at it between two of them and then returns whatever it likes.
    items : iterable
        Read in the caller's thread, ``ahead`` items beyond the result that is waited for.
    workers : int
        Threads, at least 1.
    ahead : int
        Results that may be ready or under way while the caller is busy, at least 1: the
        bound on memory, however slow the caller is.

    Raises
    ------
    Exception
        What ``function`` raised, in the place of its result.
    """
    stop = Stop()
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featcache")
    try:
        for item in items:
            pending.append(pool.submit(function, item, stop))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
