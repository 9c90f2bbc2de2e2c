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
_TINY = float(np.finfo(float).tiny)
_KEPT = 1 << 26  # numbers: probabilities up to these are kept between products with a Hessian
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

    def gap(self, weight_decay: float, mean: np.ndarray) -> float:
        """Return a bound on how far the value is above the optimum, for features of a mean (D,).

        Minimised over the bias, the objective is strongly convex in W with modulus lambda. What
        the bias of the centred features lacks is by its own curvature, near its optimum.
        """
        centred = self.weight_gradient - np.outer(self.bias_gradient, mean)
        bound = float(np.vdot(centred, centred)) / (2 * weight_decay)
        left = float(self.bias_gradient @ self.bias_gradient)
        return bound + left / (2 * max(self.curvature, _TINY))


def objective(
    weight: np.ndarray,
    bias: np.ndarray,
    views: Sequence[Features],
    labels: np.ndarray,
    penalty: Penalty,
    weights: np.ndarray | None = None,
    least: type[np.floating] = np.float32,
) -> Objective:
    """Return the value of f, its gradient and mean curvature, in one pass over the features.

    ``weights`` (N,) are of the images, equal by default. Blocks are computed in the precision of
    the features (N, D), or in the ``least`` one where that is finer; sums over blocks are float64.
    The pass needs a few megabytes for any N.
    """
    n, dim = views[0].shape
    total = len(views) * n
    dtype = np.result_type(views[0].dtype, least)
    head = np.asarray(weight, dtype), np.asarray(bias, dtype)
    tile = _tile_rows(len(bias), dim)
    relative = None if weights is None else mean_1(weights).astype(dtype)

    def of_block(features: Features, rows: slice) -> _Sums:
        x, y = np.asarray(features[rows], dtype), labels[rows]
        w = None if relative is None else relative[rows]
        sums = _Sums(weight.shape)
        for part, n_rows in _tiles(len(x), tile):
            tiled = None if w is None else w[part].reshape(-1, n_rows)
            sums.add(*head, x[part].reshape(-1, n_rows, dim), y[part].reshape(-1, n_rows), tiled)
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


class Hessian:
    """The Hessian of f at one head, (K, D) and (K,): products with it, each in one pass.

    The bias is not penalised. Products are in the precision of the features, float32 at least. The
    first one keeps the probabilities for the others, where they are few.
    """

    def __init__(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        views: Sequence[Features],
        weight_decay: float,
        weights: np.ndarray | None = None,
    ) -> None:
        n, dim = views[0].shape
        self._dtype = np.result_type(views[0].dtype, np.float32)
        self._head = np.asarray(weight, self._dtype), np.asarray(bias, self._dtype)
        self._views = views
        self._decay = weight_decay
        self._relative = None if weights is None else mean_1(weights).astype(self._dtype)
        self._tile = _tile_rows(len(bias), dim)
        self._keeps = len(views) * n * len(bias) <= _KEPT
        self._kept: dict[tuple[int, int], np.ndarray] = {}

    def times(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the Hessian times a pair of the head's shapes, float64."""
        along = np.asarray(weight, self._dtype), np.asarray(bias, self._dtype)
        total, dim = sum(map(len, self._views)), weight.shape[1]
        product, bias_product = np.zeros(weight.shape), np.zeros(bias.shape)

        def of_block(features: Features, rows: slice) -> list[tuple[np.ndarray, np.ndarray]]:
            x = np.asarray(features[rows], self._dtype)
            return [
                self._of_tiles(
                    x[part].reshape(-1, n_rows, dim), (id(features), rows.start + part.start), along
                )
                for part, n_rows in _tiles(len(x), self._tile)
            ]

        for parts in each_block(self._views, of_block, dim + 3 * len(bias)):
            for one, other in parts:
                product += one
                bias_product += other
        return product / total + self._decay * weight, bias_product / total

    def _of_tiles(
        self, x: np.ndarray, place: tuple[int, int], along: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums over tiles of rows (T, R, D) that begin at a place."""
        across = x.transpose(0, 2, 1)
        p = self._kept.get(place)
        if p is None:
            p = np.matmul(self._head[0], across)  # (T, K, R)
            p += self._head[1][:, None]
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            if self._keeps:
                self._kept[place] = p
        change = np.matmul(along[0], across)
        change += along[1][:, None]
        change -= np.einsum("tkr,tkr->tr", p, change)[:, None]
        change *= p
        if self._relative is not None:
            first = place[1]
            change *= self._relative[first : first + x.shape[0] * x.shape[1]].reshape(len(x), 1, -1)
        return np.matmul(change, x).sum(axis=0), change.sum(axis=(0, 2), dtype=np.float64)


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


def _tiles(n: int, rows: int) -> list[tuple[slice, int]]:
    """Return the part of n rows that tiles of so many cover, and the rest as one tile."""
    whole = n // rows * rows if rows else 0
    parts = ((slice(0, whole), rows), (slice(whole, n), n - whole))
    return [(part, size) for part, size in parts if part.stop > part.start]


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
        p = np.exp(scores, out=scores)
        # Apart from the label's own, so that nothing cancels where classes are separated: its
        # residual p - 1 is minus the others' share, and the loss the logarithm of 1 and a bit.
        np.put_along_axis(p, own, 0, axis=1)
        others = p.sum(axis=1, keepdims=True)
        own_p = np.exp(own_scores)
        loss = np.log1p(others + (own_p - 1)) - own_scores
        norms = others + own_p
        others /= norms
        p /= norms
        np.put_along_axis(p, own, -others, axis=1)
        residual = weighted(p)
        self.loss += float(weighted(loss).sum(dtype=np.float64))
        # The sum of p (1 - p).
        self.curvature += 2 * float(weighted(others).sum(dtype=np.float64))
        self.curvature -= float(np.vdot(p, residual))
        self.weight_gradient += np.matmul(residual, x).sum(axis=0)
        self.bias_gradient += residual.sum(axis=(0, 2), dtype=np.float64)


@dataclass(frozen=True)
class Solution:
    """A trained head, float32 (K, D) and (K,), and how its training ended.

    ``epochs`` are passes over the training features, ``steps`` updates of the head. ``converged``
    is None where the recipe sets a number of epochs and no tolerance. ``gap`` bounds how far the
    objective is above its optimum, where that is known.
    """

    weight: np.ndarray
    bias: np.ndarray
    epochs: int
    steps: int
    converged: bool | None
    objective: float
    gradient_norm: float
    wall_s: float
    gap: float | None = None
