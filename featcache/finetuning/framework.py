"""The one place that says which framework trains: everything else asks here.

The trainer is written against what OneFlow and PyTorch share: modules, ``no_grad``,
``backward``, ``optim.SGD`` with its groups' rates set by ``param_groups[i]["lr"]``,
``state_dict``, ``gather`` and ``pad``. What differs between the two stands in a `Framework`.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..backbones.architectures import Backbone
from ..cores import usable_cores
from ..errors import EngineUnavailableError, RecipeError
from ..preprocess import Preprocess
from .convolution import swap_convolutions
from .sgd import Sgd

# The engines that train.
TRAINERS = ("oneflow", "torch")


@dataclass(frozen=True)
class Framework:
    """What a trainer needs of a framework.

    Parameters
    ----------
    name : str
        Of `TRAINERS`.
    module : module
        ``oneflow`` or ``torch``.
    build_backbone : callable
        Architecture -> a ResNet whose head is the identity; what its tensors hold is of no
        account.
    load_arrays : callable
        (module, name -> array): copies every tensor of a module's state dict.
    state_arrays : callable
        Module -> name -> array, copies of every parameter and buffer.
    to_device : callable
        (array, device) -> a tensor of its shape. The copy to a GPU may be under way still when
        the call returns; what is computed with the tensor waits for it.
    to_input : callable
        (uint8 tensor (N, 3, s, s), preprocessing) -> normalised float32 (N, 3, size, size),
        enlarged where it is smaller, on the tensor's device.
    prepare : callable
        (network, device): whatever makes it faster without changing what it computes.
    sgd : callable
        (groups, device, momentum, weight decay) -> an optimizer, of ``param_groups`` that hold
        ``params`` and ``lr``.
    autocast : callable
        (device, precision) -> a context in which convolutions and products compute in it.
    all_reduce : callable
        Tensor -> None: it becomes the sum of those of all processes that were joined, the same
        in each to the bit.
    compiled : callable or None
        Function of tensors -> the same, compiled; None where the framework has no such.
    """

    name: str
    module: Any
    build_backbone: Callable[[Backbone], Any]
    load_arrays: Callable[[Any, Mapping[str, np.ndarray]], None]
    state_arrays: Callable[[Any], dict[str, np.ndarray]]
    to_device: Callable[[np.ndarray, str], Any]
    to_input: Callable[[Any, Preprocess], Any]
    prepare: Callable[[Any, str], None]
    sgd: Callable[[list[dict[str, Any]], str, float, float], Any]
    autocast: Callable[[str, str], AbstractContextManager[Any]]
    all_reduce: Any
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


def get_framework(name: str, *, join: bool = False) -> Framework:
    """Return a framework by its engine's name.

    Parameters
    ----------
    name : str
        Of `TRAINERS`.
    join : bool
        Become one of the processes that a launcher started, and wait for all of them. Once.

    Raises
    ------
    RecipeError
        It does not train.
    EngineUnavailableError
        It cannot be imported here.
    """
    if name == "oneflow":
        return oneflow_framework(join=join)
    if name == "torch":
        return torch_framework(join=join)
    raise RecipeError(f"engine: expected one of {', '.join(TRAINERS)}, found {name!r}")


def oneflow_framework(*, join: bool = False) -> Framework:
    """Return OneFlow. On a GPU it was never run.

    Parameters
    ----------
    join : bool
        As for `get_framework`.

    Notes
    -----
    Its nn.Graph is not used. On a processor it is no faster than steps one by one (30 images
    per second of processor time at 64 pixels either way, on a Zen 4) and cannot hold the
    convolution of `featcache.finetuning.convolution`, with which it is 49.

    Raises
    ------
    EngineUnavailableError
        It cannot be imported here.
    """
    from ..backbones import oneflow_engine as engine
    from ..frameworks import import_oneflow

    flow = import_oneflow(join=join)

    def load_arrays(module: Any, arrays: Mapping[str, np.ndarray]) -> None:
        module.load_state_dict(dict(arrays))

    def prepare(network: Any, device: str) -> None:
        if device == "cpu":
            swap_convolutions(network, flow)

    def sgd(groups: list[dict[str, Any]], device: str, momentum: float, decay: float) -> Any:
        if device == "cpu":
            return Sgd(groups, flow, momentum, decay)
        return flow.optim.SGD(groups, momentum=momentum, weight_decay=decay)

    def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
        if precision == "f32":
            return nullcontext()
        context: AbstractContextManager[Any] = flow.autocast(device, dtype=_dtype(flow, precision))
        return context

    return Framework(
        "oneflow",
        flow,
        engine.build_backbone,
        load_arrays,
        engine.state_arrays,
        engine.to_device,
        engine.normalised,
        prepare,
        sgd,
        autocast,
        flow.comm.all_reduce,
    )


def torch_framework(*, join: bool = False) -> Framework:
    """Return PyTorch. On a GPU it was never run; each of its parts is tested on the CPU.

    Parameters
    ----------
    join : bool
        As for `get_framework`.

    Raises
    ------
    EngineUnavailableError
        It cannot be imported here.
    """
    from ..frameworks import import_torch

    torch = import_torch()
    if join:
        _join(torch)
    from ..backbones import torch_engine as engine

    @cache
    def copies() -> Any:
        """Return the stream in which batches travel to the GPU, beside the steps' own."""
        return torch.cuda.Stream()

    def build_backbone(backbone: Backbone) -> Any:
        with torch.device("meta"):  # draws nothing, and leaves torch's generator as it is
            network = engine.build_backbone(backbone)
        return network.to_empty(device="cpu")

    def load_arrays(module: Any, arrays: Mapping[str, np.ndarray]) -> None:
        module.load_state_dict({name: torch.tensor(value) for name, value in arrays.items()})

    def to_device(array: np.ndarray, device: str) -> Any:
        tensor = torch.from_numpy(np.require(array, requirements="W"))
        if device != "cuda":
            return tensor.to(device)
        with torch.cuda.stream(copies()):
            moved = tensor.pin_memory().to(device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(copies())
        moved.record_stream(torch.cuda.current_stream())
        return moved

    def to_input(planes: Any, preprocess: Preprocess) -> Any:
        x = engine.normalised(planes.permute(0, 2, 3, 1), preprocess)
        return x.contiguous(memory_format=torch.channels_last)

    def prepare(network: Any, device: str) -> None:
        network.to(memory_format=torch.channels_last)
        if device == "cpu":
            torch.set_num_threads(usable_cores())
        elif device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False  # f32 is f32; whoever wants speed asks for bf16

    def sgd(groups: list[dict[str, Any]], device: str, momentum: float, decay: float) -> Any:
        return torch.optim.SGD(groups, momentum=momentum, weight_decay=decay)

    def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
        if precision == "f32":
            return nullcontext()
        context: AbstractContextManager[Any] = torch.autocast(device, _dtype(torch, precision))
        return context

    return Framework(
        "torch",
        torch,
        build_backbone,
        load_arrays,
        engine.state_arrays,
        to_device,
        to_input,
        prepare,
        sgd,
        autocast,
        getattr(torch.distributed, "all_reduce", None),  # some builds are without
        torch.compile,
    )


def _join(torch: Any) -> None:
    """Wait for the other processes of the launcher, unless whoever called us has done it."""
    distributed = torch.distributed
    if not distributed.is_available():
        raise EngineUnavailableError(
            "engine torch: expected a build of PyTorch with torch.distributed, found one without; "
            "train by a single process"
        )
    if not distributed.is_initialized():
        on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
        atexit.register(distributed.destroy_process_group)


def _dtype(module: Any, precision: str) -> Any:
    return {"bf16": module.bfloat16, "f16": module.float16}[precision]
