"""Which engine, device and precision will run: decided, and explained, before any is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import EngineUnavailableError, RecipeError
from ..frameworks import cuda_status, oneflow_status, openvino_precisions, openvino_status

__all__ = ["DEVICES", "ENGINES", "PRECISIONS", "EngineChoice", "choose_engine"]

ENGINES = ("auto", "oneflow", "openvino")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("f32", "bf16", "f16")

_INSTALL_OPENVINO = "pip install 'featcache[openvino]'"


@dataclass(frozen=True)
class EngineChoice:
    """Which engine will run, decided without loading it.

    Parameters
    ----------
    name, version : str
        ``"oneflow"``, ``"0.9.0"``.
    device : str
        ``"cpu"`` or ``"cuda"``.
    precision : str
        ``"f32"``, ``"bf16"`` or ``"f16"``: what the convolutions compute in.
        Features are float32 in any case.
    why : str
        What was chosen and for which reason: one sentence for a person.
    """

    name: str
    version: str
    device: str
    precision: str
    why: str


def choose_engine(
    engine: str = "auto", device: str = "auto", precision: str = "f32"
) -> EngineChoice:
    """Choose the engine, its device and its precision.

    Parameters
    ----------
    engine : str
        ``"oneflow"``, ``"openvino"``, or ``"auto"``: OneFlow on a GPU that it can use,
        else OpenVINO on the CPU, else OneFlow on the CPU.
    device : str
        ``"cpu"``, ``"cuda"``, or ``"auto"``: the best that the engine can use here.
    precision : str
        ``"f32"``, ``"bf16"`` or ``"f16"``.

    Returns
    -------
    EngineChoice

    Raises
    ------
    RecipeError
        No such engine, device or precision.
    EngineUnavailableError
        What was asked for cannot run here; the message says what can.
    """
    for what, value, known in (
        ("engine", engine, ENGINES),
        ("device", device, DEVICES),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise RecipeError(f"{what}: expected one of {', '.join(known)}, found {value!r}")
    if engine == "openvino":
        return _openvino(device, precision, "as asked for")
    if engine == "oneflow":
        return _oneflow(device, precision)
    if device != "cpu":
        usable, gpu = cuda_status()
        if usable or device == "cuda":
            return _oneflow("cuda", precision)
        reason = f"no GPU can be used: {gpu}"
    else:
        reason = "the CPU was asked for"
    if openvino_status()[0] is not None:
        return _openvino("cpu", precision, f"the fastest engine there; {reason}")
    if oneflow_status()[0] is not None:
        return _oneflow("cpu", precision)
    raise EngineUnavailableError(
        f"engine auto: expected OpenVINO or OneFlow, found neither; run {_INSTALL_OPENVINO}"
    )


def _openvino(device: str, precision: str, reason: str) -> EngineChoice:
    if device == "cuda":
        raise EngineUnavailableError(
            "device cuda: expected the CPU with engine openvino, found cuda; "
            "use --engine oneflow --device cuda, or --device cpu"
        )
    version, why = openvino_status()
    if version is None:
        raise EngineUnavailableError(f"engine openvino: not available: {why}")
    if precision != "f32":  # to ask the processor takes the import, a third of a second
        native = openvino_precisions()
        if precision not in native:
            raise EngineUnavailableError(
                f"precision {precision}: expected one that this processor computes in "
                f"({', '.join(native)} with OpenVINO {version}), found {precision}; "
                f"use --precision {native[-1]}"
            )
    return EngineChoice(
        "openvino", version, "cpu", precision, f"OpenVINO on the CPU in {precision}, {reason}"
    )


def _oneflow(device: str, precision: str) -> EngineChoice:
    version, why = oneflow_status()
    if version is None:
        raise EngineUnavailableError(f"engine oneflow: not available: {why}")
    if device == "cpu":
        usable, found = False, "the CPU was asked for"
    else:
        usable, found = cuda_status()
    if device == "cuda" and not usable:
        raise EngineUnavailableError(
            f"device cuda: expected a GPU that OneFlow can use, found: {found}; use --device cpu"
        )
    here = "cuda" if usable else "cpu"
    native = ("f32", "f16") if usable else ("f32",)
    if precision not in native:
        raise EngineUnavailableError(
            f"precision {precision}: expected {' or '.join(native)} with OneFlow {version} on "
            f"{'this GPU' if usable else 'the CPU'}, found {precision}; {_instead(precision)}"
        )
    where = f"the GPU in {precision}: {found}" if usable else f"the CPU in f32; {found}"
    return EngineChoice("oneflow", version, here, precision, f"OneFlow on {where}")


def _instead(precision: str) -> str:
    """Say what can run a precision that OneFlow cannot."""
    if openvino_status()[0] is None:
        return f"run {_INSTALL_OPENVINO} and use --engine openvino, or --precision f32"
    if precision in openvino_precisions():
        return f"use --engine openvino --precision {precision}"
    return "use --precision f32"
