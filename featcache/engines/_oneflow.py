"""OneFlow: the reference engine, and what the trainer needs of the framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..backbone import Backbone, get_backbone
from ..frameworks import import_flowvision, import_oneflow
from ..preprocess import WEIGHT_BITS, Preprocess, upscale_taps
from ..weights import Weights
from ._images import check_images
from ._oneflow_graph import StaticForward, forward_cuts

__all__ = [
    "OneFlowEngine",
    "build_backbone",
    "load_backbone",
    "normalised",
    "state_arrays",
    "to_device",
    "to_input",
]


class OneFlowEngine:
    """A frozen backbone in eval mode.

    Parameters
    ----------
    weights : Weights
        The checkpoint; its preprocessing is the input's.
    cuts : tuple of str
        Where features are taken.
    device : str
        ``"cpu"`` or ``"cuda"``.
    precision : str
        ``"f32"``, or on a GPU ``"f16"``: mixed precision by OneFlow's nn.Graph. Written
        from OneFlow's documentation and never run on a GPU; the graph itself is tested
        on the CPU, in float32.
    """

    def __init__(
        self, weights: Weights, cuts: tuple[str, ...], device: str = "cpu", precision: str = "f32"
    ) -> None:
        self._flow = import_oneflow()
        self._preprocess = weights.preprocess
        self._device = device
        self._cuts = cuts
        model = build_backbone(get_backbone(weights.backbone))
        load_backbone(model, weights.state)
        model.to(device).eval()
        self._forward = forward_cuts(model, cuts)
        if precision == "f16":
            self._forward = StaticForward(self._forward, mixed=True)

    @property
    def batch_size(self) -> int:
        """Images per call that keep the device busy; any other number works too."""
        return 64 if self._device == "cpu" else 256

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of uint8 pixels (N, s, s, 3), as `Engine.extract` does."""
        with self._flow.no_grad():
            results = self._forward(to_input(images, self._preprocess, self._device))
        return {
            cut: result.to(self._flow.float32).numpy()
            for cut, result in zip(self._cuts, results, strict=True)
        }


def build_backbone(backbone: Backbone) -> Any:
    """Return flowvision's ResNet with its head replaced by the identity: (N, D) out.

    Its convolutions hold what memory happened to hold, until `load_backbone`.
    """
    flow = import_oneflow()
    with _without_draws(flow.nn.init):
        model = getattr(import_flowvision().models, backbone.name)()
    model.fc = flow.nn.Identity()
    return model


@contextmanager
def _without_draws(init: Any) -> Iterator[None]:
    """Leave out the draws of weights that are loaded next: half a second of ResNet-18's making."""
    draws = {name: getattr(init, name) for name in ("kaiming_normal_", "kaiming_uniform_")}
    try:
        for name in draws:
            setattr(init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, draw in draws.items():
            setattr(init, name, draw)


def load_backbone(model: Any, state: Mapping[str, np.ndarray]) -> None:
    """Copy a checkpoint's tensors, its head left out, into a model of `build_backbone`."""
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})


def state_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return name -> NumPy copy of every parameter and buffer."""
    return {key: np.array(value.numpy()) for key, value in model.state_dict().items()}


def to_input(images: np.ndarray, preprocess: Preprocess, device: str) -> Any:
    """Turn pixels into the backbone's input: normalised float32 (N, 3, size, size).

    Parameters
    ----------
    images : numpy.ndarray
        uint8 (N, s, s, 3) with s up to size, any strides. Smaller ones are enlarged on
        the device.

    Raises
    ------
    ShapeMismatchError
        Another dtype, or another shape.
    """
    check_images(images, preprocess)
    return normalised(to_device(images.transpose(0, 3, 1, 2), device), preprocess)


def normalised(planes: Any, preprocess: Preprocess) -> Any:
    """Enlarge and normalise a uint8 tensor (N, 3, s, s) as `to_input` does, on its device."""
    flow = import_oneflow()
    if planes.shape[2] < preprocess.size:
        planes = _upscaled(planes, preprocess.size)
    planes = planes.to(flow.float32) / 255.0
    mean = flow.tensor(preprocess.mean, dtype=flow.float32, device=planes.device)
    std = flow.tensor(preprocess.std, dtype=flow.float32, device=planes.device)
    return (planes - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)


def to_device(array: np.ndarray, device: str) -> Any:
    """Return a tensor with a copy of an array, in memory of OneFlow's own.

    ``from_numpy`` shares the array instead. OneFlow then lets go of it in a thread of its
    own that must first get Python's lock: at the interpreter's exit that ends in a crash.
    """
    flow = import_oneflow()
    # Named: without it, OneFlow takes cpu:0 in every process of a launcher, and cpu:RANK elsewhere.
    tensor = flow.empty(*array.shape, dtype=getattr(flow, array.dtype.name), device="cpu")
    tensor.numpy()[...] = array
    return tensor.to(device)


def _upscaled(planes: Any, size: int) -> Any:
    """Enlarge (N, 3, s, s) as `featcache.preprocess.upscale` does, exactly, in float64."""
    flow = import_oneflow()
    first, second, weights = upscale_taps(planes.shape[2], size)
    pixels = planes.to(flow.float64)
    for axis in (3, 2):  # Pillow's order: along the rows, then along the columns
        shape = [1, 1, 1, 1]
        shape[axis] = size
        total: Any = 0.5  # rounds half up, with the floor below
        for index, weight in ((first, weights[:, 0]), (second, weights[:, 1])):
            where = to_device(index.astype(np.int64), planes.device)
            share = to_device((weight / (1 << WEIGHT_BITS)).reshape(shape), planes.device)
            total = flow.index_select(pixels, axis, where) * share + total
        pixels = total.floor()
    return pixels
