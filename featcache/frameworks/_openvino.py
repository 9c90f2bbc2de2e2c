"""OpenVINO: whether it is here, what the processor gives it, and importing it without telemetry."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import cache
from types import ModuleType

from ..errors import EngineUnavailableError
from ._process import ctrl_c_later

__all__ = ["import_openvino", "openvino_precisions", "openvino_status"]

_INSTALL = "pip install 'featcache[openvino]'"
_TELEMETRY = "openvino_telemetry"
_CAPABILITIES = {"bf16": "BF16", "f16": "FP16"}  # our name: OpenVINO's


def openvino_status() -> tuple[str | None, str]:
    """Say, without importing it, whether OpenVINO is installed.

    Returns
    -------
    version : str or None
        The installed version; None where there is none.
    why : str
        The reason and what to do, for a person.
    """
    try:
        version = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None, f"the package openvino is not installed; run {_INSTALL}"
    return version, f"version {version}"


@cache
def import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry.

    Raises
    ------
    EngineUnavailableError
        It is not installed, or its import fails; the message has the reason.
    """
    version, why = openvino_status()
    if version is None:
        raise EngineUnavailableError(f"engine openvino: not available: {why}")
    # What is None in sys.modules cannot be imported; OpenVINO then takes a stand-in that does
    # nothing. Otherwise its import sends an event and writes a file into the home folder.
    keep_out = _TELEMETRY not in sys.modules
    if keep_out:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        with ctrl_c_later():
            import openvino
    except Exception as error:
        raise EngineUnavailableError(
            f"engine openvino: expected version {version} to import, found "
            f"{type(error).__name__}: {error}; run {_INSTALL}"
        ) from error
    finally:
        if keep_out:
            del sys.modules[_TELEMETRY]
    module: ModuleType = openvino
    return module


@cache
def openvino_precisions() -> tuple[str, ...]:
    """Return the precisions that OpenVINO runs natively on this processor, ``"f32"`` first.

    Raises
    ------
    EngineUnavailableError
        As `import_openvino`.
    """
    capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", *(ours for ours, its in _CAPABILITIES.items() if its in capabilities))
