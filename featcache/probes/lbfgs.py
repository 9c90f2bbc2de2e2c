"""The exact optimum of the linear probe: L-BFGS in coordinates that suit the features.

SciPy's L-BFGS does the optimising, on a problem that takes it tens of iterations instead of
hundreds. Near the optimum the Hessian is about the Kronecker product of A, the mean of
``diag(p) - p p^T`` over the rows, and S, the features' covariance, plus lambda I. In the
eigenbases of A and S that is diagonal; dividing each coordinate by its root gives a Hessian close
to the identity. The bias absorbs the mean, so the features are neither centred nor copied.

Two cheap steps come first: S from a part of the rows (it shapes the coordinates, not the
optimum), and a solution on a part of the rows to start from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..progress import OnProgress, Progress, silent
from .blocks import Features, Rows, one_blas_thread, some_rows
from .objective import Objective, Solution, objective
from .recipes import ExactRecipe
from .scaling import Moments, moments
from .weights import counted, mean_1

_MEMORY = 20  # pairs that L-BFGS keeps
_COVARIANCE_ROWS = 40  # times D: enough for the coordinates
_START_ROWS = 20  # times D
_START_TOLERANCE = 1e-3
_CURVATURE_ROWS = 4096
_SMALL = 1 << 23  # numbers: features up to this size are copied to float64, for the line search
# The decrement in these coordinates underestimates the gap, since the true Hessian has smaller
# curvatures than the product; on CIFAR-10 by a factor of at most 16.
_CAUTION = 20.0
# Where classes are almost separated the decrement says little, so the gain of the last iterations
# must be a small part of the tolerance too.
_WINDOW, _WINDOW_SHARE = 5, 0.25
_SEPARATED = 1e-3  # nats: the least objective that the tolerance is relative to
_FLAT = 1e-12  # a curvature that counts as zero
_STALE = 3.0  # a change of curvature that makes new coordinates worth losing the memory


def train_lbfgs(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ExactRecipe,
    *,
    weights: np.ndarray | None = None,
    start: Solution | None = None,
    coordinates: Moments | None = None,
    on_progress: OnProgress = silent,
) -> Solution:
    """Find the head that minimises the objective on features (N, D), one array per flip view.

    ``weights`` float64 (N,) are of the images, as `sample_weights` returns them; one of weight 0 is
    as if absent. ``start`` is a solution to start from, such as one at another penalty;
    ``coordinates`` are `coordinates_of` the features, shared by several penalties. ``steps`` of the
    solution counts iterations, ``epochs`` passes; ``converged`` is False where ``max_iterations``
    or the precision of the arithmetic ended it. Liu and Nocedal, "On the limited memory BFGS method
    for large scale optimization", Mathematical Programming 45 (1989), 503-528.
    """
    import scipy.optimize  # noqa: F401  # loads its own BLAS, which must exist to be limited

    started = time.perf_counter()
    views, labels, weights = counted(views, labels, weights)
    n, dim = views[0].shape
    dtype = np.result_type(views[0].dtype, np.float32)
    if len(views) * n * dim <= _SMALL:
        views = [np.asarray(features[:], np.float64) for features in views]
    with one_blas_thread():
        coordinates = coordinates or coordinates_of(views, weights)
        if start is not None:
            weight, bias = start.weight, start.bias
        else:
            weight, bias = _rough_head(views, labels, n_classes, recipe, weights, coordinates)
        descent = _Descent(views, labels, recipe, weights, coordinates, on_progress)
        weight, bias = descent.run(weight, bias)
    on_progress(Progress("probe", descent.iterations, descent.iterations, "iteration"))
    return Solution(
        weight=weight.astype(dtype),
        bias=bias.astype(dtype),
        epochs=descent.evaluations,
        steps=descent.iterations,
        converged=descent.converged,
        objective=descent.reached.value,
        gradient_norm=descent.reached.gradient_norm,
        wall_s=time.perf_counter() - started,
    )


def _rough_head(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ExactRecipe,
    weights: np.ndarray | None,
    coordinates: Moments,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a head to start from: solved on a part of the rows, or zeros for few rows."""
    n, dim = views[0].shape
    weight, bias = np.zeros((n_classes, dim)), np.zeros(n_classes)
    rows = some_rows(n, _START_ROWS * dim)
    if len(rows) > n // 2:
        return weight, bias
    part = [np.asarray(features[rows]) for features in views]
    rough = replace(recipe, tolerance=max(recipe.tolerance, _START_TOLERANCE))
    part_weights = None if weights is None else weights[rows]
    descent = _Descent(part, labels[rows], rough, part_weights, coordinates, silent)
    return descent.run(weight, bias)


