"""OpenVINO: the fast engine on processors.

How the work is laid out was measured on two Zen 4 cores, with ResNet-18 at 64 and at
224 pixels:

- One stream of one thread per core is 2 to 5 % faster than one stream of all cores, as
  no thread ever waits for another inside a layer. It also makes a feature's bits
  independent of the number of threads.
- A pass has a fixed number of images, and what is missing is filled up with black ones:
  a graph with a free batch size is compiled anew for every size that it meets, in the
  middle of the work. The kernels are then the same for every image, whatever stands
  beside it, and so are its features.
- Enlarging inside the graph costs next to nothing (17 us from 32 to 64 pixels, where
  Pillow takes 44), since the normalisation has to touch every pixel anyway.
- Two passes per core are under way, of one batch or of two (`OpenVinoEngine.start`): a core that
  ends its pass has the next one ready, and waits neither for Python nor for the other cores.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cores import usable_cores
from ..frameworks import import_openvino, openvino_core
from ..preprocess import check_pixels, upscale
from .architectures import CUTS, get_backbone
from .openvino_input import pixels_to_input
from .openvino_int8 import quantized
from .weights import Weights, images_per_pass

# Per core: enough that one core that is slowed down holds the others up less.
_PASSES_PER_CALL = 4
_PASSES_UNDER_WAY = 2
# A pass of one ResNet image then costs less than half of a filled-up one.
_MANY_PER_PASS = 16
# Each side of small images takes a graph of its own: 0.2 s to compile, and a copy of the weights.
_MAX_GRAPHS = 4


class OpenVinoEngine:
    """A frozen backbone with its BatchNorm folded away."""

    def __init__(
        self,
        weights: Weights,
        cuts: tuple[str, ...],
        precision: str = "f32",
        calibration: np.ndarray | None = None,
    ) -> None:
        self._ov = import_openvino()
        self._core = openvino_core()
        self._weights = weights
        self._size = weights.preprocess.size
        self._shapes = weights.shapes(cuts)
        self._precision = precision
        self._calibration = calibration
        self._threads = usable_cores()
        self._per_pass = images_per_pass(weights)
        # By the side of the images: requests that are free, one per pass under way at most.
        self._free: dict[int, list[Any]] = {}
        # What is under way, the oldest first: a request, its side, and the rows that it is for.
        self._running: deque[tuple[Any, int, dict[str, np.ndarray], slice]] = deque()

    @property
    def batch_size(self) -> int:
        """Images per call that keep every core busy; any other number works too."""
        return self._per_pass * self._threads * _PASSES_PER_CALL

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of uint8 pixels (N, s, s, 3), as `Engine.extract` does."""
        return self.start(images)()

    def for_few(self) -> OpenVinoEngine | None:
        """Return an engine whose passes are of one image, where that is much quicker for a few."""
        is_scaled = self._calibration is not None  # another graph would be scaled anew
        if is_scaled or self._weights.network is not None or self._per_pass < _MANY_PER_PASS:
            return None
        engine = copy.copy(self)
        engine._per_pass, engine._free, engine._running = 1, {}, deque()
        return engine

    def start(self, images: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
        """Start what `extract` does; the function that is returned waits for the features.

        Batches end in the order in which they were started.
        """
        check_pixels(images, self._weights.preprocess)
        if self._is_one_too_many(images.shape[1]):
            images = upscale(images, self._weights.preprocess)
        side = images.shape[1]
        features = {
            cut: np.empty((len(images), *shape), np.float32) for cut, shape in self._shapes.items()
        }

        def finish() -> dict[str, np.ndarray]:
            while any(passed is features for _, _, passed, _ in self._running):
                self._end_one()
            return features

        for start in range(0, len(images), self._per_pass):
            chunk = images[start : start + self._per_pass]
            rows, pixels = slice(start, start + len(chunk)), self._filled_up(chunk)
            request = self._request(side)
            request.start_async({0: pixels})  # which copies them
            self._running.append((request, side, features, rows))
        return finish

    def _is_one_too_many(self, side: int) -> bool:
        known = self._free.keys() | {self._size}
        most = 1 if self._calibration is not None else _MAX_GRAPHS
        return side not in known and len(known) >= most

    def _filled_up(self, chunk: np.ndarray) -> np.ndarray:
        missing = self._per_pass - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), np.uint8)])
        return np.ascontiguousarray(chunk)  # flip views arrive with negative strides

    def _request(self, side: int) -> Any:
        """Return a free request for images of this side; wait for the oldest if there is none."""
        if side not in self._free:
            model = build_graph(self._weights, tuple(self._shapes), side, self._per_pass)
            precision = self._precision
            if self._calibration is not None:
                model, precision = quantized(model, self._calibration), "f32"
            compiled = self._core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": getattr(self._ov.Type, precision),
                    "NUM_STREAMS": self._threads,
                    "INFERENCE_NUM_THREADS": self._threads,
                    # Decoders use the same cores: let the system place the threads.
                    "ENABLE_CPU_PINNING": False,
                },
            )
            n = _PASSES_UNDER_WAY * self._threads
            self._free[side] = [compiled.create_infer_request() for _ in range(n)]
        while not self._free[side]:
            self._end_one()
        return self._free[side].pop()

    def _end_one(self) -> None:
        """Wait for the oldest pass, and copy its features to their rows."""
        request, side, features, rows = self._running[0]
        request.wait()
        for index, array in enumerate(features.values()):
            array[rows] = request.get_output_tensor(index).data[: rows.stop - rows.start]
        self._free[side].append(self._running.popleft()[0])


