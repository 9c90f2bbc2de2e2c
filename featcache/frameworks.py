"""The one place that imports OneFlow and flowvision, and that knows what they can do here.

OneFlow 0.9.0 changes the process that imports it: it takes over Ctrl-C with a
plain C ``exit``, writes five variables of distributed training into the
environment, prints to the raw standard error, and falls back to 2004's BLAS
kernels on processors its OpenBLAS does not know. `import_oneflow` undoes all of
that. What could abort the process (a GPU without kernels, a missing driver) is
tried in a child process first, by `cuda_status`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import EngineUnavailableError

__all__ = [
    "cuda_status",
    "import_flowvision",
    "import_oneflow",
    "oneflow_status",
    "openblas_core_type",
]

_DISTRIBUTED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
_CUDA_TIMEOUT_S = 120

# Runs in a child: an operation that the GPU has no kernel for aborts the process.
_CUDA_TRIAL = """
import oneflow as flow
x = flow.ones(2, 3, 8, 8, device="cuda")
conv = flow.nn.Conv2d(3, 4, 3).to("cuda")
print("sum", float((conv(x) * 0 + 1).sum().numpy()))
"""


def oneflow_status() -> tuple[str | None, str]:
    """Say, without importing it, whether OneFlow can be expected to work here.

    Returns
    -------
    version : str or None
        The installed version; None where OneFlow cannot be used.
    why : str
        The reason and what to do, for a person.
    """
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or sys.version_info >= (
        3,
        11,
    ):
        return None, (
            f"OneFlow 0.9.0 needs Python 3.10 on Linux x86_64, this is {here}; "
            "install featcache with Python 3.10 (in a clone: make setup)"
        )
    for package in ("oneflow", "flowvision", "nvidia-cudnn-cu11", "nvidia-cublas-cu11"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None, f"the package {package} is not installed; run pip install featcache"
    return importlib.metadata.version("oneflow"), here


@cache
def import_oneflow() -> ModuleType:
    """Import OneFlow and leave the process as it was.

    Raises
    ------
    EngineUnavailableError
        It is not installed, or its import fails; the message has the reason.
    """
    version, why = oneflow_status()
    if version is None:
        raise EngineUnavailableError(f"engine oneflow: not available: {why}")
    with _ctrl_c_later(), _process_environment(), _silenced_stderr() as complaints:
        try:
            import oneflow
        except Exception as error:
            said = complaints().strip().splitlines()
            raise EngineUnavailableError(
                f"engine oneflow: expected version {version} to import, found "
                f"{type(error).__name__}: {error}{' | ' + said[-1] if said else ''}; "
                "run featcache doctor"
            ) from error
    module: ModuleType = oneflow
    return module


@cache
def import_flowvision() -> ModuleType:
    """Import flowvision with its ``models`` and ``datasets``, after OneFlow.

    Raises
    ------
    EngineUnavailableError
        OneFlow or flowvision cannot be imported here.
    """
    import_oneflow()
    try:
        with _ctrl_c_later():
            import flowvision
            import flowvision.datasets
            import flowvision.models
    except Exception as error:
        raise EngineUnavailableError(
            f"flowvision: expected version 0.2.1 to import, found {type(error).__name__}: {error}; "
            "run pip install flowvision==0.2.1"
        ) from error
    module: ModuleType = flowvision
    return module


@cache
def cuda_status() -> tuple[bool, str]:
    """Try OneFlow on the GPU in a child process.

    Returns
    -------
    usable : bool
        A convolution ran on the GPU.
    why : str
        The GPU's name, or why it cannot be used.
    """
    version, why = oneflow_status()
    if version is None:
        return False, why
    if not Path("/dev/nvidiactl").exists():
        return False, "no NVIDIA driver on this machine (/dev/nvidiactl does not exist)"
    name = _gpu_name()
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CUDA_TRIAL],
            capture_output=True,
            text=True,
            timeout=_CUDA_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return False, f"{name}: OneFlow {version} did not answer within {_CUDA_TIMEOUT_S} s"
    if child.returncode == 0 and "sum 288.0" in child.stdout:
        return True, name
    if "no kernel image" in child.stderr:
        return False, (
            f"{name}: OneFlow {version} has no kernels for it (its wheel covers compute "
            "capability 6.0 to 8.9)"
        )
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return (
        False,
        f"{name}: OneFlow {version} failed on it with exit code {child.returncode}: {last}",
    )


def openblas_core_type() -> str | None:
    """Return the OpenBLAS kernel family that suits this processor.

    OneFlow's OpenBLAS predates recent processors and takes SSE kernels for
    them; naming a family that it knows makes the forward pass about half as
    fast again (``benchmarks/core_type.py``). None where the processor has no
    AVX2, or where nobody can tell.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "SkylakeX"
    if {"avx2", "fma"} <= flags:
        return "Haswell"
    return None


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
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
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if heard:
            raise KeyboardInterrupt


@contextmanager
def _process_environment() -> Iterator[None]:
    """Set what OneFlow reads while it loads; take away what it leaves behind."""
    wanted = {"GLOG_minloglevel": "2"}
    core_type = openblas_core_type()
    if core_type:
        wanted["OPENBLAS_CORETYPE"] = core_type
    before: dict[str, str | None] = {
        name: os.environ.get(name) for name in (*wanted, *_DISTRIBUTED)
    }
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
def _silenced_stderr() -> Iterator[Any]:
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


def _gpu_name() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "NVIDIA GPU"
    return listed.strip().splitlines()[0] if listed.strip() else "NVIDIA GPU"
