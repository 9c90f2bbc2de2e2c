"""Which engine, device and precision will run: decided, and explained, before any is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import EngineUnavailableError
from ..frameworks import (
    INSTALL_ONEFLOW,
    INSTALL_OPENVINO,
    INSTALL_TORCH,
    available,
    cuda_status,
    may_have_gpu,
    nncf_status,
    oneflow_status,
    openvino_precisions,
    openvino_status,
    torch_gpu_status,
    torch_precisions,
    torch_status,
)
from ..options import check_choice

RESNET_ENGINES = ("oneflow", "openvino", "torch")
ENGINES = ("auto", *RESNET_ENGINES)
DEVICES = ("auto", "cpu", "cuda", "mps")
INT8 = "int8"  # of OpenVINO, scaled by images
PRECISIONS = ("f32", "bf16", "f16", INT8)
_NAMES = {"openvino": "OpenVINO", "torch": "PyTorch", "oneflow": "OneFlow"}
_INSTALL = {
    "oneflow": INSTALL_ONEFLOW,
    "openvino": INSTALL_OPENVINO,
    "torch": INSTALL_TORCH,
}


@dataclass(frozen=True)
class EngineChoice:
    """Which engine will run, decided without loading it."""

    name: str
    version: str
    device: str  # ``"cpu"``, ``"cuda"`` or ``"mps"``
    precision: str  # of the convolutions; features are float32 in any case
    why: str  # what was chosen and for which reason: one sentence for a person
    automatic: bool = False  # whether the choice was left to featcache
    # In int8: pixels uint8 (n, s, s, 3) that scale the layers, enlarged.
    calibration: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def calibration_sha256(self) -> str:
        """Digest of the pixels that scale the layers, which the features depend on."""
        pixels = self.calibration
        return "" if pixels is None else hashlib.sha256(pixels.tobytes()).hexdigest()


def choose_engine(
    engine: str = "auto",
    device: str = "auto",
    precision: str = "f32",
    runs_in: Sequence[str] = RESNET_ENGINES,
) -> EngineChoice:
    """Choose the engine, its device and its precision; ``runs_in`` says what runs the backbone."""
    check_choice("engine", engine, ENGINES)
    check_choice("device", device, DEVICES)
    check_choice("precision", precision, PRECISIONS)
    if engine == "auto":
        return replace(_automatic(device, precision, runs_in), automatic=True)
    if engine not in runs_in:
        raise EngineUnavailableError(
            f"engine {engine}: expected one that runs this backbone ({' or '.join(runs_in)}); use "
            "--engine auto"
        )
    if engine == "openvino":
        return _openvino(device, precision, "as asked for")
    if precision == INT8:
        raise EngineUnavailableError(
            f"precision int8: expected engine openvino, which alone has it, found {engine}; use "
            "--engine openvino, or another --precision"
        )
    if engine == "oneflow":
        return _oneflow(device, precision)
    return _torch(device, precision, "as asked for")


def _automatic(device: str, precision: str, runs_in: Sequence[str]) -> EngineChoice:
    if runs_in == ("function",):
        for what, value, own in (("device", device, "cpu"), ("precision", precision, "f32")):
            if value not in ("auto", own):
                raise EngineUnavailableError(
                    f"{what} {value}: expected {own} with a function, which computes where and as "
                    f"it likes, found {value}; use --{what} {own}"
                )
        return EngineChoice("function", "", "cpu", "f32", "the function itself computes")
    if device == "cpu":
        return _on_cpu(precision, "the CPU was asked for", runs_in)
    if device == "auto" and not may_have_gpu():
        return _on_cpu(precision, "no GPU can be used: no driver for one on this machine", runs_in)
    usable, reason = False, "it does not run this backbone"
    if "oneflow" in runs_in:
        usable, reason = cuda_status() if device != "mps" else (False, "it knows CUDA alone")
    if usable:
        return _oneflow("cuda", precision)
    found, why = (None, "it does not run this backbone")
    if "torch" in runs_in:
        found, why = torch_gpu_status()
    if found is not None and device in ("auto", found):
        shortly = reason.partition(";")[0]
        return _torch(found, precision, f"a GPU that OneFlow cannot use: {shortly}")
    if device != "auto":
        raise EngineUnavailableError(
            f"device {device}: expected a GPU that OneFlow or PyTorch can use, found with OneFlow: "
            f"{reason}; with PyTorch: {why}; use --device cpu"
        )
    return _on_cpu(precision, f"no GPU can be used (OneFlow: {reason}; PyTorch: {why})", runs_in)


def _on_cpu(precision: str, reason: str, runs_in: Sequence[str]) -> EngineChoice:
    """Return the fastest engine there, by benchmarks/extract.py on a Zen 4."""
    if "openvino" in runs_in and openvino_status()[0] is not None:
        return _openvino("cpu", precision, f"the fastest engine there; {reason}")
    if "torch" in runs_in and torch_status()[0] is not None:
        return _torch("cpu", precision, f"the fastest engine there; {reason}")
    if "oneflow" in runs_in and oneflow_status()[0] is not None:
        return _oneflow("cpu", precision)
    names = " or ".join(_NAMES[one] for one in runs_in)
    advice = " or ".join(_INSTALL[one] for one in runs_in if one != "oneflow" or len(runs_in) == 1)
    raise EngineUnavailableError(f"engine auto: expected {names}, found none of them; run {advice}")


def _openvino(device: str, precision: str, reason: str) -> EngineChoice:
    if device not in ("auto", "cpu"):
        raise EngineUnavailableError(
            f"device {device}: expected the CPU with engine openvino, found {device}; "
            f"use --engine auto --device {device}, or --device cpu"
        )
    version = available("openvino", openvino_status())
    if precision == INT8:
        scaler, why = nncf_status()
        if scaler is None:
            raise EngineUnavailableError(
                f"precision int8: expected nncf, which scales the layers, found: {why}; or use "
                "--precision auto"
            )
        version += f", nncf {scaler}"
    elif precision != "f32":  # to ask the processor takes the import, a third of a second
        _check_precision(precision, openvino_precisions(), f"OpenVINO {version}")
    return EngineChoice(
        "openvino", version, "cpu", precision, f"OpenVINO on the CPU in {precision}, {reason}"
    )


def _torch(device: str, precision: str, reason: str) -> EngineChoice:
    version = available("torch", torch_status())
    found, gpus = (None, "") if device == "cpu" else torch_gpu_status()
    if device not in ("auto", "cpu", found):
        raise EngineUnavailableError(
            f"device {device}: expected a GPU that PyTorch can use, found: {gpus}; use --device "
            f"{found or 'cpu'}"
        )
    here = found or "cpu"
    _check_precision(precision, torch_precisions(here), f"PyTorch {version}")
    where = "CPU" if found is None else f"GPU ({gpus})"
    return EngineChoice(
        "torch", version, here, precision, f"PyTorch on the {where} in {precision}, {reason}"
    )


def _check_precision(precision: str, native: tuple[str, ...], engine: str) -> None:
    if precision not in native:
        raise EngineUnavailableError(
            f"precision {precision}: expected one that this device computes in "
            f"({', '.join(native)} with {engine}), found {precision}; use --precision {native[-1]}"
        )


def native_precisions(choice: EngineChoice) -> tuple[str, ...]:
    """Return the precisions that the engine computes natively on its device, ``"f32"`` first."""
    if choice.name == "openvino":
        return openvino_precisions()
    if choice.name == "torch":
        return torch_precisions(choice.device)
    return ("f32", "f16") if (choice.name, choice.device) == ("oneflow", "cuda") else ("f32",)


def _oneflow(device: str, precision: str) -> EngineChoice:
    version = available("oneflow", oneflow_status())
    if device == "mps":
        raise EngineUnavailableError(
            "device mps: expected cpu or cuda with engine oneflow, found mps; use --engine torch"
        )
    if device == "cpu":
        usable, found = False, "the CPU was asked for"
    else:
        usable, found = cuda_status()
    if device == "cuda" and not usable:
        raise EngineUnavailableError(
            f"device cuda: expected a GPU that OneFlow can use, found: {found}; use --engine torch "
            "or --device cpu"
        )
    here = "cuda" if usable else "cpu"
    native = native_precisions(EngineChoice("oneflow", version, here, precision, ""))
    if precision not in native:
        raise EngineUnavailableError(
            f"precision {precision}: expected {' or '.join(native)} with OneFlow {version} on "
            f"{'this GPU' if usable else 'the CPU'}, found {precision}; {_instead(precision, here)}"
        )
    where = f"the GPU in {precision}: {found}" if usable else f"the CPU in f32; {found}"
    return EngineChoice("oneflow", version, here, precision, f"OneFlow on {where}")


def _instead(precision: str, device: str) -> str:
    """Say what can run a precision that OneFlow cannot."""
    if torch_status()[0] is not None and precision in torch_precisions(device):
        return f"use --engine torch --precision {precision}"
    if openvino_status()[0] is None:
        return f"run {INSTALL_OPENVINO} and use --engine openvino, or --precision f32"
    if precision in openvino_precisions():
        return f"use --engine openvino --precision {precision}"
    return "use --precision f32"
