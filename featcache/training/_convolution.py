"""Convolution on a processor as a few large products, where OneFlow makes many small ones.

OneFlow 0.9.0 convolves on a CPU image by image, on one core: the columns of an image
(im2col), a product, and on the way back the slow sum of columns (col2im). Here the columns
of a block of images are laid out at once, channels last so that they are copied in long
runs, and multiplied in one product of NumPy's BLAS, which knows recent processors; blocks
go to as many threads as there are cores. Chellapilla, Puri, Simard, "High Performance
Convolutional Neural Networks for Document Processing", 2006.

Sums are taken in another order, so that results agree to rounding. The blocks depend on
shapes alone: the same numbers come out whatever the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..cores import usable_cores

__all__ = ["Geometry", "convolve", "convolve_back", "swap_convolutions"]

T = TypeVar("T")
R = TypeVar("R")

# Floats of columns per block: 2 MiB stay in a core's cache between their copy and the product.
# With a large kernel more: the BLAS lays it out anew for each product.
_BLOCK_FLOATS = 1 << 19
_BLOCK_KERNELS = 2
# Blocks per call, at least so many: for the cores.
_PARTS = 2
# Columns per partial sum of a weight's gradient, at least; and partial sums, at most.
_ROWS_PER_SUM = 1024
_MOST_SUMS = 16


@dataclass(frozen=True)
class Geometry:
    """The shapes of one convolution: square kernels, no dilation, no groups.

    Parameters
    ----------
    n, channels, height, width : int
        Of the input.
    filters, kernel, stride, padding : int
        Of the convolution.
    """

    n: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: int
    stride: int
    padding: int

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def depth(self) -> int:
        """Numbers that one output is a weighted sum of."""
        return self.kernel * self.kernel * self.channels

    @property
    def block_images(self) -> int:
        """Images whose columns are laid out at once."""
        floats = max(_BLOCK_FLOATS, _BLOCK_KERNELS * self.depth * self.filters)
        image_floats = self.out_height * self.out_width * self.depth
        return max(1, min(floats // image_floats, -(-self.n // _PARTS)))


def convolve(x: np.ndarray, weight: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Convolve.

    Parameters
    ----------
    x : numpy.ndarray
        float32 (N, C, H, W).
    weight : numpy.ndarray
        float32 (O, C, k, k).
    geometry : Geometry
        Of the two.

    Returns
    -------
    numpy.ndarray
        float32 (N, O, H', W').
    """
    g = geometry
    kernel = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(g.depth, g.filters)
    y = np.empty((g.n, g.filters, g.out_height, g.out_width), np.float32)

    def block(images: slice) -> None:
        columns = _columns(_padded(x[images], g), g)
        flat = (columns @ kernel).reshape(-1, g.out_height, g.out_width, g.filters)
        y[images] = flat.transpose(0, 3, 1, 2)

    _in_threads(block, _slices(0, g.n, g.block_images))
    return y


def convolve_back(
    x: np.ndarray, weight: np.ndarray, dy: np.ndarray, geometry: Geometry, *, with_input: bool
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the gradients of a convolution with respect to its input and its weight.

    Parameters
    ----------
    x, weight, geometry
        As for `convolve`.
    dy : numpy.ndarray
        float32 (N, O, H', W'), the gradient with respect to its output.
    with_input : bool
        Whether the first gradient is wanted.

    Returns
    -------
    dx : numpy.ndarray or None
        float32 (N, C, H, W).
    dweight : numpy.ndarray
        float32 (O, C, k, k).
    """
    g = geometry
    kernel = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(g.filters, g.depth)
    dx = np.empty_like(x) if with_input else None
    rows = g.n * g.out_height * g.out_width
    sums = max(_PARTS, min(_MOST_SUMS, rows // _ROWS_PER_SUM))

    def group(images: slice) -> np.ndarray:
        total = np.zeros((g.filters, g.depth), np.float32)
        for block in _slices(images.start, images.stop, g.block_images):
            columns = _columns(_padded(x[block], g), g)
            flat = np.ascontiguousarray(dy[block].transpose(0, 2, 3, 1)).reshape(-1, g.filters)
            total += flat.T @ columns
            if dx is not None:
                dx[block] = _summed(np.matmul(flat, kernel, out=columns), g)
        return total

    partial = _in_threads(group, _slices(0, g.n, -(-g.n // sums)))
    dweight = sum(partial[1:], partial[0]).reshape(g.filters, g.kernel, g.kernel, g.channels)
    return dx, np.ascontiguousarray(dweight.transpose(0, 3, 1, 2))


def swap_convolutions(network: Any, flow: Any) -> None:
    """Let every convolution of an OneFlow network on the CPU compute as above."""
    for module in network.modules():
        if isinstance(module, flow.nn.Conv2d) and module.groups == 1 and module.bias is None:
            module.forward = _forward(module, flow)


def _forward(module: Any, flow: Any) -> Callable[[Any], Any]:
    stride, padding = module.stride[0], module.padding[0]
    base: Any = flow.autograd.Function

    def geometry(x: Any) -> Geometry:
        n, channels, height, width = x.shape
        kernel = module.kernel_size[0]
        return Geometry(n, channels, height, width, module.out_channels, kernel, stride, padding)

    class Convolution(base):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            # Tensors alone are kept alive by ctx: any other attribute of it is freed at once.
            ctx.save_for_backward(x, weight)
            return flow.from_numpy(convolve(x.numpy(), weight.numpy(), geometry(x)))

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            x, weight = ctx.saved_tensors
            arrays = x.numpy(), weight.numpy(), dy.numpy()
            dx, dweight = convolve_back(*arrays, geometry(x), with_input=x.requires_grad)
            return None if dx is None else flow.from_numpy(dx), flow.from_numpy(dweight)

    return lambda x: Convolution.apply(x, module.weight)


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


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the results in order; the BLAS keeps to one thread meanwhile."""
    with _blas().limit(limits=1, user_api="blas"):
        return list(_pool().map(function, items))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="featcache-convolve")


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
