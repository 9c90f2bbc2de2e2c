"""OneFlow, OpenVINO and PyTorch: whether they work here, and their imports without side effects."""

from __future__ import annotations

import importlib
import io
import json
import logging
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import EngineUnavailableError
from .process import (
    LAUNCH_VARIABLES,
    ctrl_c_later,
    installed_version,
    last_words,
    openblas_core_type,
    process_environment,
    processor_flags,
    run_in_child,
    silenced_stderr,
)

INSTALL_ONEFLOW = "pip install 'featcache[oneflow]'"
_CUDA_TIMEOUT_S = 120

# Runs in a child: an operation that the GPU has no kernel for aborts the process.
_CUDA_TRIAL = """
import oneflow as flow
x = flow.ones(2, 3, 8, 8, device="cuda")
conv = flow.nn.Conv2d(3, 4, 3).to("cuda")
print("sum", float((conv(x) * 0 + 1).sum().numpy()))
"""


def oneflow_status() -> tuple[str | None, str]:
    """Return OneFlow's version, or None, and why, without importing it."""
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or sys.version_info >= (
        3,
        11,
    ):
        return None, (
            f"OneFlow 0.9.0 needs Python 3.10 on Linux x86_64, this is {here}; "
            "install featcache with Python 3.10 (in a clone: make setup)"
        )
    for package in ("oneflow", "nvidia-cudnn-cu11", "nvidia-cublas-cu11"):
        if installed_version(package) is None:
            return None, f"the package {package} is not installed; run {INSTALL_ONEFLOW}"
    return installed_version("oneflow"), here


def available(engine: str, status: tuple[str | None, str]) -> str:
    """Return an engine's version from its status, or raise EngineUnavailableError."""
    version, why = status
    if version is None:
        raise EngineUnavailableError(f"engine {engine}: not available: {why}")
    return version


def _imported(module: str, version: str, install: str) -> ModuleType:
    try:
        with ctrl_c_later():
            return importlib.import_module(module)
    except Exception as error:
        raise EngineUnavailableError(
            f"engine {module}: expected version {version} to import, found "
            f"{type(error).__name__}: {error}; run {install}"
        ) from error


@cache
def import_oneflow() -> ModuleType:
    """Import OneFlow and leave the process as it was."""
    version = available("oneflow", oneflow_status())
    variables = {"GLOG_minloglevel": "2"}
    core_type = openblas_core_type()
    if core_type:
        variables["OPENBLAS_CORETYPE"] = core_type
    changed = (*LAUNCH_VARIABLES, "CUDA_MODULE_LOADING")
    with (
        ctrl_c_later(),
        process_environment(variables, changed, LAUNCH_VARIABLES),
        silenced_stderr() as captured,
        warnings.catch_warnings(),
    ):
        # Its own source has invalid escapes, which compiling it warns about.
        warnings.simplefilter("ignore")
        try:
            import oneflow
        except Exception as error:
            messages = captured().strip().splitlines()
            raise EngineUnavailableError(
                f"engine oneflow: expected version {version} to import, found "
                f"{type(error).__name__}: {error}{' | ' + messages[-1] if messages else ''}; "
                "run featcache doctor"
            ) from error
    module: ModuleType = oneflow
    return module


@cache
def cuda_status() -> tuple[bool, str]:
    """Try OneFlow on the GPU in a child process: whether it works, and the GPU or the reason."""
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


INSTALL_OPENVINO = "pip install openvino"
_TELEMETRY = "openvino_telemetry"
_CAPABILITIES = {"bf16": "BF16", "f16": "FP16"}  # our name: OpenVINO's


def openvino_status() -> tuple[str | None, str]:
    """Return OpenVINO's version, or None, and why, without importing it."""
    version = installed_version("openvino")
    if version is None:
        return None, f"the package openvino is not installed; run {INSTALL_OPENVINO}"
    return version, f"version {version}"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Import OpenVINO's packages without their telemetry.

    What is None in sys.modules cannot be imported; they then take a stand-in that does nothing.
    Otherwise an import sends an event and writes a file into the home folder.
    """
    keep_out = _TELEMETRY not in sys.modules
    if keep_out:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if keep_out:
            del sys.modules[_TELEMETRY]


@cache
def import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry."""
    version = available("openvino", openvino_status())
    with _without_telemetry():
        return _imported("openvino", version, INSTALL_OPENVINO)


@cache
def openvino_core() -> Any:
    """Return the OpenVINO core of this process: one, for ever.

    On processors with AMX each core gives the main thread a stack for signals and, when it goes,
    puts back the one that it found. Of two cores that went in the order in which they came, a stack
    stayed that was freed: the next Ctrl-C ended the process.
    """
    return import_openvino().Core()


@cache
def openvino_precisions() -> tuple[str, ...]:
    """Return the precisions that OpenVINO runs natively on this processor, ``"f32"`` first."""
    capabilities = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", *(ours for ours, its in _CAPABILITIES.items() if its in capabilities))


