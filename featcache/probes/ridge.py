"""Ridge regression on one-hot labels: the head in closed form, for every penalty at once.

Minimises ``1/N * sum_i ||W x_i + b - y_i||^2 / 2  +  lambda/2 * ||W||^2`` with one-hot
y. One eigendecomposition of the features' covariance ``S = U diag(s) U^T`` gives the
optimum at every lambda: ``W = Y^T X_c / N  U diag(1 / (s + lambda)) U^T``. Its scores
rank classes and are no probabilities. Where images have weights, every mean is weighted.

References
----------
Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 2009,
sections 3.4.1 and 4.2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .blocks import Features, each_block
from .gram import gram_of
from .objective import Solution
from .scaling import moments, power_of_two, scaled
from .weights import counted, mean_1

_TINY = float(np.finfo(float).tiny)
_ROUNDING = 1e-6  # relative, of variances summed in float32


def train_ridge(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    weight_decay: float,
    weights: np.ndarray | None = None,
) -> Solution:
    """Return the optimum at one lambda, its objective computed from the residuals.

    The objective of `Ridge.solve` needs no pass and has four correct digits.
    """
    started = time.perf_counter()
    solution = Ridge(views, labels, n_classes, weights).solve(weight_decay)
    value = ridge_objective(solution.weight, solution.bias, views, labels, weight_decay, weights)
    return replace(solution, objective=value, wall_s=time.perf_counter() - started)


class Ridge:
    """The eigendecomposition of training features (N, D), one array per flip view.

    ``weights`` float64 (N,) are of the images; one of weight 0 is as if absent.
    """

    def __init__(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        n_classes: int,
        weights: np.ndarray | None = None,
    ) -> None:
        started = time.perf_counter()
        views, labels, weights = counted(views, labels, weights)
        self._unit = power_of_two(views)
        views = scaled(views, self._unit)
        self._gram = gram_of(views, weights, 1.0)
        if self._gram is not None:
            self._decompose_rows(labels, n_classes)
        else:
            self._decompose_features(views, labels, n_classes, weights)
        self._wall_s = time.perf_counter() - started

    def _decompose_rows(self, labels: np.ndarray, n_classes: int) -> None:
        """Take the eigenvectors of few rows: ``self._directions`` (N, N) are combinations."""
        gram = self._gram
        assert gram is not None
        labels = np.tile(labels, gram.n_rows // len(labels))
        self._n, self._mean = gram.n_rows, np.zeros(gram.n_rows)
        squares, directions = np.linalg.eigh(gram.products)
        self._shares = np.bincount(labels, gram.relative, minlength=n_classes) / self._n
        targets = (labels == np.arange(n_classes)[:, None]) - self._shares[:, None]
        # The centred rows are dependent: the least of the squares are rounding.
        roots = np.sqrt(np.maximum(squares, 1e-15 * max(squares[-1], _TINY)))
        self._variances = np.maximum(squares, 0) / self._n
        self._along = (targets * np.sqrt(gram.relative)) @ directions * roots / self._n
        self._directions = directions / roots

    def _decompose_features(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        n_classes: int,
        weights: np.ndarray | None,
    ) -> None:
        relative = None if weights is None else mean_1(weights)
        n, dim = views[0].shape
        self._n = n
        measured = moments(views, relative)
        self._mean, self._variances = measured.mean, measured.variances
        self._directions = measured.directions
        self._shares = np.bincount(labels, relative, minlength=n_classes) / n
        centre = measured.mean.astype(np.float32)

        def class_sums(features: Features, rows: slice) -> np.ndarray:
            x = np.asarray(features[rows], np.float32) - centre
            one_hot = labels[rows] == np.arange(n_classes)[:, None]
            targets = one_hot.astype(np.float32)
            if relative is not None:
                targets *= relative[rows].astype(np.float32)
            sums: np.ndarray = targets @ x
            return sums

        products = np.zeros((n_classes, dim))  # of centred features and labels, mean
        for sums in each_block(views, class_sums, dim + n_classes):
            products += sums / measured.total
        self._along = products @ self._directions

    def solve(self, weight_decay: float) -> Solution:
        """Return the optimum at one lambda: one product of (K, D) and (D, D)."""
        started = time.perf_counter()
        weight_decay /= self._unit**2
        along = self._along / (self._variances + weight_decay)
        weight = along @ self._directions.T
        bias = self._shares - weight @ self._mean
        # y (1 - y) is the variance of the labels; the fit explains a part of it.
        unexplained = (self._shares * (1 - self._shares)).sum()
        unexplained -= 2 * np.vdot(along, self._along)
        unexplained += np.vdot(along, along * self._variances)
        value = float(unexplained + weight_decay * np.square(along).sum()) / 2
        gradient = along * self._variances - self._along + weight_decay * along
        if self._gram is not None:
            weight, bias = self._gram.head(weight, bias)
        return Solution(
            weight=(weight / self._unit).astype(np.float32),
            bias=bias.astype(np.float32),
            epochs=1,
            steps=1,
            converged=True,
            objective=value,
            gradient_norm=float(np.linalg.norm(gradient)) * self._unit,
            wall_s=self._wall_s + time.perf_counter() - started,
        )

    @property
    def total_variance(self) -> float:
        """Sum of the features' variances."""
        return float(self._variances.sum()) * self._unit**2

    def gcv(self, weight_decay: float) -> float:
        """Return the generalized cross-validation of the one-hot labels at one lambda.

        Its formula and source are those of `regression`.
        """
        varying = self._variances > _ROUNDING * self._variances[-1]
        variances = self._variances[varying]
        explained = np.square(self._along[:, varying]).sum(axis=0) / variances
        left = 1 - degrees_of_freedom(variances, weight_decay / self._unit**2) / self._n
        total = float((self._shares * (1 - self._shares)).sum())
        loss = mean_squared_residual(total, explained, variances, weight_decay / self._unit**2)
        return loss / left**2 if left > _ROUNDING else math.inf


def degrees_of_freedom(variances: np.ndarray, decay: float) -> float:
    """Return the trace of the map from targets to fitted values, with a bias, at one lambda."""
    return 1 + float((variances / (variances + decay)).sum())


def mean_squared_residual(
    total: float, explained: np.ndarray, variances: np.ndarray, decay: float
) -> float:
    """Return it at one lambda as a sum without cancellation.

    ``total`` is the targets' variance, and ``explained`` (D,) what each of the directions with
    ``variances`` (D,) explains of it at lambda 0.
    """
    unexplained = max(0.0, total - float(explained.sum()))
    return unexplained + float(explained @ (decay / (variances + decay)) ** 2)


def ridge_objective(
    weight: np.ndarray,
    bias: np.ndarray,
    views: Sequence[Features],
    labels: np.ndarray,
    weight_decay: float,
    weights: np.ndarray | None = None,
) -> float:
    """Return the objective of any head, from its residuals."""
    transposed, offset = weight.T.astype(np.float32), bias.astype(np.float32)
    relative = None if weights is None else mean_1(weights).astype(np.float32)[:, None]

    def of_block(features: Features, rows: slice) -> float:
        x = np.asarray(features[rows], np.float32)
        residual = x @ transposed + offset
        residual[np.arange(len(x)), labels[rows]] -= 1
        weighted = residual if relative is None else residual * relative[rows]
        return float(np.vdot(residual, weighted))

    squares = sum(each_block(views, of_block, sum(weight.shape)))
    penalty = weight_decay * float(np.square(weight, dtype=np.float64).sum())
    return (squares / (len(views) * len(labels)) + penalty) / 2
