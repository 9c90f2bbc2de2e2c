"""Engines run the backbone: uint8 pixels in, float32 features out.

NumPy crosses the border, tensors never do. OneFlow is the reference; any other
engine states its tolerance against it in a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import EngineUnavailableError, RecipeError
from ..frameworks import cuda_status, oneflow_status
from ..weights import Weights

__all__ = ["DEVICES", "Engine", "EngineChoice", "build_engine", "choose_engine"]

DEVICES = ("auto", "cpu", "cuda")


class Engine(Protocol):
    """What runs a backbone."""

    def extract(self, images: np.ndarray) -> np.ndarray:
        """Return the features of canonical pixels.

        Parameters
        ----------
        images : numpy.ndarray
            uint8 (N, size, size, 3), N >= 1.

        Returns
        -------
        numpy.ndarray
            float32 (N, D).
        """


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
        ``"float32"``.
    why : str
        The reason, for a person.
    """

    name: str
    version: str
    device: str
    precision: str
    why: str


def choose_engine(device: str = "auto") -> EngineChoice:
    """Choose the engine and device.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda"``, or ``"auto"``: the GPU where OneFlow runs on it, else the CPU.

    Raises
    ------
    RecipeError
        No such device.
    EngineUnavailableError
        OneFlow is not installed, or ``"cuda"`` was asked for and cannot be used.
    """
    if device not in DEVICES:
        raise RecipeError(f"device: expected one of {', '.join(DEVICES)}, found {device!r}")
    version, why = oneflow_status()
    if version is None:
        raise EngineUnavailableError(f"engine oneflow: not available: {why}")
    if device == "cpu":
        return EngineChoice("oneflow", version, "cpu", "float32", "the CPU was asked for")
    usable, found = cuda_status()
    if usable:
        return EngineChoice("oneflow", version, "cuda", "float32", found)
    if device == "cuda":
        raise EngineUnavailableError(
            f"device cuda: expected a GPU that OneFlow can use, found: {found}; use --device cpu"
        )
    return EngineChoice("oneflow", version, "cpu", "float32", found)


def build_engine(choice: EngineChoice, weights: Weights) -> Engine:
    """Load the engine that was chosen, with these weights.

    Raises
    ------
    EngineUnavailableError
        It cannot be imported after all.
    """
    from . import _oneflow

    return _oneflow.OneFlowEngine(weights, choice.device)
