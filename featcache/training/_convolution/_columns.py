"""Convolution by columns: what every output sees laid out in a row, and one product of all.

A block of images at a time, channels last so that columns are copied in long runs.
Chellapilla, Puri, Simard, "High Performance Convolutional Neural Networks for Document
Processing", 2006.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .._parallel import in_threads, slices
from ._geometry import Geometry

__all__ = ["convolve_back_by_columns", "convolve_by_columns"]

# Floats of columns per block: 2 MiB stay in a core's cache between their copy and the product.
# With a large kernel more: the BLAS lays it out anew for each product.
_BLOCK_FLOATS = 1 << 19
_BLOCK_KERNELS = 2
# Blocks per call, at least so many: for the cores.
_PARTS = 2
# Columns per partial sum of a weight's gradient, at least; and partial sums, at most.
_ROWS_PER_SUM = 1024
_MOST_SUMS = 16


def convolve_by_columns(x: np.ndarray, weight: np.ndarray, g: Geometry, y: np.ndarray) -> None:
    """Convolve x (N, C, H, W) with weight (O, C, k, k) into y (N, O, H', W'), all float32."""
    kernel = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(g.depth, g.filters)

    def block(images: slice) -> None:
        columns = _columns(_padded(x[images], g), g)
        flat = (columns @ kernel).reshape(-1, g.out_height, g.out_width, g.filters)
        y[images] = flat.transpose(0, 3, 1, 2)

    in_threads(block, slices(0, g.n, _block_images(g)))


def convolve_back_by_columns(
    x: np.ndarray,
    weight: np.ndarray,
    dy: np.ndarray,
    g: Geometry,
    dx: np.ndarray | None,
    dweight: np.ndarray,
) -> None:
    """Compute both gradients; arguments as `convolve_back` has them."""
    kernel = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(g.filters, g.depth)
    rows = g.n * g.out_height * g.out_width
    sums = max(_PARTS, min(_MOST_SUMS, rows // _ROWS_PER_SUM))
    block_images = _block_images(g)

    def group(images: slice) -> np.ndarray:
        total = np.zeros((g.filters, g.depth), np.float32)
        for block in slices(images.start, images.stop, block_images):
            columns = _columns(_padded(x[block], g), g)
            flat = np.ascontiguousarray(dy[block].transpose(0, 2, 3, 1)).reshape(-1, g.filters)
            total += flat.T @ columns
            if dx is not None:
                dx[block] = _summed(np.matmul(flat, kernel, out=columns), g)
        return total

    partial = in_threads(group, slices(0, g.n, -(-g.n // sums)))
    total = sum(partial[1:], partial[0]).reshape(g.filters, g.kernel, g.kernel, g.channels)
    dweight[...] = total.transpose(0, 3, 1, 2)


def _block_images(g: Geometry) -> int:
    """Return how many images' columns are laid out at once."""
    floats = max(_BLOCK_FLOATS, _BLOCK_KERNELS * g.depth * g.filters)
    image_floats = g.out_height * g.out_width * g.depth
    return max(1, min(floats // image_floats, -(-g.n // _PARTS)))


def _padded(x: np.ndarray, g: Geometry) -> np.ndarray:
    """Return images with channels last and zeros around them."""
    p = g.padding
    padded = np.zeros((len(x), g.height + 2 * p, g.width + 2 * p, g.channels), np.float32)
    padded[:, p : p + g.height, p : p + g.width] = x.transpose(0, 2, 3, 1)
    return padded


def _columns(padded: np.ndarray, g: Geometry) -> np.ndarray:
    """Return what each output sees, a row each: float32 (n H' W', k k C)."""
    image, row, column, channel = padded.strides
    # A row of the kernel over neighbouring pixels, channels last, is one run of memory.
    windows = as_strided(
        padded,
        (len(padded), g.out_height, g.out_width, g.kernel, g.kernel * g.channels),
        (image, row * g.stride, column * g.stride, row, channel),
        writeable=False,
    )
    return windows.copy().reshape(-1, g.depth)


def _summed(columns: np.ndarray, g: Geometry) -> np.ndarray:
    """Add up columns where they came from: the transpose of `_columns` and `_padded`."""
    p, s = g.padding, g.stride
    high, wide = g.out_height, g.out_width
    parts = columns.reshape(-1, high, wide, g.kernel, g.kernel, g.channels)
    shape = (len(parts), g.height + 2 * p, g.width + 2 * p, g.channels)
    total = np.zeros(shape, np.float32)
    for i in range(g.kernel):
        for j in range(g.kernel):
            total[:, i : i + s * high : s, j : j + s * wide : s] += parts[:, :, :, i, j]
    return total[:, p : p + g.height, p : p + g.width].transpose(0, 3, 1, 2)
