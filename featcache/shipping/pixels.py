"""The canonical pixels as nodes of an ONNX graph: Pillow's resize for images of any size.

Pillow resizes by two products with matrices of weights, first along the rows, then along the
columns, and rounds to uint8 after each (`featcache.preprocess`). ONNX's own Resize has no lanczos,
and other weights. So the graph computes Pillow's matrices from the image's height and width, in
float64 and then in multiples of 2 ** -22 as Pillow. A product of pixels with such a weight takes 30
bits; split into the weights' high and low bits, both fit into float32, and so do their sums.
"""

from __future__ import annotations

import numpy as np

from ..preprocess import WEIGHT_BITS, Preprocess
from .graph import Graph

_LOW_BITS = 10  # of a weight's 22
_INT, _REAL = np.int64, np.float64


def of_any_size(graph: Graph, image: str, preprocess: Preprocess) -> str:
    """Turn uint8 (1, H, W, 3) into the backbone's input, float32 (1, 3, size, size)."""
    shape = graph.op("Shape", image)
    height, width = (graph.op("Gather", shape, _INT(axis)) for axis in (1, 2))
    size = graph.constant(_INT(preprocess.size))
    nothing = graph.constant(_INT(0))
    resized, first = (size, size), (nothing, nothing)  # of rows and columns
    if preprocess.geometry == "square":
        side = graph.op("Min", height, width)
        starts = [_half(graph, graph.op("Sub", one, side)) for one in (height, width)]
        image = _cut(graph, image, starts, [graph.op("Add", one, side) for one in starts])
        height = width = side
    elif preprocess.geometry == "pad":
        resized = _padded_sides(graph, height, width, preprocess.size)
        margins = (_half(graph, graph.op("Sub", size, one)) for one in resized)
        top, left = (graph.op("Neg", one) for one in margins)
        first = top, left
    else:
        resized = _cropped_sides(graph, height, width, preprocess)
        top, left = (_offset(graph, one, preprocess) for one in resized)
        first = top, left
    pixels = graph.cast(graph.op("Transpose", image, perm=[0, 3, 1, 2]), np.float32)
    rows, columns = (
        _Weights(graph, length, side, start, preprocess)
        for length, side, start in zip((height, width), resized, first, strict=True)
    )
    pixels = _resized(graph, pixels, rows, columns, preprocess)
    if preprocess.geometry == "pad":
        inside = graph.op(
            "And",
            graph.op("Unsqueeze", rows.inside, np.array([1])),
            graph.op("Unsqueeze", columns.inside, np.array([0])),
        )
        fill = np.array(preprocess.fill, np.float32).reshape(1, 3, 1, 1)
        pixels = graph.op("Where", inside, pixels, fill)
    return _normalised(graph, pixels, preprocess)


def of_own_size(graph: Graph, images: str, preprocess: Preprocess) -> str:
    """Turn canonical pixels uint8 (N, size, size, 3) into the input, float32 (N, 3, size, size)."""
    pixels = graph.op("Transpose", images, perm=[0, 3, 1, 2])
    return _normalised(graph, graph.cast(pixels, np.float32), preprocess)


def _normalised(graph: Graph, pixels: str, preprocess: Preprocess) -> str:
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    shift, scale = (
        one.astype(np.float32).reshape(1, 3, 1, 1) for one in (mean * 255, 1 / (std * 255))
    )
    return graph.op("Mul", graph.op("Sub", pixels, shift), scale)


def _resized(
    graph: Graph, pixels: str, rows: _Weights, columns: _Weights, preprocess: Preprocess
) -> str:
    """Resize along both axes, and round after each: along the rows first, as a rule."""

    def rows_first() -> str:
        return columns.applied(rows.applied(pixels, along_rows=False), along_rows=True)

    def columns_first() -> str:
        return rows.applied(columns.applied(pixels, along_rows=True), along_rows=False)

    if preprocess.geometry == "square" or not _shrinks_height_first():
        return columns_first()
    width = graph.op("Max", columns.shrinks_by, _INT(0))
    tall = graph.op("Greater", rows.shrinks_by, graph.op("Mul", width, _INT(2)))
    return graph.either(tall, rows_first, columns_first)


def _shrinks_height_first() -> bool:
    """Tell whether Pillow resizes an image that loses much more height than width that way.

    From 13.0 on: where the height shrinks by more than twice as many pixels.
    """
    import PIL

    return int(PIL.__version__.partition(".")[0]) >= 13


def _half(graph: Graph, value: str) -> str:
    return graph.op("Div", value, _INT(2))


def _cut(graph: Graph, image: str, starts: list[str], ends: list[str]) -> str:
    """Take rows and columns of (1, H, W, 3)."""
    begin, end = (
        graph.op("Concat", *(graph.op("Unsqueeze", one, np.array([0])) for one in part), axis=0)
        for part in (starts, ends)
    )
    return graph.op("Slice", image, begin, end, np.array([1, 2]))


def _cropped_sides(
    graph: Graph, height: str, width: str, preprocess: Preprocess
) -> tuple[str, str]:
    """Return height and width after the resize, before the centre crop."""
    short = graph.constant(_INT(preprocess.resized))
    if preprocess.geometry == "squash":
        return short, short
    long = graph.op("Mul", graph.op("Max", height, width), short)
    long = graph.op("Div", long, graph.op("Min", height, width))
    upright = graph.op("LessOrEqual", width, height)
    return graph.op("Where", upright, long, short), graph.op("Where", upright, short, long)