def coordinates_of(views: Sequence[Features], weights: np.ndarray | None = None) -> Moments:
    """Return the moments of features (N, D) of each view, from a part of the rows."""
    n, dim = views[0].shape
    chosen = some_rows(n, _COVARIANCE_ROWS * dim // len(views))
    part = None if weights is None else weights[chosen]
    return moments([Rows(features, chosen) for features in views], part)


class _Converged(Exception):
    """Ends SciPy's loop, which not every version can stop in another way."""


class _Stale(Exception):
    """Ends SciPy's loop when the coordinates no longer fit the curvature."""


class _Descent:
    """One minimisation, restarted in new coordinates where the old ones no longer fit."""

    def __init__(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        recipe: ExactRecipe,
        weights: np.ndarray | None,
        coordinates: Moments,
        on_progress: OnProgress,
    ) -> None:
        self._views = views
        self._labels = labels
        self._recipe = recipe
        self._weights = weights
        self._coordinates = coordinates
        self._on_progress = on_progress
        self.iterations = 0
        self.evaluations = 0
        self.converged = False
        self.reached: Objective

    def run(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (K, D) and bias (K,) at the end, float64."""
        from scipy.optimize import minimize

        self._best = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
        self.reached = self._evaluate(*self._best)
        while not self.converged and self.iterations < self._recipe.max_iterations:
            self._set_curvature()
            try:
                minimize(
                    self._in_coordinates,
                    self._encode(*self._best),
                    jac=True,
                    method="L-BFGS-B",
                    callback=self._after_iteration,
                    options={
                        "maxcor": _MEMORY,
                        "maxiter": self._recipe.max_iterations - self.iterations,
                        "maxfun": 10 * self._recipe.max_iterations,
                        "ftol": 0.0,
                        "gtol": 0.0,
                    },
                )
            except _Converged:
                self.converged = True
            except _Stale:
                continue
            else:
                # No step lowers the objective: the optimum, or the limit of precision.
                self.converged = self.iterations < self._recipe.max_iterations and self._is_flat()
                break
        # SciPy's objects refer to this one in a cycle, and would keep the features in memory until
        # the garbage collector runs.
        self._views = ()
        return self._best

    def _set_curvature(self) -> None:
        self._curvature = max(self.reached.curvature, _FLAT)
        self._values = [self.reached.value]
        softmax = _softmax_curvature(*self._best, self._views[0], self._weights)
        curvatures, self._mix = np.linalg.eigh(softmax)
        curvatures = np.maximum(curvatures, 0)
        decay = self._recipe.weight_decay
        self._scale = np.sqrt(np.outer(curvatures, self._coordinates.variances) + decay)
        # Adding the same to all biases changes nothing: that direction has no curvature.
        self._free_scale = np.sqrt(np.maximum(curvatures, curvatures.max() * 1e-3 + _FLAT))

    def _encode(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        along = self._mix.T @ weight @ self._coordinates.directions * self._scale
        free = self._mix.T @ (bias + weight @ self._coordinates.mean) * self._free_scale
        return np.concatenate([along.ravel(), free])

    def _decode(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n_classes = len(self._mix)
        along, free = point[:-n_classes].reshape(n_classes, -1), point[-n_classes:]
        weight = self._mix @ (along / self._scale) @ self._coordinates.directions.T
        return weight, self._mix @ (free / self._free_scale) - weight @ self._coordinates.mean

    def _evaluate(self, weight: np.ndarray, bias: np.ndarray) -> Objective:
        self.evaluations += 1
        return objective(weight, bias, self._views, self._labels, self._recipe, self._weights)

    def _in_coordinates(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = self._decode(point)
        here = self._evaluate(weight, bias)
        if here.value <= self.reached.value:
            self.reached, self._best = here, (weight, bias)
        return here.value, self._gradient(here)

    def _gradient(self, here: Objective) -> np.ndarray:
        centred = here.weight_gradient - np.outer(here.bias_gradient, self._coordinates.mean)
        along = self._mix.T @ centred @ self._coordinates.directions / self._scale
        return np.concatenate([along.ravel(), self._mix.T @ here.bias_gradient / self._free_scale])

    def _allowed(self) -> float:
        return self._recipe.tolerance * max(self.reached.value, _SEPARATED)

    def _is_flat(self) -> bool:
        decrement = float(np.square(self._gradient(self.reached)).sum()) / 2
        return _CAUTION * decrement <= self._allowed()

    def _recent_gain(self) -> float:
        """Return the gain of the last `_WINDOW` iterations, or that many times the last gain."""
        if len(self._values) > _WINDOW:
            return self._values[-1 - _WINDOW] - self._values[-1]
        return _WINDOW * (self._values[-2] - self._values[-1])

    def _after_iteration(self, _: np.ndarray) -> None:
        self.iterations += 1
        self._on_progress(
            Progress("probe", self.iterations, None, "iteration", f"{self.reached.value:.6f}")
        )
        self._values.append(self.reached.value)
        if self._is_flat() and self._recent_gain() <= self._allowed() * _WINDOW_SHARE:
            raise _Converged
        ratio = max(self.reached.curvature, _FLAT) / self._curvature
        if not 1 / _STALE < ratio < _STALE:
            raise _Stale


def _softmax_curvature(
    weight: np.ndarray, bias: np.ndarray, features: Features, weights: np.ndarray | None
) -> np.ndarray:
    """Return the mean of ``diag(p) - p p^T`` over a part of the rows: float64 (K, K)."""
    rows = some_rows(len(features), _CURVATURE_ROWS)
    scores = np.asarray(features[rows], np.float32) @ weight.T.astype(np.float32) + bias
    scores -= scores.max(axis=1, keepdims=True)
    p = np.exp(scores)
    p /= p.sum(axis=1, keepdims=True)
    weighted = p if weights is None else p * mean_1(weights[rows])[:, None]
    return np.diag(weighted.mean(axis=0)) - p.T @ weighted / len(p)
