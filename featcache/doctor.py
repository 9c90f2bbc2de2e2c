"""What this machine can do for featcache, and why it cannot do the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .frameworks import cuda_status, oneflow_status, openblas_core_type

__all__ = ["Finding", "examine"]

_PACKAGES = ("numpy", "h5py", "scikit-learn", "pillow", "safetensors", "flowvision", "oneflow")
_IMPORT_TIMEOUT_S = 120
_NETWORK_TIMEOUT_S = 5

# In a child, because an import that fails can end the process.
_IMPORT_TRIAL = """
from featcache.frameworks import import_flowvision, import_oneflow
flow, _ = import_oneflow(), import_flowvision()
print("sum", float(flow.ones(2, 3).sum().numpy()))
"""


@dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Parameters
    ----------
    topic : str
        ``"oneflow"``, ``"gpu"``, ``"blas"``, ``"network"`` …
    usable : bool
        Whether featcache can use it.
    detail : str
        What was found; where it cannot be used, why, and what to do.
    """

    topic: str
    usable: bool
    detail: str


def examine(*, urls: Sequence[str] | None = None) -> list[Finding]:
    """Look at Python, packages, OneFlow, GPU, BLAS and network.

    Parameters
    ----------
    urls : sequence of str, optional
        What to reach for on the network; by default the sources of the
        ``imagenet`` weights and of CIFAR-10. Empty: the network is left alone.

    Returns
    -------
    list of Finding
    """
    findings = [
        Finding(
            "python",
            True,
            f"{platform.python_version()} at {sys.executable}, {platform.system()} "
            f"{platform.machine()}, {_cores()} cores for this process",
        ),
        Finding("packages", True, ", ".join(_versions())),
        _oneflow(),
    ]
    usable, why = cuda_status()
    findings.append(Finding("gpu", usable, why))
    findings.append(_blas())
    if urls is None:
        urls = _default_urls()
    findings.extend(_reach(url) for url in urls)
    return findings


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> list[str]:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return versions


def _oneflow() -> Finding:
    version, why = oneflow_status()
    if version is None:
        return Finding("oneflow", False, why)
    try:
        child = subprocess.run(
            [sys.executable, "-c", _IMPORT_TRIAL],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Finding("oneflow", False, f"importing it took over {_IMPORT_TIMEOUT_S} s")
    if child.returncode == 0 and "sum 6.0" in child.stdout:
        return Finding("oneflow", True, f"{version} imports and computes on the CPU")
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding("oneflow", False, f"{version} failed with exit code {child.returncode}: {last}")


def _blas() -> Finding:
    chosen = os.environ.get("OPENBLAS_CORETYPE")
    if chosen:
        return Finding("blas", True, f"OPENBLAS_CORETYPE={chosen} is set and left as it is")
    core_type = openblas_core_type()
    if core_type is None:
        return Finding(
            "blas", True, "no AVX2 seen on this processor: OpenBLAS chooses its own kernels"
        )
    return Finding(
        "blas", True, f"{core_type} kernels are chosen for OneFlow's OpenBLAS on this processor"
    )


def _default_urls() -> list[str]:
    from .datasets import named_urls
    from .weights import source_urls

    return [*source_urls(), *named_urls()]


def _reach(url: str) -> Finding:
    host = urlsplit(url).netloc
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=_NETWORK_TIMEOUT_S
        ) as answer:
            return Finding("network", True, f"{host} answers ({answer.status}): {url}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("network", False, f"{host} does not answer ({reason}): {url}")
