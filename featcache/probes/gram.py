"""The exact optimum for few rows, from the matrix of their inner products.

The optimum is a combination of the rows, ``W = A X`` with A of shape (K, N), so the matrix
``X X^T`` (N, N) is all that the search needs of the features: its cost does not grow with their
dimension. The bias absorbs the mean.

Newton's method, in the metric of ``X X^T``: conjugate gradients solve for the Hessian
``X X^T D / N + lambda``, where D is the softmax's curvature, preconditioned by the same matrix
with the mean curvature in place of D, by its Cholesky factor. The start is least squares, scaled
to the least objective: with more dimensions than rows it separates the classes already.

The end is proven. Minimised over the bias, the objective is strongly convex with modulus lambda,
so its distance to the optimum is at most ``|gradient|^2 / (2 lambda)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from ..progress import OnProgress, Progress
from .blocks import Features
from .recipes import ExactRecipe
from .weights import mean_1

_ROWS = 2048  # of all views: up to these
_LEAST_DIMENSIONS = 0.5  # times the rows: with fewer, passes over the features cost less
_RIDGE = 0.5  # of the mean variance of a row: the penalty of the first least squares
_OTHER_RIDGE = 8.0  # the factor by which a better penalty differs that is worth a factorisation
_INNER = 60  # products for one Newton step
_PATIENCE = 12  # Newton steps that do not halve the bound: the limit of precision
_ROUGH = 1e-4  # a tolerance from which on Newton's decrement is proof enough
_CAUTION = 2.5  # it is that of one step
_LEAST_STEP = 1e-6  # of a Newton step
_TINY = float(np.finfo(float).tiny)


class Report:
    """Counts iterations and reports them, with the bound on the distance to the optimum."""

    def __init__(self, on_progress: OnProgress, until: float) -> None:
        self._on_progress = on_progress
        self._until = until
        self.iterations = 0

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() >= self._until

    def __call__(self, value: float, gap: float, iterations: int = 1) -> None:
        """Add iterations that ended at an objective with this gap at most."""
        self.iterations += iterations
        bound = f", at most {gap:.1e} above the optimum" if gap < value else ""
        self._on_progress(
            Progress("probe", self.iterations, None, "iteration", f"{value:.6f}{bound}")
        )


def gram_of(
    views: Sequence[Features], weights: np.ndarray | None, least: float = _LEAST_DIMENSIONS
) -> Gram | None:
    """Return the inner products of rows (N, D), or None of many, or more than D / ``least``."""
    total = sum(map(len, views))
    if total > _ROWS or views[0].shape[1] < least * total:
        return None
    return Gram(views, weights)


class Gram:
    """Inner products (N, N) of centred rows, stacked from all views; several penalties share them.

    A row of weight w counts w times: it is scaled by its root.
    """

    def __init__(self, views: Sequence[Features], weights: np.ndarray | None) -> None:
        self._rows = np.concatenate([np.asarray(features[:], np.float64) for features in views])
        self.n_rows = len(self._rows)
        relative = np.ones(len(views[0])) if weights is None else mean_1(weights)
        self.relative = np.tile(relative, len(views))
        self.mean = self.relative @ self._rows / self.n_rows
        self._rows -= self.mean
        if weights is not None:
            self._rows *= np.sqrt(self.relative)[:, None]
        self.products = self._rows @ self._rows.T
        self.variance = float(np.trace(self.products)) / self.n_rows
        self._factors: dict[float, np.ndarray] = {}

    def times(self, combination: np.ndarray) -> np.ndarray:
        """Return a combination (K, N) times the inner products."""
        found: np.ndarray = combination @ self.products
        return found

    def solver(self, ridge: float) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return what solves (K, N) for the inner products plus a penalty, unless not definite."""
        from scipy.linalg.lapack import dpotrf, dpotrs

        factor = self._factors.get(ridge)
        if factor is None:
            shifted = self.products.copy()
            shifted.flat[:: self.n_rows + 1] += ridge
            factor, failed = dpotrf(shifted.T, lower=True, overwrite_a=True, clean=False)
            if failed:
                return None
            self._factors = {ridge: factor}

        def solved(right: np.ndarray) -> np.ndarray:
            answer: np.ndarray = dpotrs(factor, right.T, lower=True)[0]
            return answer.T

        return solved

    def head(self, combination: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (K, D) and bias (K,) of a combination (K, N) and the centred rows' bias."""
        weight: np.ndarray = combination @ self._rows
        return weight, bias - weight @ self.mean


def solve(
    gram: Gram, labels: np.ndarray, n_classes: int, recipe: ExactRecipe, report: Report
) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    """Return weight (K, D) and bias (K,), float64, and whether they are within the tolerance.

    The search also ends with the recipe's iterations, and at the limit of precision or time.
    """
    labels = np.tile(labels, gram.n_rows // len(labels))
    A, free, converged = _Search(gram, labels, n_classes, recipe, report).run()
    return gram.head(A, free), converged


class _Search:
    """One minimisation over combinations (K, N) of the rows, and a free bias (K,)."""

    def __init__(
        self, gram: Gram, labels: np.ndarray, n_classes: int, recipe: ExactRecipe, report: Report
    ) -> None:
        self._gram = gram
        self._own = labels, np.arange(len(labels))
        self._shape = n_classes, len(labels)
        self._recipe = recipe
        self._decay = recipe.weight_decay
        self._report = report
        self._roots = np.sqrt(gram.relative)
        self._done = 0

    def run(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return the combination, the bias of the centred rows, and whether it converged."""
        n_classes, n = self._shape
        gram, allowed, most = self._gram, self._recipe.tolerance, self._recipe.max_iterations
        ridge = max(_RIDGE * gram.variance, self._decay * n)
        A, free = self._least_squares(ridge)
        best, stuck, last = math.inf, 0, math.inf
        while True:
            KA = gram.times(A)
            value, p, residual = self._at(A, KA, free)
            residual *= gram.relative
            slope = residual / self._roots / n + self._decay * A
            free_slope = residual.sum(axis=1) / n
            curvature = float((p * (1 - p) @ gram.relative).sum()) / (n * max(n_classes - 1, 1))
            curvature = max(curvature, _TINY)
            # The bias has no penalty: its part of the bound is by its own curvature.
            bound = float(np.vdot(slope, gram.times(slope))) / (2 * self._decay)
            bound += float(free_slope @ free_slope) / (2 * curvature)
            self._report(value, bound, self._done)
            self._done = 0
            stuck = 0 if bound < best / 2 else stuck + 1
            best = min(best, bound)
            near = bound <= allowed * value or (allowed >= _ROUGH and last <= allowed * value)
            over = self._report.late or self._report.iterations >= most or stuck >= _PATIENCE
            if near or over or not bound < math.inf:
                return A, free, near
            wanted = self._decay * n / curvature
            if not 1 / _OTHER_RIDGE < ridge / wanted < _OTHER_RIDGE:
                ridge = wanted
            found = self._newton_step(
                (slope, free_slope), p, curvature, ridge, value, allowed * value / bound
            )
            if found is None:
                return A, free, False
            dA, KdA, dfree, decrement = found
            size = 1.0
            while not (
                self._at(A + size * dA, KA + size * KdA, free + size * dfree)[0]
                <= value - 1e-4 * size * decrement
            ):
                size /= 2
                if size < _LEAST_STEP:
                    return A, free, False  # no step lowers the objective: the limit of precision
            A, free = A + size * dA, free + size * dfree
            last = _CAUTION * decrement / 2 if size == 1 else math.inf

    def _at(
        self, A: np.ndarray, KA: np.ndarray, free: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the objective, the probabilities (K, N) and their residuals."""
        scores = KA / self._roots + free[:, None]
        scores -= scores[self._own]
        largest = scores.max(axis=0)
        p = np.exp(scores - largest)
        # The label's own apart, so that nothing cancels where classes are separated.
        p[self._own] = 0
        others, own = p.sum(axis=0), np.exp(-largest)
        loss = largest + np.log1p(others + (own - 1))
        total = others + own
        p /= total
        residual = p.copy()
        residual[self._own] = -others / total
        p[self._own] = own / total
        value = float(loss @ self._gram.relative) / self._shape[1]
        return value + self._decay / 2 * float(np.vdot(A, KA)), p, residual

    def _least_squares(self, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the solution of least squares on one-hot labels, scaled, and its bias."""
        from scipy.optimize import minimize_scalar

        n_classes, n = self._shape
        targets = np.full(self._shape, -1 / n_classes)
        targets[self._own] += 1
        shares = targets @ self._gram.relative / n
        solved = self._gram.solver(ridge)
        if solved is None:
            return np.zeros(self._shape), np.zeros(n_classes)
        A = solved((targets - shares[:, None]) * self._roots)
        KA = self._gram.times(A)

        def value(power: float) -> float:
            size = math.exp(power)
            return self._at(size * A, size * KA, size * shares)[0]

        size = math.exp(minimize_scalar(value, bounds=(-7, 9), method="bounded").x)
        return size * A, size * shares

    def _newton_step(
        self,
        slope: tuple[np.ndarray, np.ndarray],
        p: np.ndarray,
        curvature: float,
        ridge: float,
        value: float,
        missing: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float] | None:
        """Return a step, its inner products, that of the bias, and the decrement.

        ``missing`` is the factor by which the bound has to fall.
        """
        n = self._shape[1]
        solved = self._gram.solver(ridge)
        if solved is None:
            return None
        r, r_free = -slope[0], -slope[1]
        step, K_step, free = np.zeros_like(r), np.zeros_like(r), np.zeros_like(r_free)
        d, Kd, d_free = step, K_step, free
        square = first = decrement = 0.0
        for number in range(_INNER + 1):
            z = solved(r)
            Kz = (r - ridge * z) * (n / curvature)  # without a product
            z *= n / curvature
            z_free = r_free / curvature
            before, square = square, float(np.vdot(r, Kz) + r_free @ z_free)
            first = first or square
            # As exact as the quadratic convergence deserves, and no more than is needed.
            enough = min(0.1, max(decrement / value, 0.05 * missing))
            if number == _INNER or self._report.late or not square > first * enough * (number > 0):
                break
            ratio = square / before if before else 0.0
            d, Kd, d_free = z + ratio * d, Kz + ratio * Kd, z_free + ratio * d_free
            change = Kd / self._roots + d_free[:, None]
            change -= change[self._own]
            change -= np.einsum("kn,kn->n", p, change)
            change *= p
            change *= self._gram.relative
            bent, bent_free = change / self._roots / n + self._decay * d, change.sum(axis=1) / n
            along = float(np.vdot(Kd, bent) + d_free @ bent_free)
            if not along > 0:
                break
            size = square / along
            step, K_step, free = step + size * d, K_step + size * Kd, free + size * d_free
            r, r_free = r - size * bent, r_free - size * bent_free
            decrement += size * square
            self._done += 1
        return (step, K_step, free, decrement) if decrement > 0 else None
