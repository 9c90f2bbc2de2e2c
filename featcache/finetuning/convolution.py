"""Convolution on a processor as a few large products, where OneFlow makes many small ones.

OneFlow 0.9.0 convolves on a CPU image by image, on one core: the columns of an image
(im2col), a product, and on the way back the slow sum of columns (col2im). Here whole blocks
of images are multiplied at once by NumPy's BLAS, which knows recent processors, on as many
threads as there are cores: by columns where maps are large, tap by tap where they are small.

Sums are taken in another order, so that results agree to rounding. The blocks depend on
shapes alone: the same numbers come out whatever the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..cores import usable_cores


def convolve(
    x: np.ndarray, weight: np.ndarray, geometry: Geometry, out: np.ndarray | None = None
) -> np.ndarray:
    """Convolve.

    Parameters
    ----------
    x : numpy.ndarray
        float32 (N, C, H, W).
    weight : numpy.ndarray
        float32 (O, C, k, k).
    geometry : Geometry
        Of the two.
    out : numpy.ndarray, optional
        Where the result goes.

    Returns
    -------
    numpy.ndarray
        float32 (N, O, H', W').
    """
    y = np.empty(geometry.out_shape, np.float32) if out is None else out
    way = convolve_by_columns if mostly_inside(geometry) else convolve_by_taps
    way(x, weight, geometry, y)
    return y


def convolve_back(
    x: np.ndarray,
    weight: np.ndarray,
    dy: np.ndarray,
    geometry: Geometry,
    dx: np.ndarray | None,
    dweight: np.ndarray,
) -> None:
    """Compute the gradients of a convolution with respect to its input and its weight.

    Parameters
    ----------
    x, weight, geometry
        As for `convolve`.
    dy : numpy.ndarray
        float32 (N, O, H', W'), the gradient with respect to its output.
    dx : numpy.ndarray or None
        float32 (N, C, H, W), where the first one goes; None: it is not wanted.
    dweight : numpy.ndarray
        float32 (O, C, k, k), where the second one goes.
    """
    way = convolve_back_by_columns if mostly_inside(geometry) else convolve_back_by_taps
    way(x, weight, dy, geometry, dx, dweight)


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

    # OneFlow copies every gradient that a function returns, at a tenth of the memory's speed. So
    # that of the weight is put in its place by hand; a number stands for it, so that there is
    # something to differentiate by.
    moving, still = flow.zeros(1, requires_grad=True), flow.zeros(1)

    class Convolution(base):
        @staticmethod
        def forward(ctx: Any, x: Any, anchor: Any) -> Any:
            # Tensors alone are kept alive by ctx: any other attribute of it is freed at once.
            ctx.save_for_backward(x)
            # The memory is OneFlow's own: an array of NumPy's that a tensor shares is let go of
            # by a thread of OneFlow's, which waits for Python's lock: at exit, for ever or worse.
            y = flow.empty(*geometry(x).out_shape, device="cpu")
            convolve(x.numpy(), module.weight.numpy(), geometry(x), y.numpy())
            return y

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            (x,) = ctx.saved_tensors
            weight = module.weight
            dx = flow.empty(*x.shape, device="cpu") if x.requires_grad else None
            dweight = flow.empty(*weight.shape, device="cpu")
            into = None if dx is None else dx.numpy(), dweight.numpy()
            convolve_back(x.numpy(), weight.numpy(), dy.numpy(), geometry(x), *into)
            weight.grad = dweight if weight.grad is None else weight.grad + dweight
            return dx, flow.zeros(1)

    return lambda x: Convolution.apply(x, moving if module.weight.requires_grad else still)


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


Rectangle = tuple[slice, slice]

# Of all products of taps and outputs, the share above which the border's zeros cost less than
# what sums of taps do: 0.69 on maps of 4x4 was faster so, 0.84 on 8x8 was not.
_INSIDE = 0.75
# Groups of images, for the cores: fixed, so that their number changes no result.


@dataclass(frozen=True)
class _Tap:
    """One position of the kernel.

    Parameters
    ----------
    row, column : int
        In the kernel.
    outputs, inputs : tuple of 2 slices
        The rectangle of outputs that it adds to, and that of the pixels that it reads.
    """

    row: int
    column: int
    outputs: Rectangle
    inputs: Rectangle


def mostly_inside(geometry: Geometry) -> bool:
    """Return whether the kernel seldom meets the border."""
    g = geometry
    inside = sum(_area(tap.outputs) for tap in _taps(g))
    return inside > _INSIDE * g.kernel**2 * g.out_height * g.out_width


def convolve_by_taps(x: np.ndarray, weight: np.ndarray, g: Geometry, y: np.ndarray) -> None:
    """Convolve x (N, C, H, W) with weight (O, C, k, k) into y (N, O, H', W'), all float32."""
    kernel = _kernel(weight, g)

    def group(images: slice) -> None:
        pixels = _pixels_first(x[images])
        sums = np.zeros((g.out_height, g.out_width, pixels.shape[2], g.filters), np.float32)
        for tap in _taps(g):
            part = sums[tap.outputs]
            part += (_rows(pixels[tap.inputs]) @ kernel[tap.row, tap.column].T).reshape(part.shape)
        y[images] = sums.transpose(2, 3, 0, 1)

    in_threads(group, _groups(g))


def convolve_back_by_taps(
    x: np.ndarray,
    weight: np.ndarray,
    dy: np.ndarray,
    g: Geometry,
    dx: np.ndarray | None,
    dweight: np.ndarray,
) -> None:
    """Compute both gradients; arguments as `convolve_back` has them."""
    pixels, above = _pixels_first(x), _pixels_first(dy)
    dweight[...] = 0  # a tap that meets the border alone has no gradient

    def weights_of(tap: _Tap) -> None:
        own = _rows(above[tap.outputs]).T @ _rows(pixels[tap.inputs])
        dweight[:, :, tap.row, tap.column] = own

    def inputs_of(images: slice, kernel: np.ndarray, into: np.ndarray) -> None:
        part = above[:, :, images]
        sums = np.zeros((g.height, g.width, part.shape[2], g.channels), np.float32)
        for tap in _taps(g):
            place = sums[tap.inputs]
            place += (_rows(part[tap.outputs]) @ kernel[tap.row, tap.column]).reshape(place.shape)
        into[images] = sums.transpose(2, 3, 0, 1)

    work: list[Callable[[], None]] = [partial(weights_of, tap) for tap in _taps(g)]
    if dx is not None:
        kernel = _kernel(weight, g)
        work = [*(partial(inputs_of, images, kernel, dx) for images in _groups(g)), *work]
    in_threads(lambda piece: piece(), work)


@cache
def _taps(g: Geometry) -> tuple[_Tap, ...]:
    """Return the taps that meet a pixel anywhere."""
    return tuple(
        _Tap(row, column, (high, wide), (down, right))
        for row, high, down in _reach(g, g.height, g.out_height)
        for column, wide, right in _reach(g, g.width, g.out_width)
    )


def _reach(g: Geometry, side: int, out_side: int) -> list[tuple[int, slice, slice]]:
    """Return, along one side, each tap, the outputs where it meets a pixel, and those pixels."""
    found = []
    for tap in range(g.kernel):
        first = max(0, -(-(g.padding - tap) // g.stride))
        last = min(out_side - 1, (side - 1 + g.padding - tap) // g.stride)
        if first <= last:
            begin = first * g.stride + tap - g.padding
            end = last * g.stride + tap - g.padding + 1
            found.append((tap, slice(first, last + 1), slice(begin, end, g.stride)))
    return found


def _groups(g: Geometry) -> list[slice]:
    return slices(0, g.n, -(-g.n // _PARTS))


def _kernel(weight: np.ndarray, g: Geometry) -> np.ndarray:
    """Return the weights (k, k, O, C), laid out by all cores."""
    kernel = np.empty((g.kernel, g.kernel, g.filters, g.channels), np.float32)

    def some(filters: slice) -> None:
        kernel[:, :, filters] = weight[filters].transpose(2, 3, 0, 1)

    in_threads(some, slices(0, g.filters, -(-g.filters // _PARTS)))
    return kernel


def _pixels_first(maps: np.ndarray) -> np.ndarray:
    """Return maps (N, C, H, W) as (H, W, N, C)."""
    return np.ascontiguousarray(maps.transpose(2, 3, 0, 1))


def _rows(rectangle: np.ndarray) -> np.ndarray:
    """Return a rectangle (h, w, N, C) as (h w N, C)."""
    return rectangle.reshape(-1, rectangle.shape[-1])


def _area(rectangle: Rectangle) -> int:
    high, wide = rectangle
    return (high.stop - high.start) * (wide.stop - wide.start)


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
    def out_shape(self) -> tuple[int, int, int, int]:
        """N, O, H', W'."""
        return self.n, self.filters, self.out_height, self.out_width

    @property
    def depth(self) -> int:
        """Numbers that one output is a weighted sum of."""
        return self.kernel * self.kernel * self.channels


T = TypeVar("T")
R = TypeVar("R")


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Cut a range into slices of ``step``, the last one shorter."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
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
