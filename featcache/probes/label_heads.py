"""The exact optimum of many binary logistic heads at once, one for each label.

The objective of one label, over the N images for which it is known, features x, labels y in {0, 1}
and weights v, is ::

    f(w, b) = sum_i v_i [log(1 + exp(w x_i + b)) - y_i (w x_i + b)] / sum_i v_i  +  lambda/2 ||w||^2

Every label has its own lambda, step and L-BFGS memory; what they share is the passes over the
features, which are all but the whole cost. A label that has reached its optimum takes no part in
further passes. The coordinates are the eigenvectors of the features' covariance S, centred: there
the Hessian is about p (1 - p) s + lambda on the diagonal, with which each L-BFGS begins.

Nocedal and Wright, "Numerical optimization", 2006, algorithms 3.1, 7.4 and 7.5.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..progress import OnProgress, Progress, silent
from .blocks import Features, each_block, one_blas_thread
from .scaling import Moments, moments_of_some

_MEMORY = 20  # pairs that L-BFGS keeps
_MEMORY_BYTES = 1 << 28  # of all pairs: more labels are trained in turns
_SMALL = 1 << 23  # numbers: features up to this size are copied to float64, for the line search
_CAUTION = 4.0  # the decrement underestimates the gap by less, on CIFAR-10 and on drawn features
_SEPARATED = 1e-3  # nats: the least objective that the tolerance is relative to
_DECREASE = 1e-4  # of the first-order decrease that a step must reach (Armijo)
_STALLED = 8  # steps without a decrease that end the search
_FLAT = 1e-12  # a curvature that counts as zero


@dataclass(frozen=True, eq=False)
class LabelHeads:
    """Heads of L labels, float32 (L, D) and (L,), and how their training ended.

    ``objective`` float64 (L,), ``converged`` bool (L,); ``passes`` over the features, of the label
    that needed most.
    """

    weight: np.ndarray
    bias: np.ndarray
    objective: np.ndarray
    converged: np.ndarray
    passes: int
    wall_s: float


@dataclass(frozen=True, eq=False)
class LabelObjective:
    """The objective of each label: value (L,), gradients (L, D) and (L,), mean of p (1 - p)."""

    value: np.ndarray
    weight_gradient: np.ndarray
    bias_gradient: np.ndarray
    curvature: np.ndarray


def label_totals(targets: np.ndarray, weights: np.ndarray | None, n_views: int) -> np.ndarray:
    """Return the weight of the known targets int8 (N, L) of all views: 1 / (lambda C), (L,)."""
    known = targets >= 0
    sums: np.ndarray = known.sum(axis=0) if weights is None else weights @ known
    return n_views * sums.astype(np.float64)


def label_objective(
    weight: np.ndarray,
    bias: np.ndarray,
    views: Sequence[Features],
    columns: np.ndarray,
    decay: np.ndarray,
    weights: np.ndarray | None = None,
) -> LabelObjective:
    """Return the objective of L heads in one pass over the features (N, D) of each view.

    ``columns`` are targets int8 (L, N), -1 where not known; ``decay`` (L,) is lambda. Blocks are
    computed in the precision of the features, float16 in float32; sums are float64.
    """
    dim = views[0].shape[1]
    dtype = np.result_type(views[0].dtype, np.float32)
    w, b = np.asarray(weight, dtype), np.asarray(bias, dtype)[:, None]
    counted = weights is not None or bool((columns < 0).any())
    relative = None if weights is None else (weights / weights.mean()).astype(dtype)

    def of_block(features: Features, rows: slice) -> tuple[np.ndarray, ...]:
        x, y = np.asarray(features[rows], dtype), columns[:, rows]
        z = w @ x.T  # (L, R)
        z += b
        small = np.exp(-np.abs(z))
        loss = np.log1p(small)
        loss += np.maximum(z, 0)
        loss -= y * z
        p = np.where(z >= 0, 1, small)
        p /= 1 + small
        residual = p - y
        bend = p * (1 - p)
        n = np.full(len(w), len(x), np.float64)
        if counted:
            share = (y >= 0).astype(dtype)
            if relative is not None:
                share *= relative[rows]
            for part in (loss, residual, bend):
                part *= share
            n = share.sum(axis=1, dtype=np.float64)
        sums = (part.sum(axis=1, dtype=np.float64) for part in (loss, residual, bend))
        return n, residual @ x, *sums

    totals, gradient, value, bias_gradient, curvature = (
        sum(parts) for parts in zip(*each_block(views, of_block, dim + 6 * len(w)), strict=True)
    )
    totals = np.maximum(totals, _FLAT)
    return LabelObjective(
        value / totals + decay / 2 * np.square(weight, dtype=np.float64).sum(axis=1),
        gradient / totals[:, None] + decay[:, None] * weight,
        bias_gradient / totals,
        curvature / totals,
    )


def train_labels(
    views: Sequence[Features],
    targets: np.ndarray,
    decay: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    start: LabelHeads | None = None,
    coordinates: Moments | None = None,
    tolerance: float = 1e-6,
    max_passes: int = 1000,
    on_progress: OnProgress = silent,
) -> LabelHeads:
    """Find the heads of L labels that minimise their objectives on features (N, D) of each view.

    Targets int8 (N, L) are 1, 0, or -1 where not known, which leaves the image out for that label;
    every label needs both a 0 and a 1. ``decay`` float64 (L,) is lambda of each: scikit-learn's C
    is 1 / (N * lambda). ``coordinates`` are `moments_of_some` of the features, where several calls
    share them. The search of a label ends where the estimated gap to its optimum is at most the
    ``tolerance`` times the objective, or times 0.001 nats where it is all but separated.
    """
    import scipy.optimize  # noqa: F401  # loads its own BLAS, which must exist to be limited

    started = time.perf_counter()
    n, dim = views[0].shape
    n_labels = targets.shape[1]
    if len(views) * n * dim <= _SMALL:
        views = [np.asarray(features[:], np.float64) for features in views]
    at_once = max(1, _MEMORY_BYTES // (2 * _MEMORY * (dim + 1) * 8))
    found = []
    with one_blas_thread():
        coordinates = coordinates or moments_of_some(views)
        for first in range(0, n_labels, at_once):
            part = slice(first, first + at_once)

            def report(done: int, first: int = first) -> None:
                on_progress(Progress("probe", first + done, n_labels, "label"))

            descent = _Descent(views, targets[:, part], decay[part], weights, coordinates)
            head = None if start is None else (start.weight[part], start.bias[part])
            found.append(descent.run(head, tolerance, max_passes, report))
    weight, bias, objective, converged, passes = zip(*found, strict=True)
    return LabelHeads(
        np.concatenate(weight).astype(np.float32),
        np.concatenate(bias).astype(np.float32),
        np.concatenate(objective),
        np.concatenate(converged),
        max(passes),
        time.perf_counter() - started,
    )


class _Descent:
    """Labels on their way to the optimum, in centred coordinates along eigenvectors: (L, D + 1)."""

    def __init__(
        self,
        views: Sequence[Features],
        targets: np.ndarray,
        decay: np.ndarray,
        weights: np.ndarray | None,
        coordinates: Moments,
    ) -> None:
        self._views, self._weights, self._coordinates = views, weights, coordinates
        self._columns = np.ascontiguousarray(targets.T)
        self._decay = decay
        # Below this a change of the objective is rounding.
        single = np.result_type(views[0].dtype, np.float32) == np.float32
        self._rounding = 2e-7 if single else 1e-13

    def run(self, head, tolerance, max_passes, report):  # type: ignore[no-untyped-def]
        """Return weight, bias, objective and whether it converged, of every label, and passes."""
        n_labels, dim = len(self._decay), self._views[0].shape[1]
        if head is None:
            weight, bias = np.zeros((n_labels, dim)), self._log_odds()
        else:
            weight, bias = (np.asarray(part, np.float64) for part in head)
        result = np.empty((n_labels, dim + 1)), np.empty(n_labels), np.zeros(n_labels, bool)
        active = np.arange(n_labels)
        point = self._encode(weight, bias)
        value, gradient, curvature = self._evaluate(point, active)
        memory = _Memory(n_labels, dim + 1)
        step, stalled = np.ones(n_labels), np.zeros(n_labels, np.int64)
        direction, slope = self._direct(memory, gradient, curvature, active)
        passes = 1
        while True:
            allowed = tolerance * np.maximum(value, _SEPARATED)
            flat = -slope / 2 * _CAUTION <= allowed
            ended = flat | (stalled >= _STALLED) | (passes >= max_passes)
            if ended.any():
                for whole, part in zip(result, (point, value, flat), strict=True):
                    whole[active[ended]] = part[ended]
                left = ~ended
                report(n_labels - int(left.sum()))
                if not left.any():
                    break
                active, point, value, gradient = (
                    part[left] for part in (active, point, value, gradient)
                )
                curvature, step, stalled, direction, slope = (
                    part[left] for part in (curvature, step, stalled, direction, slope)
                )
                memory.keep(left)
            trial = point + step[:, None] * direction
            there, gradient_there, curvature_there = self._evaluate(trial, active)
            passes += 1
            rounding = self._rounding * np.abs(value)
            # False for NaN and infinity too.
            good = there <= value + _DECREASE * step * slope + rounding
            stalled = np.where(good & (there < value - rounding), 0, stalled + 1)
            # The minimum of the parabola through both values and the slope.
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                shorter = -slope * step**2 / (2 * (there - value - step * slope))
            shorter = np.where(np.isfinite(shorter), shorter, 0)
            step = np.where(good, 1.0, np.clip(shorter, 0.1 * step, 0.5 * step))
            if good.any():
                memory.add(good, trial - point, gradient_there - gradient)
                point[good], value[good] = trial[good], there[good]
                gradient[good], curvature[good] = gradient_there[good], curvature_there[good]
                fresh, fresh_slope = self._direct(memory, gradient, curvature, active)
                direction[good], slope[good] = fresh[good], fresh_slope[good]
        weight, bias = self._decode(result[0])
        return weight, bias, result[1], result[2], passes

    def _log_odds(self) -> np.ndarray:
        """Return the bias that is best alone: log(positives / negatives) of each label."""
        share = np.ones(self._columns.shape[1]) if self._weights is None else self._weights
        positive, negative = (self._columns == 1) @ share, (self._columns == 0) @ share
        odds: np.ndarray = np.log(np.maximum(positive, _FLAT) / np.maximum(negative, _FLAT))
        return odds

    def _encode(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        free = bias + weight @ self._coordinates.mean
        return np.column_stack([weight @ self._coordinates.directions, free])

    def _decode(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = point[:, :-1] @ self._coordinates.directions.T
        return weight, point[:, -1] - weight @ self._coordinates.mean

    def _evaluate(
        self, point: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        head, decay = self._decode(point), self._decay[active]
        columns = self._columns if len(active) == len(self._columns) else self._columns[active]
        here = label_objective(*head, self._views, columns, decay, self._weights)
        centred = here.weight_gradient - np.outer(here.bias_gradient, self._coordinates.mean)
        gradient = np.column_stack([centred @ self._coordinates.directions, here.bias_gradient])
        return here.value, gradient, here.curvature

    def _direct(
        self, memory: _Memory, gradient: np.ndarray, curvature: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the direction of each label and the slope along it."""
        bend = np.maximum(curvature, _FLAT)[:, None]
        along = bend * self._coordinates.variances + self._decay[active, None]
        diagonal = np.column_stack([along, bend])
        direction = -memory.inverse_times(gradient, diagonal)
        slope = np.einsum("lp,lp->l", direction, gradient)
        uphill = slope >= 0
        if uphill.any():
            memory.forget(uphill)
            direction[uphill] = -gradient[uphill] / diagonal[uphill]
            slope[uphill] = np.einsum("lp,lp->l", direction[uphill], gradient[uphill])
        return direction, slope


