"""Which framework trains, and what differs between OneFlow and PyTorch.

The trainer is written against what both share: modules, ``no_grad``, ``backward``, ``optim.SGD``
with rates set by ``param_groups[i]["lr"]``, ``state_dict``, ``gather`` and ``pad``. What differs
is in a `Framework`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backbones.architectures import Backbone
from ..backbones.choice import PRECISIONS, EngineChoice, choose_engine
from ..cores import usable_cores
from ..errors import EngineUnavailableError
from ..frameworks import cuda_status, oneflow_status, torch_status
from ..preprocess import Preprocess

_AS_ASKED = ", as asked for"
_INSTALL = "pip install 'featcache[torch]'"


def choose_trainer(
    engine: str = "auto", device: str = "auto", precision: str = "f32", *, library: bool = False
) -> EngineChoice:
    """Choose what trains, its device and its precision, as `FinetuneOptions` describes.

    ``library``: it is to train a library's model, which only PyTorch can.

    Raises
    ------
    RecipeError
        No such device or precision.
    EngineUnavailableError
        What was asked for cannot train here; the message says what can, or what to install.
    """
    if engine == "oneflow":
        return _on_cpu(_oneflow(device, precision))
    if engine == "torch":
        return _torch(device, precision)
    if library:
        return _because(_torch(device, precision), "it alone trains a library's model")
    (has_oneflow, why), (has_torch, why_torch) = oneflow_status(), torch_status()
    if has_oneflow is None and has_torch is None:
        raise EngineUnavailableError(
            f"engine auto: expected PyTorch or OneFlow to train with, found neither ({why}); run "
            f"{_INSTALL}"
        )
    if has_oneflow is None:
        return _because(
            _torch(device, precision), f"OneFlow is not available: {why.partition(';')[0]}"
        )
    if has_torch is None:
        return _on_cpu(_because(_oneflow(device, precision), why_torch.partition(";")[0]))
    if device in ("auto", "cuda") and cuda_status()[0]:
        theirs = _torch_or_none(device, precision)
        if theirs is None or theirs.device == "cpu":
            return _because(_oneflow(device, precision), "PyTorch cannot use this GPU")
    return _because(_torch(device, precision), "it is installed, and trains faster than OneFlow")


def _torch_or_none(device: str, precision: str) -> EngineChoice | None:
    try:
        return _torch(device, precision)
    except EngineUnavailableError:
        return None


def _because(choice: EngineChoice, reason: str) -> EngineChoice:
    return replace(choice, why=f"{choice.why.removesuffix(_AS_ASKED)}: {reason}")


def _on_cpu(choice: EngineChoice) -> EngineChoice:
    """Add, to OneFlow on a CPU, that PyTorch would be faster."""
    if choice.device != "cpu":
        return choice
    advice = "PyTorch trains several times faster on a CPU: "
    advice += "use --engine torch" if torch_status()[0] else _INSTALL
    return replace(choice, why=f"{choice.why}; {advice}")


def _oneflow(device: str, precision: str) -> EngineChoice:
    return _precise("oneflow", device, precision, ("f32",))


def _torch(device: str, precision: str) -> EngineChoice:
    return _precise("torch", device, precision, ("f32", "bf16"))


def _precise(engine: str, device: str, precision: str, trains_in: tuple[str, ...]) -> EngineChoice:
    if precision in PRECISIONS and precision not in trains_in:
        instead = "" if engine == "torch" else "--engine torch, or "
        raise EngineUnavailableError(
            f"precision {precision}: expected {' or '.join(trains_in)} to train with {engine} on "
            f"this device, found {precision}; use {instead}--precision {trains_in[-1]}"
        )
    return choose_engine(engine, device, precision)


@dataclass(frozen=True)
class Framework:
    """What a trainer needs of a framework."""

    name: str  # of `TRAINERS`
    module: Any  # ``oneflow`` or ``torch``
    build_backbone: Callable[[Backbone], Any]  # a ResNet with arbitrary weights, without a head
    load_arrays: Callable[[Any, Mapping[str, np.ndarray]], None]  # every tensor of a state dict
    state_arrays: Callable[[Any], dict[str, np.ndarray]]  # copies of every parameter and buffer
    to_device: Callable[[np.ndarray, str], Any]
    # From uint8 (N, 3, s, s) to normalised float32 (N, 3, size, size), on the tensor's device.
    to_input: Callable[[Any, Preprocess], Any]
    prepare: Callable[[Any, str], None]  # makes a network faster on a device, not different


def get_framework(name: str) -> Framework:
    """Import a framework of `TRAINERS`, or raise `EngineUnavailableError`."""
    return _oneflow_framework() if name == "oneflow" else _torch_framework()


def _oneflow_framework() -> Framework:
    """Return OneFlow. It was never run on a GPU."""
    from ..backbones import oneflow_engine as engine
    from ..frameworks import import_oneflow

    flow = import_oneflow()

    def load_arrays(module: Any, arrays: Mapping[str, np.ndarray]) -> None:
        module.load_state_dict(dict(arrays))

    def prepare(network: Any, device: str) -> None:
        pass

    return Framework(
        "oneflow",
        flow,
        engine.build_backbone,
        load_arrays,
        engine.state_arrays,
        engine.to_device,
        engine.normalised,
        prepare,
    )


def _torch_framework() -> Framework:
    """Return PyTorch."""
    from ..frameworks import import_torch

    torch = import_torch()
    from ..backbones import torch_engine as engine
    from ..backbones.torch_input import normalised

    def build_backbone(backbone: Backbone) -> Any:
        with torch.device("meta"):  # draws nothing, and leaves torch's generator as it is
            network = engine.build_backbone(backbone)
        return network.to_empty(device="cpu")

    def load_arrays(module: Any, arrays: Mapping[str, np.ndarray]) -> None:
        module.load_state_dict({name: torch.tensor(value) for name, value in arrays.items()})

    def to_device(array: np.ndarray, device: str) -> Any:
        return torch.from_numpy(np.require(array, requirements="W")).to(device)

    def to_input(planes: Any, preprocess: Preprocess) -> Any:
        x = normalised(planes.permute(0, 2, 3, 1), preprocess)
        return x.contiguous(memory_format=torch.channels_last)

    def prepare(network: Any, device: str) -> None:
        network.to(memory_format=torch.channels_last)
        if device == "cpu":
            torch.set_num_threads(usable_cores())
        elif device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False  # f32 means float32; bf16 is the fast choice

    return Framework(
        "torch",
        torch,
        build_backbone,
        load_arrays,
        engine.state_arrays,
        to_device,
        to_input,
        prepare,
    )
