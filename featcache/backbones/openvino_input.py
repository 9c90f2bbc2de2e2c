"""OpenVINO's input as nodes of its graph, which enlarge and normalise pixels."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from ..frameworks import import_openvino
from ..preprocess import WEIGHT_BITS, Preprocess, resample_taps

_LOW_BITS = 10  # of a weight's 22: the 12 above them and a pixel's 8 fit into float32's 24


def pixels_to_input(ops: Any, images: Any, side: int, batch: int, preprocess: Preprocess) -> Any:
    """Turn a node of pixels into the backbone's input.

    Rows of pixels stay in one piece, (N, H, W * 3), until the last step: that is the
    layout that the first convolution wants, and vectors of 3 would waste the processor.

    ``ops`` are OpenVINO's operators, such as ``openvino.opset8``; ``images`` is uint8
    (batch, side, side, 3), the result float32 (batch, 3, size, size).
    """
    size = preprocess.size
    rows = ops.reshape(images, np.array([batch, side, side * 3]), False)
    pixels = _upscaled(ops, rows, side, preprocess) if side < size else _as_float(ops, rows)
    # (p / 255 - mean) / std = (p - shift) * scale
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    scale, shift = (1 / (std * 255)).astype(np.float32), (mean * 255).astype(np.float32)
    pixels = ops.subtract(pixels, np.tile(shift, size).reshape(1, 1, -1))
    pixels = ops.multiply(pixels, np.tile(scale, size).reshape(1, 1, -1))
    square = ops.reshape(pixels, np.array([batch, size, size, 3]), False)
    return ops.transpose(square, np.array([0, 3, 1, 2]))


def _as_float(ops: Any, pixels: Any) -> Any:
    return ops.convert(pixels, np.float32)


def _upscaled(ops: Any, rows: Any, side: int, preprocess: Preprocess) -> Any:
    """Enlarge uint8 (N, s, s * 3) to float32 (N, size, size * 3), as `upscale` does."""
    index, weights = resample_taps(side, preprocess)
    channel = np.arange(3, dtype=np.int32)
    along = (index.T[:, :, None] * 3 + channel).reshape(len(index.T), -1)
    blended = _blended if len(along) == 2 else _filtered
    wide = blended(ops, rows, 2, along, np.repeat(weights.T, 3, axis=1)[:, None, None, :])
    wide = ops.convert(wide, np.uint8)
    return _as_float(ops, blended(ops, wide, 1, index.T, weights.T[:, None, :, None]))


def _blended(ops: Any, rows: Any, axis: int, index: np.ndarray, weights: np.ndarray) -> Any:
    """Return the rounded sum of rows[index[k]] * weights[k] for two taps, exact in float32.

    The sum needs 30 bits. Split into the weights' high and low bits, every product, sum
    and rounding below is a multiple of a power of two within float32's 24 bits. One kernel
    does it all, and keeps float32 inside where the network is in half precision.
    """
    first, second = (_as_float(ops, ops.gather(rows, where, np.int32(axis))) for where in index)

    def total(part: np.ndarray) -> Any:
        exact = (part / (1 << WEIGHT_BITS)).astype(np.float32)
        return ops.add(ops.multiply(first, exact[0]), ops.multiply(second, exact[1]))

    low = weights & ((1 << _LOW_BITS) - 1)
    high = ops.add(total(weights - low), np.float32(0.5))
    whole = ops.floor(high)
    rest = ops.add(ops.subtract(high, whole), total(low))
    return ops.add(whole, ops.floor(rest))


def _filtered(ops: Any, rows: Any, axis: int, index: np.ndarray, weights: np.ndarray) -> Any:
    """Return the same for any number of taps, clipped to 0 to 255, in int32.

    More taps are more than one kernel, and what passes between kernels would be rounded where
    the network is in half precision; integers are not. OpenVINO divides them as floats, and
    shifts them 10 times more slowly: the quotient of the highest 8 bits alone is exact.
    """
    taps = (ops.convert(ops.gather(rows, where, np.int32(axis)), np.int32) for where in index)
    products = (ops.multiply(tap, weight) for tap, weight in zip(taps, weights, strict=True))
    most = np.int32(255 << WEIGHT_BITS)
    total = ops.add(reduce(ops.add, products), np.int32(1 << WEIGHT_BITS >> 1))
    total = ops.minimum(ops.maximum(total, np.int32(0)), most)
    whole = import_openvino().opset13.bitwise_and(total, most)
    return ops.divide(whole, np.int32(1 << WEIGHT_BITS))
