"""Regression probes: ridge on numeric targets, each with its own penalty.

Minimises ``1/2 [sum_i v_i (w x_i + b - y_i)^2 / sum_i v_i + lambda ||w||^2]`` for each target, over
the N images with a value, in closed form for every lambda: see `ridge`. Products are float64 here,
since a regression may explain all but a millionth of the variance. Lambda minimises generalized
cross-validation, ::

    GCV(lambda) = mean squared residual / (1 - (1 + sum_j s_j / (s_j + lambda)) / N)^2

with s the eigenvalues of the features' covariance and 1 for the bias; where there are val images,
their mean squared error instead. Golub, Heath and Wahba, "Generalized cross-validation as a method
for choosing a good ridge parameter", Technometrics 21 (1979), 215-223.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TableError
from ..metrics import Interval, NumberScores, number_scores
from ..notebook import ShownAsTable
from ..progress import OnProgress, Progress, silent
from .blocks import Features, Rows, each_block, loaded
from .cross_check import UNDER_TRAINED, timed_fit
from .head import Head
from .ridge import degrees_of_freedom, mean_squared_residual
from .scaling import Scaling

if TYPE_CHECKING:
    from .question import Part

_GRID = np.logspace(-10, 4, 57)  # lambda, relative to the largest variance of the features
_SMALL = 1 << 23  # numbers: scikit-learn gets up to this many in float64
_CHECKED = 3  # targets that scikit-learn fits too
_NULL = 1e-13  # relative variance of a direction in which the features do not vary


@dataclass(frozen=True, kw_only=True)
class NumberScore(NumberScores):
    """One numeric target: its penalty, and how well it is predicted on the test split.

    It has the fields of `NumberScores`, and these.

    Parameters
    ----------
    name : str
        The target.
    n_train : int
        Images with a value.
    weight_decay, alpha : float
        The penalty as lambda, and scikit-learn's: alpha = N * lambda.
    degrees_of_freedom : float
        1 + sum of s / (s + lambda): how many free parameters the fit is worth.
    """

    name: str
    n_train: int
    weight_decay: float
    alpha: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class NumbersCheck:
    """scikit-learn's Ridge on some of the targets, with the same objective.

    Parameters
    ----------
    targets : tuple of str
        The first three.
    wall_s : float
        Duration of its fits.
    objective_gap : float
        The largest of (head's objective - its objective) / its objective over targets; below 0
        where the head's is lower.
    r2_difference : float or None
        The largest absolute difference on the test split.
    """

    targets: tuple[str, ...]
    wall_s: float
    objective_gap: float
    r2_difference: float | None

    @property
    def under_trained(self) -> bool:
        """Whether the head's objective is clearly above scikit-learn's."""
        return self.objective_gap > UNDER_TRAINED


@dataclass(frozen=True)
class RegressionScores(ShownAsTable):
    """A head of numbers, and how good it is.

    Parameters
    ----------
    r2 : float or None
        On the test split, the mean over targets; None where every target is constant there.
    r2_interval : tuple of 2 floats or None
        95 %, over resamples of test images, or of their groups.
    targets : tuple of NumberScore
        One for each target.
    n_train, n_test : int
        Images.
    chosen_by : str
        ``"gcv"``, ``"val"``, or ``"given"``: what the penalty minimises.
    scale : str
        ``"none"``, ``"standardize"`` or ``"l2"``, of the features.
    wall_s : float
        Duration of choice and training, without the check.
    check : NumbersCheck or None
        What scikit-learn reaches; None where it was switched off.
    notes : tuple of str
        Targets that the features hardly explain, or that are predicted worse than by their mean.
    """

    r2: float | None
    r2_interval: Interval | None
    targets: tuple[NumberScore, ...]
    n_train: int
    n_test: int
    chosen_by: str
    scale: str
    wall_s: float
    check: NumbersCheck | None
    notes: tuple[str, ...]


def probe_numbers(
    train: Part,
    val: Part | None,
    test: Part,
    names: Sequence[str],
    *,
    C: float | None = None,
    weight_decay: float | None = None,
    scale: str = "none",
    check: bool = True,
    fingerprint: str = "",
    ingredients: Mapping[str, Any] | None = None,
    on_progress: OnProgress = silent,
) -> tuple[RegressionScores, Head]:
    """Choose the penalty of each target, fit the head, test it and check it.

    Targets are float64 (n, T), NaN where not known. With ``val`` the penalty is chosen on it, else
    by generalized cross-validation. Raises TableError for a target with infinite values, with the
    same value in all training images, or known for fewer than 3 of them.
    """
    targets = np.asarray(train.labels, np.float64)
    for column, name in enumerate(names):
        _check_target(targets[:, column], train.weights, name)
    scaling = Scaling(scale, train.views)
    views = [loaded(scaling.lazily(features)) for features in train.views]
    held = None if val is None else scaling.lazily(val.views[0])

    started = time.perf_counter()
    weight, bias = np.zeros((len(names), views[0].shape[1])), np.zeros(len(names))
    decays, alphas, freedoms = np.zeros((3, len(names)))
    hopeless: list[str] = []
    # Targets that are known for the same images share one decomposition.
    counted = np.ones(len(targets), bool) if train.weights is None else train.weights > 0
    patterns, inverse = np.unique(~np.isnan(targets), axis=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        columns = np.flatnonzero(inverse.reshape(-1) == number)
        rows = np.flatnonzero(patterns[:, number] & counted)
        sums = number_sums(views, targets[:, columns], rows, train.weights)
        spectrum = Spectrum(sums, len(rows))
        for at, column in enumerate(columns):
            on_progress(Progress("probe", number, patterns.shape[1], "target"))
            if weight_decay is not None or C is not None:
                decay = weight_decay or 1 / ((C or 1) * sums.total)
            else:
                loss = spectrum.gcv(at)
                if val is not None and held is not None:
                    loss = _val_loss(spectrum, at, held, val, int(column)) or loss
                decay, highest = spectrum.minimise(loss)
                hopeless += [names[column]] * highest
            decays[column], alphas[column] = decay, decay * sums.total
            freedoms[column] = spectrum.degrees_of_freedom(decay)
            weight[column], bias[column] = spectrum.solve(at, decay)
    on_progress(Progress("probe", patterns.shape[1], patterns.shape[1], "target"))
    wall_s = time.perf_counter() - started

    head = Head(
        *_float32(*scaling.fold(weight, bias), names),
        tuple(names),
        fingerprint,
        "l2" if scale == "l2" else "none",
        ingredients or {},
        "numbers",
    )
    scored, r2, r2_interval = number_scores(head.scores(test.views[0]), test.labels, test.groups)
    rows_of = [
        NumberScore(
            **vars(one),
            name=name,
            n_train=int((~np.isnan(targets[:, column])).sum()),
            weight_decay=float(decays[column]),
            alpha=float(alphas[column]),
            degrees_of_freedom=float(freedoms[column]),
        )
        for column, (one, name) in enumerate(zip(scored, names, strict=True))
    ]
    notes = [
        f"{one.name!r:.80}: R2 is below 0 on the test split: the test mean predicts it better"
        for one in rows_of
        if one.r2 is not None and one.r2 < 0
    ]
    notes += [
        f"{name!r:.80}: the highest penalty of the grid is best: the features hardly explain it"
        for name in hopeless
    ]
    given = C is not None or weight_decay is not None
    scores = RegressionScores(
        r2=r2,
        r2_interval=r2_interval,
        targets=tuple(rows_of),
        n_train=len(targets),
        n_test=len(test.labels),
        chosen_by="given" if given else "gcv" if val is None else "val",
        scale=scale,
        wall_s=wall_s,
        check=_check(
            views, targets, train.weights, weight, bias, decays,
            scaling.lazily(test.views[0]), test.labels, rows_of,
        ) if check else None,
        notes=tuple(notes),
    )  # fmt: skip
    return scores, head


@dataclass(frozen=True, eq=False)
class NumberSums:
    """Weighted means and central second moments of features (N, D) and targets (N, T), float64.

    ``total`` is the sum of weights; ``features`` (D, D), ``products`` (D, T), ``targets`` (T,).
    """

    total: float
    mean: np.ndarray
    target_mean: np.ndarray
    features: np.ndarray
    products: np.ndarray
    targets: np.ndarray

    def squared_error(self, at: int, weight: np.ndarray, bias: float) -> float:
        """Return the mean squared error of a head (D,) on one of the targets."""
        offset = weight @ self.mean + bias - self.target_mean[at]
        spread = weight @ self.features @ weight - 2 * weight @ self.products[:, at]
        return float(max(0.0, self.targets[at] + spread) + offset**2)


def number_sums(
    views: Sequence[Features], targets: np.ndarray, rows: np.ndarray, weights: np.ndarray | None
) -> NumberSums:
    """Return the moments of the given rows of features (N, D) and targets (N, T)."""
    every = len(rows) == len(targets)
    chosen: Sequence[Features] = views if every else [Rows(part, rows) for part in views]
    y = targets if every else targets[rows]
    share = None if weights is None else weights[rows][:, None]
    dim = views[0].shape[1]
    shift = np.asarray(views[0][:1], np.float64)[0]  # keeps squares small
    centre = y.mean(axis=0)

    def of_block(features: Features, part: slice) -> tuple[np.ndarray, ...]:
        joined = np.column_stack(
            [
                np.asarray(features[part], np.float64) - shift,
                y[part] - centre,
                np.ones(len(y[part])),
            ]
        )
        weighted = joined if share is None else joined * share[part]
        return weighted[:, :dim].T @ joined[:, :dim], weighted.T @ joined[:, dim:]

    square, rest = np.zeros((dim, dim)), np.zeros((dim + y.shape[1] + 1, y.shape[1] + 1))
    for one, other in each_block(chosen, of_block, 6 * (dim + y.shape[1])):
        square += one
        rest += other
    total = rest[-1, -1]
    means = rest[:-1, -1] / total
    mean, target_mean = means[:dim], means[dim:]
    return NumberSums(
        float(total),
        mean + shift,
        target_mean + centre,
        square / total - np.outer(mean, mean),
        rest[:dim, :-1] / total - np.outer(mean, target_mean),
        np.maximum(np.diag(rest[dim:-1, :-1]) / total - target_mean**2, 0),
    )


class Spectrum:
    """Ridge regression at every lambda, along the eigenvectors of the features' covariance."""

    def __init__(self, sums: NumberSums, n: int) -> None:
        variances, self._directions = np.linalg.eigh(sums.features)
        self._sums, self._n = sums, n
        self._largest = max(float(variances[-1]), float(np.finfo(float).tiny))
        varying = variances > _NULL * len(variances) * self._largest
        self._directions, self._variances = self._directions[:, varying], variances[varying]
        self._along = self._directions.T @ sums.products

    def solve(self, at: int, decay: float) -> tuple[np.ndarray, float]:
        """Return weight (D,) and bias of a target at one lambda."""
        weight = self._directions @ (self._along[:, at] / (self._variances + decay))
        return weight, float(self._sums.target_mean[at] - weight @ self._sums.mean)

    def degrees_of_freedom(self, decay: float) -> float:
        """Return the trace of the map from targets to fitted values."""
        return degrees_of_freedom(self._variances, decay)

    def residual(self, at: int, decay: float) -> float:
        """Return the mean squared residual at one lambda, as a sum without cancellation."""
        explained = self._along[:, at] ** 2 / self._variances
        total = float(self._sums.targets[at])
        return mean_squared_residual(total, explained, self._variances, decay)

    def gcv(self, at: int) -> Callable[[float], float]:
        """Return the GCV of a target as a function of lambda."""

        def loss(decay: float) -> float:
            # The views of an image are no further images: they do not add to N.
            left = 1 - self.degrees_of_freedom(decay) / self._n
            return self.residual(at, decay) / left**2 if left > 1e-9 else np.inf

        return loss

    def minimise(self, loss: Callable[[float], float]) -> tuple[float, bool]:
        """Return the lambda with the least loss, and whether it is the highest of the grid."""
        from scipy.optimize import minimize_scalar

        grid = _GRID * self._largest
        losses = [loss(decay) for decay in grid]
        best = int(np.argmin(losses))
        if best in (0, len(grid) - 1):
            return float(grid[best]), best > 0
        refined = minimize_scalar(
            lambda power: loss(np.exp(power)),
            bounds=tuple(np.log(grid[[best - 1, best + 1]])),
            method="bounded",
            options={"xatol": 1e-3},
        )
        better = refined.fun <= losses[best]
        return float(np.exp(refined.x)) if better else float(grid[best]), False


def _val_loss(
    spectrum: Spectrum, at: int, features: Features, val: Part, column: int
) -> Callable[[float], float] | None:
    """Return the squared error on the val images as a function of lambda; None without values."""
    rows = np.flatnonzero(~np.isnan(val.labels[:, column]))
    if not len(rows):
        return None
    sums = number_sums([features], val.labels[:, [column]], rows, None)

    def loss(decay: float) -> float:
        return sums.squared_error(0, *spectrum.solve(at, decay))

    return loss


def _check_target(values: np.ndarray, weights: np.ndarray | None, name: str) -> None:
    """Raise TableError for training values (N,) from which nothing can be learned."""
    known = values[~np.isnan(values)]
    if weights is not None:
        known = values[~np.isnan(values) & (weights > 0)]
    if np.isinf(known).any():
        raise TableError(
            f"{name!r:.80}: expected finite numbers, found infinity in "
            f"{int(np.isinf(known).sum()):,} training images; correct them, or leave them empty"
        )
    if len(known) < 3:
        raise TableError(
            f"{name!r:.80}: expected 3 training images with a number or more, found {len(known)}; "
            "choose another column or other rows"
        )
    if not np.any(known != known[0]):
        raise TableError(
            f"{name!r:.80}: expected different numbers, found {known[0]:g} in all training images; "
            "choose another column or other rows"
        )


def _float32(
    weight: np.ndarray, bias: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        rounded = weight.astype(np.float32), bias.astype(np.float32)
    for column, name in enumerate(names):
        if not (np.isfinite(rounded[0][column]).all() and np.isfinite(rounded[1][column])):
            raise TableError(
                f"{name!r:.80}: expected numbers that float32 can hold, found larger ones; give "
                "the column in another unit"
            )
    return rounded


def _check(
    views: Sequence[Features],
    targets: np.ndarray,
    weights: np.ndarray | None,
    weight: np.ndarray,
    bias: np.ndarray,
    decays: np.ndarray,
    test_features: Features,
    test_targets: np.ndarray,
    scored: Sequence[NumberScore],
) -> NumbersCheck:
    """Fit Ridge to the first targets: it minimises ``sum(v (y - Xw)^2) + alpha ||w||^2``."""
    from sklearn.linear_model import Ridge

    x = np.concatenate([np.asarray(features[:], np.float32) for features in views])
    x = x.astype(np.float64) if x.size <= _SMALL else x
    tested = np.asarray(test_features[:], np.float32)
    gaps, differences, wall_s = [], [], 0.0
    for column, one in enumerate(scored[:_CHECKED]):
        y = np.tile(targets[:, column], len(views))
        known = ~np.isnan(y)
        share = None if weights is None else np.tile(weights, len(views))[known]
        model = Ridge(alpha=one.alpha)
        wall_s += timed_fit(model, x[known], y[known], share)[0]

        def value(
            w: np.ndarray, b: float, known: Any = known, y: Any = y, share: Any = share,
            decay: float = decays[column],
        ) -> float:  # fmt: skip
            squares = (x[known] @ w + b - y[known]) ** 2
            return float(np.average(squares, weights=share) + decay * (w @ w)) / 2

        theirs = value(model.coef_.astype(np.float64), float(model.intercept_))
        gaps.append((value(weight[column], bias[column]) - theirs) / max(theirs, 1e-300))
        rows = ~np.isnan(test_targets[:, column])
        if one.r2 is not None:
            r2 = float(model.score(tested[rows], test_targets[rows, column]))
            differences.append(abs(r2 - one.r2))
    names = tuple(one.name for one in scored[:_CHECKED])
    return NumbersCheck(names, wall_s, max(gaps), max(differences) if differences else None)
