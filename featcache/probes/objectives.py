"""What a linear head minimises, whoever minimises it.

The objective, over N features x of D numbers, labels y and K classes, is ::

    f(W, b) = 1/N * sum_i -log softmax(W x_i + b)[y_i]  +  lambda/2 * ||W||^2

With V flip views the mean runs over all V * N of them: SGD draws one view per
image and epoch, which has that mean as its expectation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Objective", "Penalty", "block_rows", "objective"]

_BLOCK_BYTES = 4 << 20  # of features at once: what fits a core's cache is read from memory once


class Penalty(Protocol):
    """What the objective needs to know of a recipe."""

    @property
    def weight_decay(self) -> float:
        """Lambda."""

    @property
    def decay_bias(self) -> bool:
        """Whether the bias is in the penalty too."""


@dataclass(frozen=True)
class Objective:
    """The objective at one head.

    Parameters
    ----------
    value : float
        f(W, b).
    weight_gradient, bias_gradient : numpy.ndarray
        float64 (K, D) and (K,).
    curvature : float
        p (1 - p), averaged over features and classes: how much the softmax curves here.
    """

    value: float
    weight_gradient: np.ndarray
    bias_gradient: np.ndarray
    curvature: float

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient with respect to W and b."""
        parts = self.weight_gradient, self.bias_gradient
        return math.sqrt(sum(float(np.square(part).sum()) for part in parts))


def objective(
    weight: np.ndarray,
    bias: np.ndarray,
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    penalty: Penalty,
) -> Objective:
    """Return the value of f, its gradient and mean curvature.

    One pass over the features, in blocks, in their own precision (float16 in
    float32); sums over blocks are float64. Needs a few megabytes whatever N.

    Parameters
    ----------
    weight, bias : numpy.ndarray
        (K, D) and (K,).
    views : sequence of numpy.ndarray
        Features (N, D) of each view; float16, float32 or float64, memory-mapped or not.
    labels : numpy.ndarray
        int64 (N,).
    penalty : ProbeRecipe, or anything with ``weight_decay`` and ``decay_bias``
        The penalty's strength and reach.

    Returns
    -------
    Objective
    """
    n, dim = views[0].shape
    total = len(views) * n
    dtype = np.result_type(views[0].dtype, np.float32)
    rows = block_rows(dim + len(bias))
    transposed, offset = weight.T.astype(dtype), bias.astype(dtype)
    loss = curvature = 0.0
    weight_gradient = np.zeros(weight.shape)
    bias_gradient = np.zeros(bias.shape)
    for features in views:
        for start in range(0, n, rows):
            x = np.asarray(features[start : start + rows], dtype)
            y = labels[start : start + rows]
            scores = x @ transposed
            scores += offset
            scores -= scores.max(axis=1, keepdims=True)
            picked = np.arange(len(y)), y
            loss -= float(scores[picked].sum(dtype=np.float64))
            residual = np.exp(scores, out=scores)
            norms = residual.sum(axis=1)
            loss += float(np.log(norms).sum(dtype=np.float64))
            residual /= norms[:, None]
            curvature += len(y) - float(np.vdot(residual, residual))  # sum of p (1 - p)
            residual[picked] -= 1
            weight_gradient += residual.T @ x
            bias_gradient += residual.sum(axis=0, dtype=np.float64)
    decay = penalty.weight_decay
    value = loss / total + decay / 2 * float(np.square(weight, dtype=np.float64).sum())
    weight_gradient = weight_gradient / total + decay * weight
    bias_gradient = bias_gradient / total
    if penalty.decay_bias:
        value += decay / 2 * float(np.square(bias, dtype=np.float64).sum())
        bias_gradient += decay * bias
    return Objective(value, weight_gradient, bias_gradient, curvature / (total * len(bias)))


def block_rows(numbers_per_row: int) -> int:
    """Return how many rows of so many float32 numbers make a block."""
    return max(256, _BLOCK_BYTES // (4 * numbers_per_row))