class _Memory:
    """The last `_MEMORY` steps of each label and changes of its gradient."""

    def __init__(self, n_labels: int, size: int) -> None:
        self._steps = np.zeros((_MEMORY, n_labels, size))
        self._changes = np.zeros((_MEMORY, n_labels, size))
        self._rho = np.zeros((_MEMORY, n_labels))  # 0 where there is no pair
        self._newest = np.zeros(n_labels, np.int64)

    def add(self, labels: np.ndarray, step: np.ndarray, change: np.ndarray) -> None:
        """Add a pair to each of the labels, bool (L,), where the curvature along it is positive."""
        bend = np.einsum("lp,lp->l", step, change)
        size = np.einsum("lp,lp->l", change, change)
        chosen = np.flatnonzero(labels & (bend > 1e-14 * size))
        self._newest[chosen] = (self._newest[chosen] + 1) % _MEMORY
        at = self._newest[chosen], chosen
        self._steps[at], self._changes[at] = step[chosen], change[chosen]
        self._rho[at] = 1 / bend[chosen]

    def keep(self, labels: np.ndarray) -> None:
        """Forget the labels that have ended."""
        self._steps, self._changes = self._steps[:, labels], self._changes[:, labels]
        self._rho, self._newest = self._rho[:, labels], self._newest[labels]

    def forget(self, labels: np.ndarray) -> None:
        """Forget the pairs of labels, bool (L,)."""
        self._rho[:, labels] = 0

    def inverse_times(self, gradient: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        """Return the inverse Hessian times the gradient: the two loops of L-BFGS, all labels."""
        q, every = gradient.copy(), np.arange(len(gradient))
        alphas = []
        for back in range(_MEMORY):
            at = (self._newest - back) % _MEMORY, every
            alpha = self._rho[at] * np.einsum("lp,lp->l", self._steps[at], q)
            q -= alpha[:, None] * self._changes[at]
            alphas.append(alpha)
        q /= diagonal
        for back in reversed(range(_MEMORY)):
            at = (self._newest - back) % _MEMORY, every
            beta = self._rho[at] * np.einsum("lp,lp->l", self._changes[at], q)
            q += (alphas[back] - beta)[:, None] * self._steps[at]
        return q
