"""Convolution of maps of a few pixels, tap by tap: nothing is multiplied with the border's zeros.

Of the 36 numbers per channel that a padded 3x3 kernel meets on a map of 2x2, 20 are zeros
around it. Here every tap of the kernel is one product: the rectangle of pixels that it meets
inside the map, in all images, with the filters' weights at that tap. With pixels first in
memory such a rectangle is a matrix already, and the gradient of a tap's weights is a product
too, into its own place. Sums of taps are the price, which on large maps would be the larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from .._parallel import in_threads, slices
from ._geometry import Geometry

__all__ = ["convolve_back_by_taps", "convolve_by_taps", "mostly_inside"]

Rectangle = tuple[slice, slice]

# Of all products of taps and outputs, the share above which the border's zeros cost less than
# what sums of taps do: 0.69 on maps of 4x4 was faster so, 0.84 on 8x8 was not.
_INSIDE = 0.75
# Groups of images, for the cores: fixed, so that their number changes no result.
_PARTS = 2


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
