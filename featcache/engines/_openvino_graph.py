"""A ResNet as an OpenVINO graph, put together from the checkpoint's arrays.

Uint8 pixels go in, one result per cut comes out. Enlarging, normalising and
BatchNorm are part of the graph, the last folded into the convolutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backbone import CUTS, get_backbone
from ..frameworks import import_openvino
from ..preprocess import WEIGHT_BITS, Preprocess, upscale_taps
from ..weights import Weights

__all__ = ["build_graph"]

_NORM_EPSILON = 1e-5  # torchvision's and flowvision's BatchNorm2d
_LOW_BITS = 10  # of a weight's 22: the 12 above them and a pixel's 8 fit into float32's 24


def build_graph(weights: Weights, cuts: tuple[str, ...], side: int, batch: int) -> Any:
    """Return the network for one shape of input.

    Parameters
    ----------
    weights : Weights
        The checkpoint and its preprocessing.
    cuts : tuple of str
        Where features are taken; the results are in this order.
    side : int
        Side s of the images, at most the preprocessing's size.
    batch : int
        Images per pass.

    Returns
    -------
    openvino.Model
        uint8 (batch, s, s, 3) -> float32 (batch, D) or (batch, C, H, W) per cut.
    """
    ov = import_openvino()
    images = ov.opset8.parameter([batch, side, side, 3], np.uint8, name="images")
    graph = _Graph(weights, ov.opset8)
    taken = graph.stages(graph.normalised(images, side, batch), cuts)
    return ov.Model([ov.opset8.result(taken[cut]) for cut in cuts], [images], weights.backbone)


class _Graph:
    """The parts of the network, as functions from node to node."""

    def __init__(self, weights: Weights, ops: Any) -> None:
        self._state = weights.state
        self._backbone = get_backbone(weights.backbone)
        self._preprocess = weights.preprocess
        self._ops = ops

    def normalised(self, images: Any, side: int, batch: int) -> Any:
        """Turn uint8 (N, s, s, 3) into the stem's input: float32 (N, 3, size, size).

        Rows of pixels stay in one piece, (N, H, W * 3), until the last step: that is the
        layout that the first convolution wants, and vectors of 3 would waste the processor.
        """
        ops, size = self._ops, self._preprocess.size
        rows = ops.reshape(images, np.array([batch, side, side * 3]), False)
        pixels = self._upscaled(rows, side) if side < size else ops.convert(rows, np.float32)
        scale, shift = _affine(self._preprocess)
        pixels = ops.subtract(pixels, np.tile(shift, size).reshape(1, 1, -1))
        pixels = ops.multiply(pixels, np.tile(scale, size).reshape(1, 1, -1))
        square = ops.reshape(pixels, np.array([batch, size, size, 3]), False)
        return ops.transpose(square, np.array([0, 3, 1, 2]))

    def _upscaled(self, rows: Any, side: int) -> Any:
        """Enlarge uint8 (N, s, s * 3) to float32 (N, size, size * 3), as `upscale` does."""
        ops = self._ops
        first, second, weights = upscale_taps(side, self._preprocess.size)
        channel = np.arange(3, dtype=np.int32)
        wide = self._blended(
            ops.gather(rows, (first[:, None] * 3 + channel).ravel(), np.int32(2)),
            ops.gather(rows, (second[:, None] * 3 + channel).ravel(), np.int32(2)),
            np.repeat(weights, 3, axis=0).reshape(1, 1, -1, 2),
        )
        wide = ops.convert(wide, np.uint8)
        return self._blended(
            ops.gather(wide, first, np.int32(1)),
            ops.gather(wide, second, np.int32(1)),
            weights.reshape(1, -1, 1, 2),
        )

    def _blended(self, first: Any, second: Any, weights: np.ndarray) -> Any:
        """Return round(first * w[..., 0] + second * w[..., 1]) of uint8, exact in float32.

        The sum needs 30 bits. Split into the weights' high and low bits, every product,
        sum and rounding below is a multiple of a power of two within float32's 24 bits.
        """
        ops = self._ops
        pair = [ops.convert(pixels, np.float32) for pixels in (first, second)]

        def total(part: np.ndarray) -> Any:
            exact = (part / (1 << WEIGHT_BITS)).astype(np.float32)
            return ops.add(
                ops.multiply(pair[0], exact[..., 0]), ops.multiply(pair[1], exact[..., 1])
            )

        low = weights & ((1 << _LOW_BITS) - 1)
        high = ops.add(total(weights - low), np.float32(0.5))
        whole = ops.floor(high)
        rest = ops.add(ops.subtract(high, whole), total(low))
        return ops.add(whole, ops.floor(rest))

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
        kernel, bias = self._folded(conv, norm)
        x = ops.convolution(x, kernel, [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
        return ops.add(x, bias.reshape(1, -1, 1, 1))

    def _folded(self, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a convolution's kernel and bias with its BatchNorm in them, as float32."""
        kernel = self._state[f"{conv}.weight"].astype(np.float64)
        weight, bias, mean, variance = (
            self._state[f"{norm}.{key}"].astype(np.float64)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        gain = weight / np.sqrt(variance + _NORM_EPSILON)
        folded = kernel * gain[:, None, None, None]
        return folded.astype(np.float32), (bias - mean * gain).astype(np.float32)


def _affine(preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift with (p / 255 - mean) / std = (p - shift) * scale, float32 (3,)."""
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    return (1 / (std * 255)).astype(np.float32), (mean * 255).astype(np.float32)
