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
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backbone import get_backbone
from ..cores import usable_cores
from ..frameworks import import_openvino
from ..preprocess import upscale
from ..weights import Weights
from ._images import check_images
from ._openvino_graph import build_graph

__all__ = ["OpenVinoEngine"]

# 32 images of 64 pixels, 2 of 224: less leaves the kernels idle, more leaves the cache.
_PIXELS_PER_PASS = 2**17
_MAX_IMAGES_PER_PASS = 32
_PASSES_PER_CALL = 4  # per core, so that one that is slowed down holds the others up less
# Each side of small images takes a graph of its own: 0.2 s to compile, and a copy of the weights.
_MAX_GRAPHS = 4


class OpenVinoEngine:
    """A frozen backbone with its BatchNorm folded away.

    Parameters
    ----------
    weights : Weights
        The checkpoint; its preprocessing is the input's.
    cuts : tuple of str
        Where features are taken.
    precision : str
        ``"f32"``, ``"bf16"`` or ``"f16"``: what the convolutions compute in, and what
        passes between them. Pixels are enlarged and normalised in float32 in any case.
    """

    def __init__(self, weights: Weights, cuts: tuple[str, ...], precision: str = "f32") -> None:
        self._ov = import_openvino()
        self._core = self._ov.Core()
        self._weights = weights
        self._size = weights.preprocess.size
        backbone = get_backbone(weights.backbone)
        self._shapes = {cut: backbone.cut_shape(cut, self._size) for cut in cuts}
        self._precision = precision
        self._threads = usable_cores()
        self._per_pass = max(1, min(_MAX_IMAGES_PER_PASS, _PIXELS_PER_PASS // self._size**2))
        self._queues: dict[int, Any] = {}

    @property
    def batch_size(self) -> int:
        """Images per call that keep every core busy; any other number works too."""
        return self._per_pass * self._threads * _PASSES_PER_CALL

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of uint8 pixels (N, s, s, 3), as `Engine.extract` does."""
        check_images(images, self._weights.preprocess)
        if self._is_one_too_many(images.shape[1]):
            images = upscale(images, self._size)
        queue = self._queue(images.shape[1])
        features = {
            cut: np.empty((len(images), *shape), np.float32) for cut, shape in self._shapes.items()
        }
        try:
            for start in range(0, len(images), self._per_pass):
                chunk = images[start : start + self._per_pass]
                queue.start_async({0: self._filled_up(chunk)}, (features, start, len(chunk)))
        finally:
            queue.wait_all()  # after Ctrl-C too: nothing may be under way when this returns
        return features

    def _is_one_too_many(self, side: int) -> bool:
        known = self._queues.keys() | {self._size}
        return side not in known and len(known) >= _MAX_GRAPHS

    def _filled_up(self, chunk: np.ndarray) -> np.ndarray:
        missing = self._per_pass - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), np.uint8)])
        return np.ascontiguousarray(chunk)  # flip views arrive with negative strides

    def _queue(self, side: int) -> Any:
        """Return the requests, one per core, for images of this side."""
        if side not in self._queues:
            model = build_graph(self._weights, tuple(self._shapes), side, self._per_pass)
            compiled = self._core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": getattr(self._ov.Type, self._precision),
                    "NUM_STREAMS": self._threads,
                    "INFERENCE_NUM_THREADS": self._threads,
                    # Decoders use the same cores: let the system place the threads.
                    "ENABLE_CPU_PINNING": False,
                },
            )
            queue = self._ov.AsyncInferQueue(compiled, self._threads)
            queue.set_callback(_collect)
            self._queues[side] = queue
        return self._queues[side]


def _collect(request: Any, place: tuple[dict[str, np.ndarray], int, int]) -> None:
    """Copy a finished pass to its rows."""
    features, start, count = place
    for index, array in enumerate(features.values()):
        array[start : start + count] = request.get_output_tensor(index).data[:count]
