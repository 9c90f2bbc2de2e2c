"""Ridge regression on one-hot labels: the head in closed form, for every penalty at once.

Minimises ``1/N * sum_i ||W x_i + b - y_i||^2 / 2  +  lambda/2 * ||W||^2`` with one-hot
y. One eigendecomposition of the features' covariance ``S = U diag(s) U^T`` gives the
optimum at every lambda: ``W = Y^T X_c / N  U diag(1 / (s + lambda)) U^T``. Its scores
rank classes and are no probabilities.

References
----------
Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 2009,
sections 3.4.1 and 4.2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from .objectives import block_rows
from .solution import Solution

__all__ = ["Ridge", "ridge_objective"]


class Ridge:
    """The decomposition of one set of training features.

    Parameters
    ----------
    views : sequence of numpy.ndarray
        (N, D) each, float16 or float32; one per flip view.
    labels : numpy.ndarray
        int64 (N,), in [0, n_classes).
    n_classes : int
        K.
    """

    def __init__(self, views: Sequence[np.ndarray], labels: np.ndarray, n_classes: int) -> None:
        started = time.perf_counter()
        n, dim = views[0].shape
        self._total = len(views) * n
        self._shares = np.bincount(labels, minlength=n_classes) / n
        rows = block_rows(dim)
        shift = np.asarray(views[0][0], np.float32)  # keeps squares small in float32
        sums, squares = np.zeros(dim), np.zeros((dim, dim))
        by_class = np.zeros((n_classes, dim))
        for features in views:
            for first in range(0, n, rows):
                x = np.asarray(features[first : first + rows], np.float32) - shift
                sums += x.sum(axis=0, dtype=np.float64)
                squares += x.T @ x
                np.add.at(by_class, labels[first : first + rows], x)
        shifted = sums / self._total
        self._mean = shifted + shift
        self._products = by_class / self._total - np.outer(self._shares, shifted)
        covariance = squares / self._total - np.outer(shifted, shifted)
        self._variances, self._directions = np.linalg.eigh(covariance)
        self._along = self._products @ self._directions
        self._wall_s = time.perf_counter() - started

    def solve(self, weight_decay: float) -> Solution:
        """Return the optimum at one lambda; a second one costs one product of (K, D) and (D, D)."""
        started = time.perf_counter()
        scale = np.clip(self._variances, 0, None) + weight_decay
        weight = (self._along / scale) @ self._directions.T
        bias = self._shares - weight @ self._mean
        # Of the shares y (1 - y) is the labels' own variance; the fit explains a part of it.
        unexplained = (self._shares * (1 - self._shares)).sum()
        unexplained -= 2 * np.vdot(weight, self._products)
        unexplained += np.vdot(self._along / scale, self._along / scale * self._variances)
        value = float(unexplained + weight_decay * np.square(weight).sum()) / 2
        covariance_part = (self._along / scale * self._variances) @ self._directions.T
        gradient = covariance_part - self._products + weight_decay * weight
        return Solution(
            weight=weight.astype(np.float32),
            bias=bias.astype(np.float32),
            epochs=1,
            steps=1,
            converged=True,
            objective=value,
            gradient_norm=float(np.linalg.norm(gradient)),
            wall_s=self._wall_s + time.perf_counter() - started,
        )


def ridge_objective(
    weight: np.ndarray,
    bias: np.ndarray,
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    weight_decay: float,
) -> float:
    """Return the objective at any head, from the residuals themselves."""
    squares, rows = 0.0, block_rows(views[0].shape[1])
    transposed, offset = weight.T.astype(np.float32), bias.astype(np.float32)
    for features in views:
        for first in range(0, len(labels), rows):
            x = np.asarray(features[first : first + rows], np.float32)
            residual = x @ transposed + offset
            residual[np.arange(len(x)), labels[first : first + rows]] -= 1
            squares += float(np.vdot(residual, residual))
    penalty = weight_decay * float(np.square(weight, dtype=np.float64).sum())
    return (squares / (len(views) * len(labels)) + penalty) / 2