_NORM_EPSILON = 1e-5  # torchvision's BatchNorm2d


def build_graph(weights: Weights, cuts: tuple[str, ...], side: int, batch: int) -> Any:
    """Return the network for one shape of input, uint8 (batch, side, side, 3)."""
    ov = import_openvino()
    images = ov.opset8.parameter([batch, side, side, 3], np.uint8, name="images")
    x = pixels_to_input(ov.opset8, images, side, batch, weights.preprocess)
    if weights.network is None:
        taken = ResnetGraph(weights, ov.opset8).stages(x, cuts)
        results = [ov.opset8.result(taken[cut]) for cut in cuts]
        return ov.Model(results, [images], weights.backbone)
    graph = weights.network.graph(cuts, batch)
    for reader in graph.inputs[0].get_target_inputs():
        reader.replace_source_output(x.output(0))
    return ov.Model(graph.get_results(), [images], "converted")


class ResnetGraph:
    """A ResNet with its BatchNorm folded, as functions from node to node.

    ``ops`` has OpenVINO's operators, or others by their names.
    """

    def __init__(self, weights: Weights, ops: Any) -> None:
        self._state = weights.state
        self._backbone = get_backbone(weights.backbone)
        self._ops = ops

    def stages(self, x: Any, cuts: tuple[str, ...]) -> dict[str, Any]:
        """Run the stem and the stages up to the last cut; return cut -> node."""
        ops = self._ops
        x = ops.relu(self._conv(x, "conv1", "bn1", stride=2, pad=3))
        x = ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
        taken = {}
        deepest = max(CUTS.index(cut) for cut in cuts)
        for number, blocks in enumerate(self._backbone.blocks[: deepest + 1], start=1):
            for index in range(blocks):
                stride = 2 if number > 1 and index == 0 else 1
                x = self._block(x, f"layer{number}.{index}", stride)
            taken[f"layer{number}"] = x
        if "avgpool" in cuts:
            taken["avgpool"] = ops.reduce_mean(x, np.array([2, 3]), False)
        return taken

    def _block(self, x: Any, name: str, stride: int) -> Any:
        ops = self._ops
        shortcut = x
        if f"{name}.downsample.0.weight" in self._state:
            shortcut = self._conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
        if self._backbone.bottleneck:  # torchvision's ResNet-50 has the stride in the 3x3
            x = ops.relu(self._conv(x, f"{name}.conv1", f"{name}.bn1"))
            x = ops.relu(self._conv(x, f"{name}.conv2", f"{name}.bn2", stride=stride, pad=1))
            x = self._conv(x, f"{name}.conv3", f"{name}.bn3")
        else:
            x = ops.relu(self._conv(x, f"{name}.conv1", f"{name}.bn1", stride=stride, pad=1))
            x = self._conv(x, f"{name}.conv2", f"{name}.bn2", pad=1)
        return ops.relu(ops.add(x, shortcut))

    def _conv(self, x: Any, conv: str, norm: str, *, stride: int = 1, pad: int = 0) -> Any:
        ops = self._ops
        # The operators themselves would make a list of Python numbers of an array: a second.
        constant = import_openvino().op.Constant
        kernel, bias = self._folded(conv, norm)
        x = ops.convolution(x, constant(kernel), [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
        return ops.add(x, constant(bias.reshape(1, -1, 1, 1)))

    def _folded(self, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a convolution's kernel and bias with its BatchNorm in them, as float32."""
        kernel = self._state[f"{conv}.weight"]
        weight, bias, mean, variance = (
            self._state[f"{norm}.{key}"].astype(np.float64)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        gain = weight / np.sqrt(variance + _NORM_EPSILON)
        folded = np.empty(kernel.shape, np.float32)  # multiplied as float64, block by block
        np.multiply(kernel, gain[:, None, None, None], out=folded, casting="same_kind")
        return folded, (bias - mean * gain).astype(np.float32)
