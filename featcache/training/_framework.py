"""The one place that says which framework trains: everything else asks here.

The trainer is written against what OneFlow and PyTorch share: modules, ``no_grad``,
``backward``, ``optim.SGD`` with its groups' rates set by ``param_groups[i]["lr"]``,
``state_dict`` and ``load_state_dict``. What differs between the two stands in a `Framework`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backbone import Backbone
from ..preprocess import Preprocess
from ._convolution import swap_convolutions

__all__ = ["Framework", "oneflow_framework"]


@dataclass(frozen=True)
class Framework:
    """What a trainer needs of a framework.

    Parameters
    ----------
    module : module
        ``oneflow``, or one with the same names.
    build_backbone : callable
        Architecture -> a ResNet whose head is the identity.
    load_backbone : callable
        (network, name -> array): copies a checkpoint's tensors into it.
    state_arrays : callable
        Network -> name -> array, copies of every parameter and buffer.
    to_input : callable
        (uint8 pixels (N, s, s, 3), preprocessing, device) -> normalised tensor.
    prepare : callable
        (network, device): whatever makes it faster without changing what it computes.
    """

    module: Any
    build_backbone: Callable[[Backbone], Any]
    load_backbone: Callable[[Any, Mapping[str, np.ndarray]], None]
    state_arrays: Callable[[Any], dict[str, np.ndarray]]
    to_input: Callable[[np.ndarray, Preprocess, str], Any]
    prepare: Callable[[Any, str], None]


def oneflow_framework() -> Framework:
    """Return OneFlow.

    Raises
    ------
    EngineUnavailableError
        It cannot be imported here.
    """
    from ..engines import _oneflow as engine
    from ..frameworks import import_oneflow

    flow = import_oneflow()

    def prepare(network: Any, device: str) -> None:
        if device == "cpu":
            swap_convolutions(network, flow)

    return Framework(
        flow,
        engine.build_backbone,
        engine.load_backbone,
        engine.state_arrays,
        engine.to_input,
        prepare,
    )
