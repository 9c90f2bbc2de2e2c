"""What trains: OneFlow where it can use the device, else PyTorch."""

from __future__ import annotations

from dataclasses import replace

from ..backbones.choice import PRECISIONS, EngineChoice, choose_engine
from ..errors import EngineUnavailableError, RecipeError
from ..frameworks import cuda_status, oneflow_status, torch_status
from .framework import TRAINERS

_ASKED = ", as asked for"
_INSTALL = "pip install 'featcache[torch]'"


def choose_trainer(
    engine: str = "auto", device: str = "auto", precision: str = "f32"
) -> EngineChoice:
    """Choose what trains, its device and its precision.

    Parameters
    ----------
    engine : str
        ``"oneflow"``, ``"torch"``, or ``"auto"``: OneFlow where it is installed and can use
        the device, unless PyTorch can use a GPU that OneFlow cannot; else PyTorch.
    device, precision : str
        As `featcache.backbones.choice.choose_engine` takes them.

    Raises
    ------
    RecipeError
        No such engine, device or precision, or one that does not train.
    EngineUnavailableError
        What was asked for cannot train here; the message says what can, or what to install.
    """
    if engine not in ("auto", *TRAINERS):
        raise RecipeError(
            f"engine: expected one of auto, {', '.join(TRAINERS)} to train with, found {engine!r}"
        )
    if engine == "oneflow":
        return _oneflow(device, precision)
    if engine == "torch":
        return _torch(device, precision)
    (has_oneflow, why), (has_torch, _) = oneflow_status(), torch_status()
    if has_oneflow is None and has_torch is None:
        raise EngineUnavailableError(
            f"engine auto: expected OneFlow or PyTorch to train with, found neither ({why}); run "
            f"{_INSTALL}"
        )
    if has_torch is None:
        return _oneflow(device, precision)
    if has_oneflow is None:
        return _instead(
            _torch(device, precision), f"since OneFlow is not here: {why.partition(';')[0]}"
        )
    try:
        choice = _oneflow(device, precision)
    except EngineUnavailableError as error:
        return _instead(_torch(device, precision), f"since OneFlow cannot: {error}")
    if device == "auto" and choice.device == "cpu":
        other = _torch(device, precision)
        if other.device != "cpu":
            return _instead(other, f"a GPU that OneFlow cannot use: {cuda_status()[1]}")
    return choice


def _instead(choice: EngineChoice, reason: str) -> EngineChoice:
    return replace(choice, why=f"{choice.why.removesuffix(_ASKED)}, {reason}")


def _oneflow(device: str, precision: str) -> EngineChoice:
    on_gpu = choose_engine("oneflow", device).device == "cuda"
    return _precise("oneflow", device, precision, ("f32", "f16") if on_gpu else ("f32",))


def _torch(device: str, precision: str) -> EngineChoice:
    on_cpu = choose_engine("torch", device).device == "cpu"
    return _precise("torch", device, precision, ("f32", "bf16") if on_cpu else PRECISIONS)


def _precise(engine: str, device: str, precision: str, trains_in: tuple[str, ...]) -> EngineChoice:
    if precision in PRECISIONS and precision not in trains_in:
        instead = "" if engine == "torch" else "--engine torch, or "
        raise EngineUnavailableError(
            f"precision {precision}: expected {' or '.join(trains_in)} to train with {engine} on "
            f"this device, found {precision}; use {instead}--precision {trains_in[-1]}"
        )
    return choose_engine(engine, device, precision)
