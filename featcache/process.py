"""Signals, threads and environment of this process, and trials in a child process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Delay Ctrl-C until an import is over, and restore its handler.

    Inside OneFlow's import an exception surfaces in C++ code, as an import error or as a crash,
    and OneFlow sets a handler of its own that ends the process. So this thread blocks the signal,
    another thread that receives it only notes it, and it is raised at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals and may set their handlers
        return
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else set()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if interrupts:
            raise KeyboardInterrupt


_BOUNCE_S = 0.5
_ctrl_c_at: list[float] = []  # times


def take_one_ctrl_c() -> None:
    """From here on, several Ctrl-C at once are one: the others would interrupt its answer."""

    def handler(*_: object) -> None:
        now = time.monotonic()
        if not _ctrl_c_at or now - _ctrl_c_at[-1] >= _BOUNCE_S:
            _ctrl_c_at.append(now)
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)


def had_ctrl_c() -> bool:
    """Tell whether there was a Ctrl-C: C++ code may have made another exception of it."""
    return bool(_ctrl_c_at)


def ignore_ctrl_c() -> None:
    """Ignore Ctrl-C from here on, in a process that is about to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def new_threads_ignore_ctrl_c() -> Iterator[None]:
    """Block Ctrl-C in threads that start here, so that only the main thread receives it.

    A signal goes to any thread that does not block it, also while OneFlow is imported.
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
    defaults: Mapping[str, str], restored: tuple[str, ...] = (), hidden: tuple[str, ...] = ()
) -> Iterator[None]:
    """Set variables that are not set and hide others; restore all, ``restored`` too, at the end."""
    before = {name: os.environ.get(name) for name in (*defaults, *restored, *hidden)}
    for name in hidden:
        os.environ.pop(name, None)
    for name, value in defaults.items():
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
    """Capture what C++ code writes to file descriptor 2; yield a function that returns it."""
    import tempfile

    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)

        def captured() -> str:
            caught.seek(0)
            return caught.read().decode("utf-8", "replace")

        try:
            yield captured
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def run_in_child(
    code: str, *arguments: str, timeout_s: float
) -> subprocess.CompletedProcess[str] | None:
    """Run Python code that may abort its process in a child; None where it takes too long."""
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


def last_line(child: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a child's standard error, or its exit code where there is none."""
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {child.returncode}"


def last_words(child: subprocess.CompletedProcess[str]) -> str:
    """Return the exit code of a child and the last line of its standard error."""
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit code {child.returncode}: {last}"


# Address space that commands were measured to need on two cores (libraries are mapped whole, and
# each thread has buffers); below it NumPy hangs, PyTorch does not load and OpenVINO aborts.
_NEEDED_BYTES, _ENGINE_BYTES, _CORE_BYTES = 1 << 30, 2_000_000_000, 1 << 26
_ENGINE_COMMANDS = ("extract", "finetune", "fit", "predict", "serve")
_NO_MEMORY = re.compile(
    r"out of memory|bad_alloc|(failed|unable) to allocate|cannot allocate memory|start new thread"
    r"|failed to map segment",
    re.IGNORECASE,
)


def memory_problem(command: str) -> str:
    """Return why a command cannot run under the limit of ``ulimit -v``; empty where it can."""
    try:
        import resource
    except ImportError:  # not on Windows
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = _ENGINE_BYTES if command in _ENGINE_COMMANDS else _NEEDED_BYTES
    needed += max(0, (os.cpu_count() or 1) - 2) * _CORE_BYTES
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return ""
    return (
        f"memory: expected at least {needed / 1e9:.1f} GB of address space for {command}, found a "
        f"limit of {limit / 1e9:.1f} GB; raise it: ulimit -v {-(-needed // 1024)}"
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of any library says that memory ran out."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


# What torchrun tells its processes. OneFlow reads these too, and would wait for the others.
LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def torchrun_rank() -> int | None:
    """Return this process's rank if torchrun started it together with others; else None."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or not (rank.isdecimal() and size.isdecimal()):
        return None
    return int(rank) if int(rank) < int(size) > 1 else None


def processor_flags() -> frozenset[str]:
    """Return the processor's features by Linux's names; empty where it is unknown."""
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
    processors that are younger than they are:
    https://github.com/OpenMathLib/OpenBLAS/issues/4267. Naming a family that they know makes
    products several times as fast there (``benchmarks/core_type.py``). None where the processor
    has no AVX2, or is unknown.
    """
    flags = processor_flags()
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= flags:
        return "Haswell"
    return None


def import_numpy() -> None:
    """Import NumPy, unless that is done.

    The threads of its BLAS block Ctrl-C, and NumPy 1's BLAS gets the name of its kernels.
    """
    if "numpy" in sys.modules:
        return
    core_type = openblas_core_type() if old_openblas() else None
    variables = {"OPENBLAS_CORETYPE": core_type} if core_type else {}
    with new_threads_ignore_ctrl_c(), process_environment(variables):
        import numpy  # noqa: F401


def installed_version(package: str) -> str | None:
    """Return the version of an installed package without importing it; None where there is none."""
    from importlib import metadata  # takes as long to import as NumPy

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def old_openblas() -> bool:
    """Return whether the installed NumPy's OpenBLAS is older than many processors."""
    found = find_spec("numpy")  # `importlib.metadata` would take as long as NumPy itself
    if found is None or found.origin is None:
        return False
    try:
        text = Path(found.origin).with_name("version.py").read_text("utf-8", "replace")
    except OSError:  # not installed as files
        return False
    return re.search(r"""^version = ["']1\.""", text, re.MULTILINE) is not None


T = TypeVar("T")
R = TypeVar("R")
Stop = threading.Event


def work_ahead(
    function: Callable[[T, Stop], R], items: Iterable[T], *, workers: int, ahead: int
) -> Generator[R, None, None]:
    """Yield ``function(item, stop)`` of every item, in order, computed ahead by threads.

    Close the iterator when leaving early (``contextlib.closing``): that ends the threads, and
    waits until they have ended. An error, Ctrl-C or the last result does the same.
    """
    from concurrent.futures import ThreadPoolExecutor  # a tenth of the time of a help page

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
