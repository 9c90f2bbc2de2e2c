"""The exact optimum of the linear probe: L-BFGS in coordinates that suit the features.

SciPy's L-BFGS does most of the optimising, on a problem that takes it tens of iterations instead
of hundreds. Near the optimum the Hessian is about the Kronecker product of A, the mean of
``diag(p) - p p^T`` over the rows, and S, the features' covariance, plus lambda I. In the
eigenbases of A and S that is diagonal; dividing each coordinate by its root gives a Hessian close
to the identity. The bias absorbs the mean, so the features are neither centred nor copied.

Newton's method then ends the search and proves where it ended: conjugate gradients solve for the
true Hessian, in the same coordinates, and half the decrement ``g^T H^-1 g`` is the distance to the
optimum. Gradient and objective are float64 there. Where classes are separated and the penalty is
small, curvatures differ by many orders of magnitude, and only these steps arrive.

What comes first is cheap: S from a part of the rows, and only its largest eigenvectors where
there are many dimensions (it shapes the coordinates, not the optimum); and a solution on a part of
the rows to start from. For few rows `gram` finds the optimum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..errors import RecipeError
from ..progress import OnProgress, Progress, silent
from .blocks import Features, Rows, each_block, one_blas_thread, some_rows
from .gram import Gram, Report, gram_of, solve
from .objective import Hessian, Objective, Solution, objective
from .recipes import ExactRecipe
from .scaling import Moments, covariance_rows, moments_of_some, power_of_two, scaled
from .weights import counted, mean_1

_MEMORY = 20  # pairs that L-BFGS keeps
_START_ROWS = 20  # times D
_START_TOLERANCE = 1e-3
_GROWTH = 8  # of the part, where time is limited
_CURVATURE_ROWS = 4096
_CURVATURE_NUMBERS = 1 << 22  # of these rows and the classes
_SMALL = 1 << 18  # numbers: features up to this size are copied to float64
_FEW_DIMENSIONS = 512  # whose covariance is decomposed whole
_DIRECTIONS = 128  # of more dimensions, where a pass is cheaper than the decomposition
# Classes are mixed by the eigenvectors of A as long as that is cheap beside a pass.
_MIXED_CLASSES, _ROWS_A_CLASS = 1000, 8
_SEPARATED = 1e-3  # nats: the least objective that the tolerance of L-BFGS is relative to
# A tolerance for which the estimate of the gap is enough: half the decrement in these coordinates,
# which was too small by a factor of at most 16 on CIFAR-10.
_ROUGH, _ESTIMATED = 1e-4, 20.0
_FLAT = 1e-12  # a curvature that counts as zero: of the bias, or relative to the largest
_NULL = 1e-10  # a variance that is rounding, relative to the largest
_TINY = float(np.finfo(float).tiny)
_STALE = 3.0  # a change of curvature that makes new coordinates worth losing the memory
_LEAST_STEP = 1e-12  # of a Newton step: far out the loss is linear, and its curvature nothing
_INNER = 100  # products with the Hessian, for one Newton step
# The decrement of conjugate gradients grows with every product. They end when the last few added
# little; where the loss falls exponentially, the gap is twice half the decrement.
_INNER_WINDOW, _INNER_SHARE, _CAUTION = 3, 0.1, 2.5
# Where the decrement is this part of the objective the next step is the last: it is to leave this
# part of the allowed gap.
_NEAR, _LEFT = 1e-4, 0.1


class Shared:
    """What fits of the same features (N, D) at several penalties share, made when first asked for.

    ``unit`` is that of the features inside. Few rows have a ``gram``, all others ``coordinates``.
    """

    def __init__(
        self, views: Sequence[Features], weights: np.ndarray | None = None, n_classes: int = 1
    ) -> None:
        self.unit = power_of_two(views)
        self.views, self._weights, self._n_classes = scaled(views, self.unit), weights, n_classes

    @cached_property
    def gram(self) -> Gram | None:
        """Inner products of the rows."""
        return gram_of(self.views, self._weights)

    @cached_property
    def coordinates(self) -> Moments:
        """Coordinates in which the Hessian is close to the identity."""
        return coordinates_of(self.views, self._weights, self._n_classes)


def train_lbfgs(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ExactRecipe,
    *,
    weights: np.ndarray | None = None,
    start: Solution | None = None,
    shared: Shared | None = None,
    until: float = math.inf,
    on_progress: OnProgress = silent,
) -> Solution:
    """Find the head that minimises the objective on features (N, D), one array per flip view.

    ``weights`` float64 (N,) are of the images, as `sample_weights` returns them; one of weight 0 is
    as if absent. ``start`` is a solution to start from, such as one at another penalty; few rows
    need none. ``shared`` is of the same features and weights. The search ends ``until`` that value
    of `time.perf_counter` too. ``steps`` of the solution counts iterations, ``epochs`` passes;
    ``converged`` is False where ``max_iterations``, the time or the precision of the arithmetic
    ended it. Objective, gradient and gap are those of the head that is returned, in float64.
    Raises RecipeError where features of one split differ so much in size that their products
    overflow. Liu and Nocedal, "On the limited memory BFGS method for large scale optimization",
    Mathematical Programming 45 (1989), 503-528; Nocedal and Wright, "Numerical optimization", 2006,
    algorithm 7.1.
    """
    import scipy.optimize  # noqa: F401  # loads its own BLAS, which must exist to be limited

    started = time.perf_counter()
    views, labels, weights = counted(views, labels, weights)
    n, dim = views[0].shape
    dtype = np.result_type(views[0].dtype, np.float32)
    proven = recipe.tolerance < _ROUGH
    report = Report(on_progress, until)
    with one_blas_thread(), np.errstate(all="ignore"):
        shared = shared or Shared(views, weights, n_classes)
        unit = shared.unit
        inside = replace(recipe, weight_decay=recipe.weight_decay / unit**2)

        def rounded(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
            return (weight / unit).astype(dtype), bias.astype(dtype)

        def reached(weight: np.ndarray, bias: np.ndarray) -> Objective:
            least = np.float64 if proven else np.float32
            return objective(weight, bias, views, labels, recipe, weights, least)

        converged, passes, gap = False, 0, math.inf
        if shared.gram is not None:
            passes = 2  # the inner products, and the objective
            found, converged = solve(shared.gram, labels, n_classes, inside, report)
            head = rounded(*found)
            here = reached(*head)
            gap = here.gap(recipe.weight_decay, shared.gram.mean * unit)
            # Rough tolerances need no proof; a finer one that rounding prevents comes next.
            converged = converged and (not proven or gap <= recipe.tolerance * here.value)
        if shared.gram is None or (proven and not converged and not report.late):
            inner = shared.views
            if len(inner) * n * dim <= _SMALL:
                inner = [np.asarray(features[:], np.float64) for features in inner]
            coordinates = shared.coordinates
            if shared.gram is not None:
                weight, bias = found
            else:
                first = None
                if start is not None:
                    first = start.weight.astype(np.float64) * unit, start.bias.astype(np.float64)
                weight, bias = _first_head(
                    inner, labels, n_classes, inside, weights, coordinates, first, until
                )
            descent = _Descent(inner, labels, inside, weights, coordinates, report)
            head = rounded(*descent.run(weight, bias, proven))
            here = reached(*head)
            converged = descent.converged
            passes += descent.evaluations
            gap = min(descent.gap, here.gap(recipe.weight_decay, coordinates.mean * unit))
        if not np.isfinite(here.value):
            raise RecipeError(
                "features: expected numbers whose products are finite, found some of "
                f"{np.format_float_scientific(unit, 1)} beside much larger ones; use "
                "--scale standardize or --scale l2"
            )
    on_progress(Progress("probe", report.iterations, report.iterations, "iteration"))
    return Solution(
        weight=head[0],
        bias=head[1],
        epochs=passes,
        steps=report.iterations,
        converged=converged,
        objective=here.value,
        gradient_norm=here.gradient_norm,
        wall_s=time.perf_counter() - started,
        gap=min(gap, here.value),
    )


def _first_head(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ExactRecipe,
    weights: np.ndarray | None,
    coordinates: Moments,
    start: tuple[np.ndarray, np.ndarray] | None,
    until: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the given start, or one that is solved on a part of the rows; zeros for few rows.

    Where time is limited ever larger parts follow, from the given start too.
    """
    n, dim = views[0].shape
    weight, bias = start or (np.zeros((n_classes, dim)), np.zeros(n_classes))
    if start and until == math.inf:
        return start
    rough = replace(recipe, tolerance=max(recipe.tolerance, _START_TOLERANCE))
    size = _START_ROWS * dim
    while size <= n // 2:
        rows = some_rows(n, size)
        part = [np.asarray(Rows(features)[rows]) for features in views]
        part_weights = None if weights is None else weights[rows]
        report = Report(silent, until)
        descent = _Descent(part, labels[rows], rough, part_weights, coordinates, report)
        weight, bias = descent.run(weight, bias, proven=False)
        if until == math.inf:
            break
        size *= _GROWTH
    return weight, bias


