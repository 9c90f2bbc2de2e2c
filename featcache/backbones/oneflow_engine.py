"""OneFlow: the reference engine, and what the trainer needs of the framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from ..frameworks import import_oneflow
from ..preprocess import WEIGHT_BITS, Preprocess, check_pixels, resample_taps
from .architectures import CUTS, Backbone, get_backbone
from .network import filled_up, in_passes
from .resnet import build_resnet
from .weights import Weights, images_per_pass


class OneFlowEngine:
    """A frozen backbone in eval mode."""

    def __init__(
        self, weights: Weights, cuts: tuple[str, ...], device: str = "cpu", precision: str = "f32"
    ) -> None:
        self._flow = import_oneflow()
        self._preprocess = weights.preprocess
        self._device = device
        self._half = precision == "f16"
        self._cuts = cuts
        self._per_pass: int | None = None
        if weights.network is not None:
            self._forward = weights.network.module(cuts)
            self._per_pass = images_per_pass(weights)
            return
        model = build_backbone(get_backbone(weights.backbone))
        load_backbone(model, weights.state)
        model.to(device).eval()
        self._forward = forward_cuts(model, cuts)

    @property
    def batch_size(self) -> int:
        """Images per call that keep the device busy; any other number works too."""
        return 64 if self._device == "cpu" else 256

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of uint8 pixels (N, s, s, 3), as `Engine.extract` does."""
        with self._flow.no_grad():
            if self._per_pass is not None:
                return self._in_passes(images, self._per_pass)
            x = to_input(images, self._preprocess, self._device)
            half = self._flow.autocast("cuda", dtype=self._flow.float16)
            with half if self._half else nullcontext():
                results = self._forward(x)
        return {
            cut: result.to(self._flow.float32).numpy()
            for cut, result in zip(self._cuts, results, strict=True)
        }

    def _in_passes(self, images: np.ndarray, count: int) -> dict[str, np.ndarray]:
        """Run passes of always as many images: products of other shapes round otherwise."""
        check_pixels(images, self._preprocess)

        def run(chunk: np.ndarray) -> list[np.ndarray]:
            x = to_input(filled_up(chunk, count), self._preprocess, self._device)
            return [result.numpy() for result in self._forward(x)]

        return dict(zip(self._cuts, in_passes(images, count, run), strict=True))


def build_backbone(backbone: Backbone) -> Any:
    """Return a ResNet with its head replaced by the identity; load a checkpoint into it."""
    flow = import_oneflow()
    with _without_draws(flow.nn.init):
        return build_resnet(flow, backbone)


@contextmanager
def _without_draws(init: Any) -> Iterator[None]:
    """Leave out the draws of weights that are loaded next: half a second of ResNet-18's making."""
    draw = init.kaiming_uniform_
    init.kaiming_uniform_ = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        init.kaiming_uniform_ = draw


def load_backbone(model: Any, state: Mapping[str, np.ndarray]) -> None:
    """Copy a checkpoint's tensors, its head left out, into a model of `build_backbone`."""
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})


def state_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return name -> NumPy copy of every parameter and buffer."""
    return {key: np.array(value.numpy()) for key, value in model.state_dict().items()}


def to_input(images: np.ndarray, preprocess: Preprocess, device: str) -> Any:
    """Turn pixels into the backbone's input: normalised float32 (N, 3, size, size)."""
    check_pixels(images, preprocess)
    return normalised(to_device(images.transpose(0, 3, 1, 2), device), preprocess)


def normalised(planes: Any, preprocess: Preprocess) -> Any:
    """Enlarge and normalise a uint8 tensor (N, 3, s, s) as `to_input` does, on its device."""
    flow = import_oneflow()
    if planes.shape[2] < preprocess.size:
        planes = _upscaled(planes, preprocess)
    planes = planes.to(flow.float32) / 255.0
    mean = flow.tensor(preprocess.mean, dtype=flow.float32, device=planes.device)
    std = flow.tensor(preprocess.std, dtype=flow.float32, device=planes.device)
    return (planes - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)


def to_device(array: np.ndarray, device: str) -> Any:
    """Return a tensor with a copy of an array, in memory of OneFlow's own.

    ``from_numpy`` shares the array instead. OneFlow then lets go of it in a thread of its own
    that must first get Python's lock: at the interpreter's exit that ends in a crash.
    """
    flow = import_oneflow()
    # Named: without it, OneFlow takes cpu:0 in every process of a launcher, and cpu:RANK elsewhere.
    tensor = flow.empty(*array.shape, dtype=getattr(flow, array.dtype.name), device="cpu")
    tensor.numpy()[...] = array
    return tensor.to(device)


def _upscaled(planes: Any, preprocess: Preprocess) -> Any:
    """Enlarge (N, 3, s, s) as `featcache.preprocess.upscale` does, exactly, in float64."""
    flow = import_oneflow()
    index, weights = resample_taps(planes.shape[2], preprocess)
    pixels = planes.to(flow.float64)
    for axis in (3, 2):  # Pillow's order: along the rows, then along the columns
        shape = [1, 1, 1, 1]
        shape[axis] = preprocess.size
        total: Any = 0.5  # rounds half up, with the floor below
        for tap, weight in zip(index.T, weights.T, strict=True):
            where = to_device(tap.astype(np.int64), planes.device)
            share = to_device((weight / (1 << WEIGHT_BITS)).reshape(shape), planes.device)
            total = flow.index_select(pixels, axis, where) * share + total
        pixels = total.floor().clamp(0, 255)
    return pixels


def forward_cuts(model: Any, cuts: tuple[str, ...]) -> Any:
    """Wrap a ResNet as a module that returns the features at every cut."""
    flow = import_oneflow()
    module: Any = flow.nn.Module
    stages = CUTS[:-1][: 1 + max(CUTS.index(cut) for cut in cuts)]

    class ForwardCuts(module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> list[Any]:
            net = self.model
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            taken = {}
            for stage in stages:
                x = getattr(net, stage)(x)
                taken[stage] = x
            if "avgpool" in cuts:
                taken["avgpool"] = flow.flatten(net.avgpool(x), 1)
            return [taken[cut] for cut in cuts]

    return ForwardCuts()