def _padded_sides(graph: Graph, height: str, width: str, size: int) -> tuple[str, str]:
    longest = graph.cast(graph.op("Max", height, width), _REAL)
    ratio = graph.op("Div", longest, _REAL(size))

    def side(length: str) -> str:
        shorter = graph.op("Round", graph.op("Div", graph.cast(length, _REAL), ratio))
        return graph.op("Max", graph.cast(shorter, _INT), _INT(1))

    return side(height), side(width)


def _offset(graph: Graph, side: str, preprocess: Preprocess) -> str:
    """Return where the centre crop begins: half of the margin, of an odd one as rounding says."""
    margin = graph.op("Sub", side, _INT(preprocess.size))
    half = _half(graph, margin)
    if preprocess.rounding == "down":
        return half
    odd = (graph.op("Mod", one, _INT(2)) for one in (margin, half))
    return graph.op("Add", half, graph.op("Mul", *odd))


class _Weights:
    """Pillow's weights of one axis: (size, length), in multiples of 2 ** -22, as two float32."""

    def __init__(
        self, graph: Graph, length: str, resized: str, first: str, preprocess: Preprocess
    ) -> None:
        self._graph = graph
        self.shrinks_by = graph.op("Sub", length, resized)
        place = graph.op("Add", np.arange(preprocess.size, dtype=_INT), first)
        self.inside = graph.op(
            "And",
            graph.op("GreaterOrEqual", place, _INT(0)),
            graph.op("Less", place, resized),
        )
        source = graph.op("Range", _INT(0), length, _INT(1))

        # Distance of pixel k from the centre of place i, (2k + 1) / 2 - (2i + 1) / 2 * scale, is
        # a fraction of integers; only the division rounds.
        def twice(index: str, times: str, axis: int) -> str:
            odd = graph.op("Add", graph.op("Mul", index, _INT(2)), _INT(1))
            return graph.op("Unsqueeze", graph.op("Mul", odd, times), np.array([axis]))

        apart = graph.op("Sub", twice(source, resized, 0), twice(place, length, 1))
        stretch = graph.op("Mul", graph.op("Max", length, resized), _INT(2))
        x = graph.op("Abs", graph.cast(apart, _REAL))
        x = graph.op("Div", x, graph.cast(stretch, _REAL))
        exact = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos}[
            preprocess.interpolation
        ](graph, x)
        total = graph.op("ReduceSum", exact, np.array([1]), keepdims=1)
        none = graph.op("Equal", total, _REAL(0))
        exact = graph.op("Div", exact, graph.op("Where", none, _REAL(1), total))
        scaled = graph.op("Mul", exact, _REAL(1 << WEIGHT_BITS))
        size = graph.op("Floor", graph.op("Add", graph.op("Abs", scaled), _REAL(0.5)))
        fixed = graph.op("Mul", size, graph.op("Sign", scaled))
        low = _REAL(1 << _LOW_BITS)
        high = graph.op("Mul", graph.op("Floor", graph.op("Div", fixed, low)), low)
        self._parts = [
            graph.cast(graph.op("Mul", one, _REAL(2.0**-WEIGHT_BITS)), np.float32)
            for one in (high, graph.op("Sub", fixed, high))
        ]

    def applied(self, pixels: str, *, along_rows: bool) -> str:
        """Resize whole numbers, float32 (1, 3, H, W), along one axis; round and clip them."""
        op = self._graph.op
        high, low = (
            op("MatMul", pixels, op("Transpose", one, perm=[1, 0]))
            if along_rows
            else op("MatMul", one, pixels)
            for one in self._parts
        )
        high = op("Add", high, np.float32(0.5))
        whole = op("Floor", high)
        rest = op("Floor", op("Add", op("Sub", high, whole), low))
        return op("Clip", op("Add", whole, rest), np.float32(0), np.float32(255))


def _triangle(graph: Graph, x: str) -> str:
    return graph.op("Max", graph.op("Sub", _REAL(1), x), _REAL(0))


def _polynomial(graph: Graph, x: str, *coefficients: float) -> str:
    """Evaluate by Horner's rule, the highest power first."""
    value = graph.constant(_REAL(coefficients[0]))
    for one in coefficients[1:]:
        value = graph.op("Add", graph.op("Mul", value, x), _REAL(one))
    return value


def _cubic(graph: Graph, x: str) -> str:
    near = _polynomial(graph, x, 1.5, -2.5, 0, 1)
    far = _polynomial(graph, x, -0.5, 2.5, -4, 2)
    far = graph.op("Where", graph.op("Less", x, _REAL(2)), far, _REAL(0))
    return graph.op("Where", graph.op("Less", x, _REAL(1)), near, far)


def _lanczos(graph: Graph, x: str) -> str:
    def sinc(value: str) -> str:
        angle = graph.op("Mul", value, _REAL(np.pi))
        centre = graph.op("Equal", value, _REAL(0))
        whole = graph.op("Where", centre, _REAL(1), angle)
        return graph.op("Where", centre, _REAL(1), graph.op("Div", graph.op("Sin", angle), whole))

    product = graph.op("Mul", sinc(x), sinc(graph.op("Div", x, _REAL(3))))
    return graph.op("Where", graph.op("Less", x, _REAL(3)), product, _REAL(0))