def coordinates_of(
    views: Sequence[Features], weights: np.ndarray | None = None, n_classes: int = 1
) -> Moments:
    """Return coordinates for features (N, D) of each view and K classes, from a part of the rows.

    The covariance is decomposed whole where that is cheap beside passes over all rows. Otherwise
    the directions are the principal ones within the span of `_DIRECTIONS` of the rows.
    """
    n, dim = views[0].shape
    cheap = dim <= _FEW_DIMENSIONS or 8 * len(views) * n * n_classes >= dim**2
    if cheap and dim <= max(len(views) * n, _DIRECTIONS):
        return moments_of_some(views, weights)
    some, part = covariance_rows(views, weights)
    relative = None if part is None else mean_1(part).astype(np.float32)[:, None]

    def sums(features: Features, rows: slice) -> np.ndarray:
        x = np.asarray(features[rows], np.float32)
        total: np.ndarray = (x if relative is None else x * relative[rows]).sum(0, dtype=np.float64)
        return total

    total = sum(map(len, some))
    mean: np.ndarray = sum(each_block(some, sums, 2 * dim), np.zeros(dim)) / total
    few = some_rows(n, max(1, _DIRECTIONS // len(views)))
    seed = np.concatenate([np.asarray(features[few], np.float64) for features in views]) - mean
    squares, mix = np.linalg.eigh(seed @ seed.T)
    kept = squares > _NULL * squares[-1]
    principal = seed.T @ mix[:, kept] / np.sqrt(squares[kept])
    # Once more, since the rounding of the squares left the small ones a little askew.
    basis = np.linalg.solve(np.linalg.cholesky(principal.T @ principal), principal.T).T
    narrow = basis.astype(np.float32)

    def along(features: Features, rows: slice) -> tuple[np.ndarray, float]:
        x = np.asarray(features[rows], np.float32) - mean.astype(np.float32)
        weighted = x if relative is None else x * relative[rows]
        inside = x @ narrow
        return (weighted @ narrow).T @ inside, float(np.vdot(x, weighted))

    covariance, whole = np.zeros((basis.shape[1],) * 2), 0.0
    for one, other in each_block(some, along, 3 * dim):
        covariance += one / total
        whole += other / total
    variances, turn = np.linalg.eigh(covariance)
    variances = np.maximum(variances, 0)
    left = min(dim, total - 1) - len(variances)
    rest = (whole - variances.sum()) / left if left > 0 else 0.0
    rest = max(float(rest), _NULL * float(variances.max(initial=0)))
    return Moments(total, mean, basis @ turn, variances, rest)


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
        report: Report,
    ) -> None:
        self._views = views
        self._labels = labels
        self._recipe = recipe
        self._weights = weights
        self._coordinates = coordinates
        self._report = report
        self._precision: type[np.floating] = np.float32
        self.evaluations = 0
        self.converged = False
        self.gap = math.inf  # a bound on the distance of the objective to its optimum
        self.reached: Objective

    def run(
        self, weight: np.ndarray, bias: np.ndarray, proven: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (K, D) and bias (K,) at the end, float64.

        The end is ``proven`` by Newton steps, or estimated from the coordinates.
        """
        from scipy.optimize import minimize

        self._best = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
        self.reached = self._evaluate(*self._best)
        self._caution = 1.0 if proven else _ESTIMATED
        while not self._over:
            self._set_curvature()
            if self._is_flat():
                break
            try:
                minimize(
                    self._in_coordinates,
                    self._encode(*self._best),
                    jac=True,
                    method="L-BFGS-B",
                    callback=self._after_iteration,
                    options={
                        "maxcor": _MEMORY,
                        "maxiter": self._recipe.max_iterations - self._report.iterations,
                        "maxfun": 10 * self._recipe.max_iterations,
                        "ftol": 0.0,
                        "gtol": 0.0,
                    },
                )
            except _Stale:
                continue
            except _Converged:
                pass
            break
        if not proven:
            self.converged = not self._over and self._is_flat()
        elif not self._report.late:
            self._newton()
        # SciPy's objects refer to this one in a cycle, and would keep the features in memory until
        # the garbage collector runs.
        self._views = ()
        return self._best

    def _newton(self) -> None:
        """Take Newton steps until half the decrement is within the tolerance."""
        if self._views[0].dtype != np.float64:
            self._precision = np.float64
            self.reached = self._evaluate(*self._best)
        least: float | None = None
        while True:
            self._set_curvature()
            allowed = self._recipe.tolerance * self.reached.value
            step, decrement, least = self._newton_step(self._gradient, allowed, least)
            late = self._report.late  # then the decrement may lack a part
            self.converged = not late and _CAUTION * decrement / 2 <= allowed
            if not late:
                self.gap = _CAUTION * decrement / 2
            if self.converged or self._over:
                return
            if decrement > _NEAR * self.reached.value:
                least = None  # it is another one at the next head
            point, before, size = self._encode(*self._best), self.reached.value, 1.0
            while self._in_coordinates(point - size * step)[0] > before - 1e-4 * size * decrement:
                size /= 4
                if size < _LEAST_STEP:
                    return  # no step lowers the objective: the limit of precision
            self.gap = math.inf
            self._report_here()

    def _newton_step(
        self, gradient: np.ndarray, allowed: float, least: float | None
    ) -> tuple[np.ndarray, float, float | None]:
        """Return the inverse Hessian times the gradient, the decrement, and the least curvature.

        A known ``least`` curvature bounds what is missing from the decrement, so that few products
        prove it to be within the allowed gap. Near the optimum the step ends as near to it.
        """
        from scipy.linalg import eigvalsh_tridiagonal

        step, residual = np.zeros_like(gradient), gradient.copy()
        along, square = gradient.copy(), float(np.vdot(gradient, gradient))
        gains: list[float] = []
        # Conjugate gradients are Lanczos's method: the Hessian as a tridiagonal matrix.
        diagonal: list[float] = []
        beside: list[float] = []
        carried = 0.0
        hessian = Hessian(*self._best, self._views, self._recipe.weight_decay, self._weights)
        for _ in range(_INNER):
            if least and _CAUTION * (most := sum(gains) + square / least) / 2 <= allowed:
                return step, most, least
            bent = self._gradient_of(*hessian.times(*self._decode(along)))
            self.evaluations += 1
            curvature = float(np.vdot(along, bent))
            if not curvature > 0:
                break
            size = square / curvature
            step += size * along
            residual -= size * bent
            gains.append(size * square)
            square, before = float(np.vdot(residual, residual)), square
            ratio = square / before
            diagonal.append(1 / size + carried)
            beside.append(math.sqrt(ratio) / size)
            carried = ratio / size
            decrement = sum(gains)
            enough = _INNER_SHARE * decrement
            if 2 * allowed / _CAUTION < decrement <= _NEAR * self.reached.value:
                enough = min(enough, _LEFT * allowed)
            if sum(gains[-_INNER_WINDOW:]) <= enough or square == 0 or self._report.late:
                break
            along = residual + ratio * along
        if gains:
            found = eigvalsh_tridiagonal(diagonal, beside[:-1], select="i", select_range=(0, 0))
            least = float(found[0])
        return step, sum(gains), least

    def _set_curvature(self) -> None:
        self._curvature = self.reached.curvature
        curvatures, self._mix = _softmax_curvature(*self._best, self._views[0], self._weights)
        decay = self._recipe.weight_decay
        least = max(float(curvatures.max()) * _FLAT, _TINY)
        curvatures = np.maximum(curvatures, least)
        self._scale = np.sqrt(np.outer(curvatures, self._coordinates.variances) + decay)
        self._rest_scale = np.sqrt(curvatures * self._coordinates.rest + decay)[:, None]
        # Adding the same to all biases changes nothing: that direction has no curvature.
        self._free_scale = np.sqrt(np.maximum(curvatures, curvatures.max() * 1e-3 + _FLAT))
        here = self.reached
        self._gradient = self._gradient_of(here.weight_gradient, here.bias_gradient)

    @property
    def _partial(self) -> bool:
        dim, n_directions = self._coordinates.directions.shape
        return n_directions < dim

    def _mixed(self, values: np.ndarray, back: bool = False) -> np.ndarray:
        if self._mix is None:
            return values
        return self._mix @ values if back else self._mix.T @ values

    def _encode(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        free = self._mixed(bias + weight @ self._coordinates.mean) * self._free_scale
        weight = self._mixed(weight)
        along = weight @ self._coordinates.directions
        parts = [(along * self._scale).ravel(), free]
        if self._partial:
            rest = weight - along @ self._coordinates.directions.T
            parts.insert(0, (rest * self._rest_scale).ravel())
        return np.concatenate(parts)

    def _decode(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n_classes, (dim, m) = len(self._free_scale), self._coordinates.directions.shape
        free, point = point[-n_classes:], point[:-n_classes]
        along = point[len(point) - n_classes * m :].reshape(n_classes, m) / self._scale
        weight = along @ self._coordinates.directions.T
        if self._partial:
            weight += point[: n_classes * dim].reshape(n_classes, dim) / self._rest_scale
        weight = self._mixed(weight, back=True)
        bias = self._mixed(free / self._free_scale, back=True) - weight @ self._coordinates.mean
        return weight, bias

    def _evaluate(self, weight: np.ndarray, bias: np.ndarray) -> Objective:
        self.evaluations += 1
        return objective(
            weight, bias, self._views, self._labels, self._recipe, self._weights, self._precision
        )

    def _in_coordinates(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = self._decode(point)
        here = self._evaluate(weight, bias)
        gradient = self._gradient_of(here.weight_gradient, here.bias_gradient)
        if here.value <= self.reached.value:
            self.reached, self._best, self._gradient = here, (weight, bias), gradient
        return here.value, gradient

    def _gradient_of(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        centred = np.outer(bias, -self._coordinates.mean)
        centred += weight
        centred = self._mixed(centred)
        along = centred @ self._coordinates.directions
        parts = [(along / self._scale).ravel(), self._mixed(bias) / self._free_scale]
        if self._partial:
            rest = centred - along @ self._coordinates.directions.T
            parts.insert(0, (rest / self._rest_scale).ravel())
        return np.concatenate(parts)

    def _is_flat(self) -> bool:
        decrement = float(np.vdot(self._gradient, self._gradient)) / 2
        allowed = self._recipe.tolerance * max(self.reached.value, _SEPARATED)
        return self._caution * decrement <= allowed

    @property
    def _over(self) -> bool:
        """Whether iterations or time are used up."""
        return self._report.late or self._report.iterations >= self._recipe.max_iterations

    def _report_here(self) -> None:
        gap = self.reached.gap(self._recipe.weight_decay, self._coordinates.mean)
        self._report(self.reached.value, gap)

    def _after_iteration(self, _: np.ndarray) -> None:
        self._report_here()
        if self._is_flat() or self._report.late:
            raise _Converged
        ratio = self.reached.curvature / max(self._curvature, _TINY)
        if not 1 / _STALE < ratio < _STALE:
            raise _Stale


def _softmax_curvature(
    weight: np.ndarray, bias: np.ndarray, features: Features, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the eigenvalues (K,) and eigenvectors (K, K) of A, float64, from a part of the rows.

    Of many classes, or classes of few rows, the diagonal and None.
    """
    n, n_classes = len(features), len(bias)
    rows = some_rows(n, min(_CURVATURE_ROWS, max(256, _CURVATURE_NUMBERS // n_classes)))
    x = np.asarray(Rows(features)[rows])
    scores = (x @ weight.T.astype(np.result_type(x.dtype, np.float32))).astype(np.float64) + bias
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    weighted = p if weights is None else p * mean_1(weights[rows])[:, None]
    if n_classes > min(_MIXED_CLASSES, n // _ROWS_A_CLASS) and n_classes > 64:
        return np.einsum("rk,rk->k", weighted, 1 - p) / len(p), None
    # A row of diag(p) - p p^T sums to 0: the diagonal that way, since 1 - p cancels.
    products = p.T @ weighted / len(p)
    np.fill_diagonal(products, 0)
    curvatures, mix = np.linalg.eigh(np.diag(products.sum(axis=1)) - products)
    return np.maximum(curvatures, 0), mix
