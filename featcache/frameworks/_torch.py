"""PyTorch: whether it is here, what it can use of this machine, and importing it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import EngineUnavailableError
from ._process import ctrl_c_later, last_words, run_in_child
from ._processor import processor_flags

__all__ = ["import_torch", "may_have_gpu", "torch_gpu_status", "torch_precisions", "torch_status"]

_INSTALL = "pip install 'featcache[torch]'"
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
    """Say, without importing it, whether PyTorch is installed.

    Returns
    -------
    version : str or None
        The installed version; None where there is none, or one that is too old.
    why : str
        The reason and what to do, for a person.
    """
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None, f"the package torch is not installed; run {_INSTALL}"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return None, f"expected torch {oldest} or newer, found {version}; run {_INSTALL}"
    return version, f"version {version}"


@cache
def import_torch() -> ModuleType:
    """Import PyTorch.

    Raises
    ------
    EngineUnavailableError
        It is not installed, or its import fails; the message has the reason.
    """
    version, why = torch_status()
    if version is None:
        raise EngineUnavailableError(f"engine torch: not available: {why}")
    try:
        with ctrl_c_later():
            import torch
    except Exception as error:
        raise EngineUnavailableError(
            f"engine torch: expected version {version} to import, found "
            f"{type(error).__name__}: {error}; run {_INSTALL}"
        ) from error
    module: ModuleType = torch
    return module


def may_have_gpu() -> bool:
    """Say, at no cost, whether a driver is there, so that to look for a GPU may be worth it."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    return any(Path(driver).exists() for driver in _DRIVERS)


def torch_gpu_status() -> tuple[str | None, str]:
    """Try PyTorch on the GPU in a child process.

    Returns
    -------
    device : str or None
        ``"cuda"`` (NVIDIA's, and AMD's by ROCm), ``"mps"`` (Apple's), or None where a
        convolution ran on neither.
    why : str
        The GPUs with their compute capability, or why none can be used.
    """
    version, why = torch_status()
    if version is None:
        return None, why
    if not may_have_gpu():
        return None, "no GPU driver on this machine"
    found = _found()
    gpus = "; ".join(found["gpus"])
    if found["precisions"]:
        return found["device"], gpus
    problem = found["problem"] or "it sees no GPU"
    return None, f"{gpus + ': ' if gpus else ''}torch {version} ({found['build']}): {problem}"


def torch_precisions(device: str) -> tuple[str, ...]:
    """Return the precisions that PyTorch computes natively in on a device, ``"f32"`` first.

    Parameters
    ----------
    device : str
        ``"cpu"``, or what `torch_gpu_status` found.
    """
    if device != "cpu":
        return tuple(_found()["precisions"])
    flags = processor_flags()
    return ("f32", "bf16") if {"avx512_bf16", "amx_bf16"} & flags else ("f32",)


@cache
def _found() -> dict[str, Any]:
    child = run_in_child(_TRIAL, timeout_s=_TRIAL_TIMEOUT_S)
    nothing: dict[str, Any] = {"build": "no build", "device": None, "gpus": [], "precisions": []}
    if child is None:
        return {**nothing, "problem": f"no answer within {_TRIAL_TIMEOUT_S} s"}
    _, said, found = child.stdout.rpartition("found ")
    if child.returncode or not said:
        return {**nothing, "problem": f"it failed with {last_words(child)}"}
    answer: dict[str, Any] = json.loads(found)
    return answer
