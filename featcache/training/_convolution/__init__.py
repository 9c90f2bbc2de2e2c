"""Convolution on a processor as a few large products, where OneFlow makes many small ones.

OneFlow 0.9.0 convolves on a CPU image by image, on one core: the columns of an image
(im2col), a product, and on the way back the slow sum of columns (col2im). Here whole blocks
of images are multiplied at once by NumPy's BLAS, which knows recent processors, on as many
threads as there are cores: by columns where maps are large, tap by tap where they are small.

Sums are taken in another order, so that results agree to rounding. The blocks depend on
shapes alone: the same numbers come out whatever the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._columns import convolve_back_by_columns, convolve_by_columns
from ._geometry import Geometry
from ._taps import convolve_back_by_taps, convolve_by_taps, mostly_inside

__all__ = ["Geometry", "convolve", "convolve_back", "swap_convolutions"]


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
