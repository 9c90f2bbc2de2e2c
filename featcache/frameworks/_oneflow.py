"""OneFlow and flowvision: whether they work here, and importing them without their manners."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from ..errors import EngineUnavailableError
from ._launch import LAUNCH_VARIABLES
from ._process import (
    ctrl_c_later,
    last_words,
    process_environment,
    run_in_child,
    silenced_stderr,
)
from ._processor import openblas_core_type

__all__ = [
    "cuda_status",
    "import_flowvision",
    "import_oneflow",
    "oneflow_status",
]

# Its processes speak to each other by gRPC, which would ask a proxy for them.
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy", "GRPC_PROXY")
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
def import_oneflow(*, join: bool = False) -> ModuleType:
    """Import OneFlow and leave the process as it was.

    Parameters
    ----------
    join : bool
        Where a launcher started several processes: become one of theirs, which waits for all
        of them to import it. Otherwise OneFlow does not hear of the launcher.

    Raises
    ------
    EngineUnavailableError
        It is not installed, or its import fails; the message has the reason.
    """
    version, why = oneflow_status()
    if version is None:
        raise EngineUnavailableError(f"engine oneflow: not available: {why}")
    # Of several processes OneFlow aborts those that are left once one has ended, with a trace of
    # its C++ code. Whoever joins tells what happened: above the severest level, 3, it is silent.
    wanted = {"GLOG_minloglevel": "4" if join else "2"}
    core_type = openblas_core_type()
    if core_type:
        wanted["OPENBLAS_CORETYPE"] = core_type
    hidden = _PROXIES if join else LAUNCH_VARIABLES
    with (
        ctrl_c_later(),
        process_environment(wanted, (*LAUNCH_VARIABLES, "CUDA_MODULE_LOADING"), hidden),
        silenced_stderr() as complaints,
    ):
        try:
            import oneflow
        except Exception as error:
            said = complaints().strip().splitlines()
            raise EngineUnavailableError(
                f"engine oneflow: expected version {version} to import, found "
                f"{type(error).__name__}: {error}{' | ' + said[-1] if said else ''}; "
                "run featcache doctor"
            ) from error
    if join:
        _put_aborts_off()
    module: ModuleType = oneflow
    return module


def _put_aborts_off() -> None:
    """Leave this process some seconds to speak between OneFlow's decision to abort and its end.

    The signal goes to the thread that aborts, one of OneFlow's own. Its handler, C's ``sleep``,
    is given the signal's number, 6, for the seconds; once it returns, the process ends.
    """
    c = ctypes.CDLL(None)
    c.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


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
        with ctrl_c_later():
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
    child = run_in_child(_CUDA_TRIAL, timeout_s=_CUDA_TIMEOUT_S)
    if child is None:
        return False, f"{name}: OneFlow {version} did not answer within {_CUDA_TIMEOUT_S} s"
    if child.returncode == 0 and "sum 288.0" in child.stdout:
        return True, name
    if "no kernel image" in child.stderr:
        return False, (
            f"{name}: OneFlow {version} has no kernels for it (its wheel covers compute "
            "capability 6.0 to 8.9)"
        )
    return False, f"{name}: OneFlow {version} failed on it with {last_words(child)}"


def _gpu_name() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "NVIDIA GPU"
    return listed.strip().splitlines()[0] if listed.strip() else "NVIDIA GPU"