INSTALL_INT8 = "pip install 'featcache[int8]'"


def nncf_status() -> tuple[str | None, str]:
    """Return the version of nncf, which makes graphs of INT8, or None, and why."""
    version = installed_version("nncf")
    if version is None:
        return None, f"the package nncf is not installed; run {INSTALL_INT8}"
    return version, f"version {version}"


@cache
def import_nncf() -> ModuleType:
    """Import nncf without its telemetry, and quietly."""
    import_openvino()
    with _without_telemetry(), redirect_stdout(io.StringIO()):
        nncf = _imported("nncf", nncf_status()[0] or "", INSTALL_INT8)
    nncf.set_log_level(logging.ERROR)
    return nncf


INSTALL_TORCH = "pip install 'featcache[torch]'"
_OLDEST = (2, 4)
_TRIAL_TIMEOUT_S = 120
# One of these is there where a driver is: NVIDIA's, on Jetson, in WSL, AMD's.
_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")

# Runs in a child: a driver that does not fit its GPU may end the process, and a context on a GPU
# takes hundreds of MB that a process may never give back.
_TRIAL = """
import json, torch
found = {"build": "CUDA " + torch.version.cuda if torch.version.cuda else
         "ROCm " + torch.version.hip if torch.version.hip else "no CUDA and no ROCm",
         "device": None, "gpus": [], "precisions": [], "problem": ""}
capable = True
if torch.cuda.is_available():
    found["device"] = "cuda"
    for index in range(torch.cuda.device_count()):
        capability = "%d.%d" % torch.cuda.get_device_capability(index)
        found["gpus"].append(torch.cuda.get_device_name(index) + ", " + capability)
    # Before Ampere, CUDA computes bfloat16 by way of float32.
    capable = bool(torch.version.hip) or torch.cuda.get_device_capability() >= (8, 0)
elif torch.backends.mps.is_available():
    found["device"], found["gpus"] = "mps", ["Apple's GPU"]
elif torch.version.cuda or torch.version.hip:
    try:
        torch.cuda.init()
    except Exception as error:
        found["problem"] = str(error).strip().splitlines()[0]
if found["device"]:
    for name, dtype in ("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16):
        try:
            x = torch.ones(2, 3, 8, 8, device=found["device"], dtype=dtype)
            y = torch.nn.functional.conv2d(x, torch.ones_like(x)[:, :, :3, :3])
            if y.sum().item() == 2 * 2 * 36 * 27 and (name != "bf16" or capable):
                found["precisions"].append(name)
        except Exception as error:
            found["problem"] = found["problem"] or str(error).strip().splitlines()[0]
print("found", json.dumps(found))
"""


def torch_status() -> tuple[str | None, str]:
    """Return PyTorch's version, or None, and why, without importing it."""
    version = installed_version("torch")
    if version is None:
        return None, f"the package torch is not installed; run {INSTALL_TORCH}"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return None, f"expected torch {oldest} or newer, found {version}; run {INSTALL_TORCH}"
    return version, f"version {version}"


@cache
def import_torch() -> ModuleType:
    """Import PyTorch."""
    return _imported("torch", available("torch", torch_status()), INSTALL_TORCH)


def may_have_gpu() -> bool:
    """Return whether a GPU driver is installed; costs nothing."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    return any(Path(driver).exists() for driver in _DRIVERS)


def torch_gpu_status() -> tuple[str | None, str]:
    """Try PyTorch on the GPU in a child process: "cuda", "mps" or None, and GPUs or reason."""
    version, why = torch_status()
    if version is None:
        return None, why
    if not may_have_gpu():
        return None, "no GPU driver on this machine"
    trial = _torch_trial()
    gpus = "; ".join(trial["gpus"])
    if trial["precisions"]:
        return trial["device"], gpus
    problem = trial["problem"] or "it sees no GPU"
    return None, f"{gpus + ': ' if gpus else ''}torch {version} ({trial['build']}): {problem}"


def torch_precisions(device: str) -> tuple[str, ...]:
    """Return the precisions that PyTorch computes natively in on a device, ``"f32"`` first."""
    if device != "cpu":
        return tuple(_torch_trial()["precisions"])
    flags = processor_flags()
    return ("f32", "bf16") if {"avx512_bf16", "amx_bf16"} & flags else ("f32",)


@cache
def _torch_trial() -> dict[str, Any]:
    child = run_in_child(_TRIAL, timeout_s=_TRIAL_TIMEOUT_S)
    nothing: dict[str, Any] = {"build": "no build", "device": None, "gpus": [], "precisions": []}
    if child is None:
        return {**nothing, "problem": f"no answer within {_TRIAL_TIMEOUT_S} s"}
    _, mark, answer = child.stdout.rpartition("found ")
    if child.returncode or not mark:
        return {**nothing, "problem": f"it failed with {last_words(child)}"}
    trial: dict[str, Any] = json.loads(answer)
    return trial
