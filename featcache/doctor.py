"""What this machine can do for featcache, and why it cannot do the rest."""

from __future__ import annotations

import os
import platform
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .backbones.choice import EngineChoice, choose_engine
from .backbones.engine import build_engine
from .cores import THREADS_VARIABLE, quota_cores, usable_cores
from .errors import FeatcacheError
from .frameworks import (
    cuda_status,
    oneflow_status,
    openvino_precisions,
    openvino_status,
    torch_gpu_status,
    torch_precisions,
    torch_status,
)
from .process import installed_version, last_words, old_openblas, openblas_core_type, run_in_child

_PACKAGES = (
    "numpy",
    "h5py",
    "scikit-learn",
    "pillow",
    "safetensors",
    "oneflow",
    "openvino",
    "torch",
)
_IMPORT_TIMEOUT_S = 120
_NETWORK_TIMEOUT_S = 5
_BENCH_S = 3.0
_BENCH_TIMEOUT_S = 120

# In children, because an import that fails can end the process.
_IMPORT_TRIAL = """
from featcache.frameworks import import_oneflow
flow = import_oneflow()
print("sum", float(flow.ones(2, 3).sum().numpy()))
"""
_TORCH_TRIAL = """
from featcache.frameworks import import_torch
torch = import_torch()
build = torch.version.cuda and "CUDA " + torch.version.cuda
build = build or torch.version.hip and "ROCm " + torch.version.hip or "without CUDA and ROCm"
print("sum", float(torch.ones(2, 3).sum().numpy()), build)
"""
# Prescott's are SSE kernels, which OpenBLAS takes for a processor that it does not know.
_BLAS_TRIAL = """
import numpy
from threadpoolctl import threadpool_info
print("slow" * any(one.get("architecture") == "Prescott" for one in threadpool_info()))
"""
_BENCH_TRIAL = """
import sys
from featcache.doctor import images_per_s
from featcache.backbones.choice import choose_engine
print("rate", images_per_s(choose_engine(*sys.argv[1:4])))
"""


@dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Parameters
    ----------
    topic : str
        ``"oneflow"``, ``"openvino"``, ``"torch"``, ``"gpu"``, ``"blas"``, ``"network"`` …
    usable : bool
        Whether featcache can use it.
    detail : str
        What was found; where it cannot be used, why, and what to do.
    """

    topic: str
    usable: bool
    detail: str


def examine(*, urls: Sequence[str] | None = None, bench: bool = False) -> list[Finding]:
    """Look at Python, cores, packages, engines, GPU, BLAS and network.

    Parameters
    ----------
    urls : sequence of str, optional
        What to reach for on the network; by default the sources of the
        ``imagenet`` weights and of CIFAR-10. Empty: the network is left alone.
    bench : bool
        Measure every engine and precision that runs here, for a few seconds each.

    Returns
    -------
    list of Finding
    """
    findings = [
        Finding(
            "python",
            True,
            f"{platform.python_version()} at {sys.executable}, {platform.system()} "
            f"{platform.machine()}",
        ),
        _cores(),
        Finding("packages", True, ", ".join(_versions())),
        _oneflow(),
        _openvino(),
        _torch(),
    ]
    findings.extend(_gpus())
    findings.append(_blas())
    findings.append(_chosen())
    if bench:
        ready = {finding.topic for finding in findings if finding.usable}
        findings.extend(_bench(*contender) for contender in _contenders(ready))
    if urls is None:
        urls = _default_urls()
    findings.extend(_reach(url) for url in urls)
    return findings


def images_per_s(choice: EngineChoice, seconds: float = _BENCH_S) -> float:
    """Measure an engine on ready-made pixels: ResNet-18 at the starter weights' 64 pixels."""
    import numpy as np

    from .backbones.loading import load_weights

    weights = load_weights("tinyimagenet32")
    engine = build_engine(choice, weights)
    size = weights.preprocess.size
    shape = (engine.batch_size, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    engine.extract(images)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        engine.extract(images)
        done += len(images)
    return done / (time.perf_counter() - begun)


def _cores() -> Finding:
    try:
        usable = usable_cores()
    except FeatcacheError as error:
        return Finding("cores", False, str(error))
    if os.environ.get(THREADS_VARIABLE, "").strip():
        return Finding("cores", True, f"{usable} threads, as {THREADS_VARIABLE} says")
    quota = quota_cores()
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    return Finding(
        "cores",
        True,
        f"{usable} for this process, of {os.cpu_count()} with {limit}; "
        f"{THREADS_VARIABLE} overrides",
    )


def _versions() -> list[str]:
    found = ((package, installed_version(package)) for package in _PACKAGES)
    return [f"{package} {version}" if version else f"no {package}" for package, version in found]


def _oneflow() -> Finding:
    version, why = oneflow_status()
    if version is None:
        return Finding("oneflow", False, why)
    child = run_in_child(_IMPORT_TRIAL, timeout_s=_IMPORT_TIMEOUT_S)
    if child is None:
        return Finding("oneflow", False, f"importing it took over {_IMPORT_TIMEOUT_S} s")
    if child.returncode == 0 and "sum 6.0" in child.stdout:
        return Finding("oneflow", True, f"{version} imports and computes on the CPU")
    return Finding("oneflow", False, f"{version} failed with {last_words(child)}")


def _openvino() -> Finding:
    version, why = openvino_status()
    if version is None:
        return Finding("openvino", False, why)
    try:
        precisions = ", ".join(openvino_precisions())
    except FeatcacheError as error:
        return Finding("openvino", False, str(error))
    return Finding("openvino", True, f"{version}; this processor computes in {precisions}")


def _torch() -> Finding:
    version, why = torch_status()
    if version is None:
        return Finding("torch", False, why)
    child = run_in_child(_TORCH_TRIAL, timeout_s=_IMPORT_TIMEOUT_S)
    if child is None:
        return Finding("torch", False, f"importing it took over {_IMPORT_TIMEOUT_S} s")
    _, mark, build = child.stdout.rpartition("sum 6.0 ")
    if child.returncode or not mark:
        return Finding("torch", False, f"{version} failed with {last_words(child)}")
    precisions = ", ".join(torch_precisions("cpu"))
    return Finding(
        "torch", True, f"{version}, {build.strip()}; this processor computes in {precisions}"
    )


def _gpus() -> Iterator[Finding]:
    """Yield what each framework can use of a GPU; one that is not installed is told above."""
    usable, why = cuda_status()
    yield Finding("gpu", usable, why)
    if torch_status()[0] is not None:
        device, why = torch_gpu_status()
        if device is not None:
            why += f", as {device}, computes in {', '.join(torch_precisions(device))}"
        yield Finding("torch gpu", device is not None, why)


def _chosen() -> Finding:
    try:
        return Finding("engine", True, choose_engine().why)
    except FeatcacheError as error:
        return Finding("engine", False, str(error))


def _contenders(ready: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the engines, devices and precisions that run here."""
    if "oneflow" in ready:
        if "gpu" in ready:
            yield from (("oneflow", "cuda", precision) for precision in ("f32", "f16"))
        yield "oneflow", "cpu", "f32"
    if "openvino" in ready:
        yield from (("openvino", "cpu", precision) for precision in openvino_precisions())
    if "torch" in ready:
        device, _ = torch_gpu_status()
        for here in (device, "cpu"):
            if here is not None:
                yield from (("torch", here, precision) for precision in torch_precisions(here))


def _bench(engine: str, device: str, precision: str) -> Finding:
    what = f"{engine} on {device} in {precision}"
    child = run_in_child(_BENCH_TRIAL, engine, device, precision, timeout_s=_BENCH_TIMEOUT_S)
    if child is None:
        return Finding("bench", False, f"{what}: no answer within {_BENCH_TIMEOUT_S} s")
    _, mark, rate = child.stdout.rpartition("rate ")
    if child.returncode or not mark:
        return Finding("bench", False, f"{what}: {last_words(child)}")
    return Finding("bench", True, f"{what}: {float(rate):,.0f} images/s (ResNet-18 at 64 px)")


def _blas() -> Finding:
    chosen = os.environ.get("OPENBLAS_CORETYPE")
    if chosen:
        return Finding("blas", True, f"OPENBLAS_CORETYPE={chosen} is set and left as it is")
    core_type = openblas_core_type()
    if core_type is None:
        return Finding(
            "blas", True, "no AVX2 seen on this processor: OpenBLAS chooses its own kernels"
        )
    detail = f"{core_type} kernels are chosen for the OpenBLAS of OneFlow"
    if not old_openblas():
        return Finding("blas", True, f"{detail}; NumPy's knows this processor")
    detail += " and of NumPy"
    alone = run_in_child(_BLAS_TRIAL, timeout_s=_IMPORT_TIMEOUT_S)
    if alone is not None and "slow" in alone.stdout:
        detail += (
            "; a program that imports numpy before featcache has slow ones, "
            f"unless OPENBLAS_CORETYPE={core_type} is set"
        )
    return Finding("blas", True, detail)


def _default_urls() -> list[str]:
    from .backbones.pretrained import source_urls
    from .datasets.named import CIFAR10

    urls = [CIFAR10.url, *source_urls()]
    return list({urlsplit(url).netloc: url for url in reversed(urls)}.values())  # one a host


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
