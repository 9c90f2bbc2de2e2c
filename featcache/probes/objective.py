"""The objective of every linear head but ridge, its gradient, and a solution of it.

The objective, over N features x of D numbers, labels y and K classes, is ::

    f(W, b) = 1/N * sum_i -log softmax(W x_i + b)[y_i]  +  lambda/2 * ||W||^2

With V flip views the mean runs over all V * N of them: SGD draws one view per
image and epoch, which has that mean as its expectation. Where images have weights,
the mean is the weighted one, ``sum_i w_i loss_i / sum_i w_i``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .blocks import Features, each_block
from .weights import mean_1

# OpenBLAS multiplies small matrices without first copying them into another layout, which with
# few classes takes longer than the product. Its bounds for the product of scores
# (kernel/x86_64/sgemm_small_kernel_permit_skylakex.c): elements of the result, multiplications.
_SMALL_RESULT = 1200
_SMALL_PRODUCT = 1_000_000
_LEAST_TILE, _MOST_TILE = 32, 64  # rows: fewer cost more in calls than the copy did


class Penalty(Protocol):
    """The penalty of a recipe."""

    @property
    def weight_decay(self) -> float:
        """Lambda."""

    @property
    def decay_bias(self) -> bool:
        """Whether the bias is penalised too."""


@dataclass(frozen=True)
class Objective:
    """The objective at one head: value, gradients float64 (K, D) and (K,), and curvature.

    The curvature of the softmax is p (1 - p), averaged over features and classes.
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
    views: Sequence[Features],
    labels: np.ndarray,
    penalty: Penalty,
    weights: np.ndarray | None = None,
) -> Objective:
    """Return the value of f, its gradient and mean curvature, in one pass over the features.

    ``weights`` (N,) are of the images, equal by default. Blocks are computed in the precision of
    the features (N, D), float16 in float32; sums over blocks are float64. The pass needs a few
    megabytes for any N.
    """
    n, dim = views[0].shape
    total = len(views) * n
    dtype = np.result_type(views[0].dtype, np.float32)
    head = np.asarray(weight, dtype), np.asarray(bias, dtype)
    tile = _tile_rows(len(bias), dim)
    relative = None if weights is None else mean_1(weights).astype(dtype)

    def of_block(features: Features, rows: slice) -> _Sums:
        x, y = np.asarray(features[rows], dtype), labels[rows]
        w = None if relative is None else relative[rows]
        whole = len(x) // tile * tile if tile else 0
        sums = _Sums(weight.shape)
        if whole:
            tiled = None if w is None else w[:whole].reshape(-1, tile)
            sums.add(*head, x[:whole].reshape(-1, tile, dim), y[:whole].reshape(-1, tile), tiled)
        if whole < len(x):
            sums.add(
                *head, x[None, whole:], y[None, whole:], None if w is None else w[None, whole:]
            )
        return sums

    loss = curvature = 0.0
    weight_gradient = np.zeros(weight.shape)
    bias_gradient = np.zeros(bias.shape)
    for sums in each_block(views, of_block, dim + len(bias)):
        loss += sums.loss
        curvature += sums.curvature
        weight_gradient += sums.weight_gradient
        bias_gradient += sums.bias_gradient
    decay = penalty.weight_decay
    value = loss / total + decay / 2 * float(np.square(weight, dtype=np.float64).sum())
    weight_gradient = weight_gradient / total + decay * weight
    bias_gradient = bias_gradient / total
    if penalty.decay_bias:
        value += decay / 2 * float(np.square(bias, dtype=np.float64).sum())
        bias_gradient += decay * bias
    return Objective(value, weight_gradient, bias_gradient, curvature / (total * len(bias)))


def predict(features: Features, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the class with the highest score of features (N, D): int64 (N,), block by block."""
    transposed = weight.T.astype(np.float32)

    def of_block(features: Features, rows: slice) -> np.ndarray:
        scores = np.asarray(features[rows], np.float32) @ transposed
        classes: np.ndarray = (scores + bias.astype(np.float32)).argmax(axis=1)
        return classes

    predicted = each_block([features], of_block, sum(weight.shape) + len(bias))
    return np.concatenate([np.empty(0, np.int64), *predicted])


def _tile_rows(n_classes: int, dim: int) -> int:
    """Return how many rows make a small product, or 0 where they would be too few."""
    rows = min(_SMALL_RESULT // n_classes, _SMALL_PRODUCT // (n_classes * dim), _MOST_TILE)
    return rows if rows >= _LEAST_TILE else 0


class _Sums:
    """Loss, gradients and curvature, summed over rows."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.loss = self.curvature = 0.0
        self.weight_gradient = np.zeros(shape)
        self.bias_gradient = np.zeros(shape[0])

    def add(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
        w: np.ndarray | None,
    ) -> None:
        """Add tiles of rows: features (T, R, D), labels (T, R) and their weights (T, R)."""

        def weighted(values: np.ndarray) -> np.ndarray:
            return values if w is None else values * w[:, None]

        # Rows last: maximum and sum over classes then read memory in order.
        scores = np.matmul(weight, x.transpose(0, 2, 1))  # (T, K, R)
        scores += bias[:, None]
        scores -= scores.max(axis=1, keepdims=True)
        own = y[:, None]
        own_scores = np.take_along_axis(scores, own, axis=1)
        self.loss -= float(weighted(own_scores).sum(dtype=np.float64))
        p = np.exp(scores, out=scores)
        norms = p.sum(axis=1, keepdims=True)
        self.loss += float(weighted(np.log(norms)).sum(dtype=np.float64))
        p /= norms
        total = y.size if w is None else float(w.sum(dtype=np.float64))
        self.curvature += total - float(np.vdot(p, weighted(p)))  # sum of p (1 - p)
        np.put_along_axis(p, own, np.take_along_axis(p, own, axis=1) - 1, axis=1)
        residual = weighted(p)
        self.weight_gradient += np.matmul(residual, x).sum(axis=0)
        self.bias_gradient += residual.sum(axis=(0, 2), dtype=np.float64)


@dataclass(frozen=True)
class Solution:
    """A trained head, float32 (K, D) and (K,), and how its training ended.

    ``epochs`` are passes over the training features, ``steps`` updates of the head. ``converged``
    is None where the recipe sets a number of epochs and no tolerance.
    """

    weight: np.ndarray
    bias: np.ndarray
    epochs: int
    steps: int
    converged: bool | None
    objective: float
    gradient_norm: float
    wall_s: float
