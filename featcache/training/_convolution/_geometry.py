"""The shapes of one convolution."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Geometry"]


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
