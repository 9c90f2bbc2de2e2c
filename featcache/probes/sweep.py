"""The choice of C: a grid, scored on a holdout of the training split, or on the split val.

The test split has no part in it. Each solution along the grid starts from the one before. The
chosen C is then fitted to all training features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import DatasetError
from ..metrics import top1
from ..progress import OnProgress, Progress, silent
from ..sampling import folds, stratified_rows
from .blocks import Features, Rows
from .lbfgs import coordinates_of, train_lbfgs
from .objective import Solution, predict
from .recipes import ExactRecipe
from .ridge import Ridge
from .weights import counted, total_weight

# From a head that hardly fits to one that almost interpolates, for ResNet features.
C_GRID = tuple(float(value) for value in np.logspace(-4, 2, 20))
HOLDOUT_SHARE = 0.2
_TOLERANCE = 1e-3  # enough to rank the values; the chosen one is solved to the recipe's own

Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class SweepPoint:
    """One value of the grid.

    Parameters
    ----------
    C : float
        scikit-learn's: 1 / (N * lambda), with the sum of the weights in place of N.
    score : float
        On the holdout, in [0, 1].
    converged : bool
        Whether the fit reached its tolerance.
    """

    C: float
    score: float
    converged: bool


@dataclass(frozen=True)
class Sweep:
    """The scores of a whole grid, and the choice.

    Parameters
    ----------
    C : float
        The best value; among equals the smallest.
    points : tuple of SweepPoint
        By increasing C.
    n_fit, n_holdout : int
        Images fitted and held out.
    at_edge : str
        ``"lowest"`` or ``"highest"`` where the best value is at that end of the grid, so that a
        better one may lie outside; else empty.
    """

    C: float
    points: tuple[SweepPoint, ...]
    n_fit: int
    n_holdout: int
    at_edge: str


@dataclass(frozen=True)
class Division:
    """What a sweep fits and what it scores: the training images divided, or all and a given part.

    ``views`` (N, D) with ``labels`` and ``weights`` (N,) are fitted; ``held`` (M, D) with
    ``held_labels`` int64 (M,) are scored, one view of each image and unweighted.
    """

    views: Sequence[Features]
    labels: np.ndarray
    weights: np.ndarray | None
    held: Features
    held_labels: np.ndarray

    def decay(self, C: float) -> float:
        """Return lambda at one C."""
        return 1 / (C * total_weight(self.views, self.weights))


def divide(
    views: Sequence[Features],
    labels: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    holdout: tuple[Features, np.ndarray] | None = None,
    seed: int = 0,
) -> Division:
    """Draw a holdout of the training images, stratified and with whole groups, or take a given one.

    Arguments as of `sweep_lbfgs`.
    """
    if groups is not None and weights is not None:
        groups = groups[weights != 0]
    views, labels, weights = counted(views, labels, weights)
    if holdout is not None:
        if not len(holdout[1]):
            raise DatasetError(
                "sweep: expected labelled images in the holdout, found none; use --no-sweep, or "
                "choose --C"
            )
        return Division(views, labels, weights, *holdout)
    if groups is not None:
        n_groups = len(np.unique(groups))
        if n_groups < 2:
            raise DatasetError(
                "sweep: expected training images of 2 groups or more, so that one can be held "
                f"out, found {n_groups}; use --no-sweep, or choose --C"
            )
        n_folds = min(round(1 / HOLDOUT_SHARE), n_groups)
        numbers = folds(labels, n_folds, seed, groups)
        # A class of a single group is better fitted than held out: the first fold that allows it.
        left = [len(np.unique(labels[numbers != fold])) for fold in range(n_folds)]
        held = np.flatnonzero(numbers == np.argmax(left))
    else:
        counts = np.bincount(labels)
        rare = np.flatnonzero(counts == 1)
        if rare.size:
            raise DatasetError(
                f"sweep: expected 2 training images of every class, so that one can be held out, "
                f"found 1 of class {rare[0]} ({rare.size} such classes); use --no-sweep, or "
                "choose --C"
            )
        count = max(round(HOLDOUT_SHARE * len(labels)), len(np.unique(labels)))
        held = stratified_rows(labels, count, seed, "holdout of the training images")
    fitted = np.setdiff1d(np.arange(len(labels)), held)
    # Gathered block by block in every pass: a copy would need 0.8 of the features' memory and
    # save an eighth of the time.
    return Division(
        [Rows(features, fitted) for features in views],
        labels[fitted],
        None if weights is None else weights[fitted],
        Rows(views[0], held),
        labels[held],
    )


def sweep_lbfgs(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ExactRecipe,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    holdout: tuple[Features, np.ndarray] | None = None,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
    score: Score = top1,
    on_progress: OnProgress = silent,
) -> Sweep:
    """Sweep C for logistic regression on training features (N, D), one array per flip view.

    The views of an image are fitted or held out together; the first one is scored. ``weights``
    float64 (N,) count in the fits and not in the score. Images of one of the ``groups`` int64
    (N,) are fitted or held out together. A given ``holdout``, features (M, D) and labels int64
    (M,), is scored instead, and all training images are fitted; a class that only it has counts
    as an error. Raises DatasetError where a class is too small to divide.
    """
    parts = divide(views, labels, weights=weights, groups=groups, holdout=holdout, seed=seed)
    return swept_lbfgs(parts, n_classes, recipe, grid, score, on_progress)[0]


def swept_lbfgs(
    parts: Division,
    n_classes: int,
    recipe: ExactRecipe,
    grid: Sequence[float] = C_GRID,
    score: Score = top1,
    on_progress: OnProgress = silent,
    patience: int | None = None,
) -> tuple[Sweep, Solution]:
    """Sweep C on divided images; return also the solution at the best C, to start from.

    With ``patience`` the sweep ends after that many values in a row without a better score: the
    largest values of C take the most passes.
    """
    solution: Solution | None = None
    coordinates = coordinates_of(parts.views, parts.weights)

    def fit(value: float) -> Solution:
        nonlocal solution
        eased = replace(
            recipe,
            weight_decay=parts.decay(value),
            tolerance=max(recipe.tolerance, _TOLERANCE),
        )
        solution = train_lbfgs(
            parts.views,
            parts.labels,
            n_classes,
            eased,
            weights=parts.weights,
            start=solution,
            coordinates=coordinates,
        )
        return solution

    return _sweep(parts, fit, grid, score, on_progress, patience)


def sweep_ridge(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    *,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    holdout: tuple[Features, np.ndarray] | None = None,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
    score: Score = top1,
    on_progress: OnProgress = silent,
) -> Sweep:
    """Sweep C for ridge regression, with one eigendecomposition for all values.

    Arguments as of `sweep_lbfgs`.
    """
    parts = divide(views, labels, weights=weights, groups=groups, holdout=holdout, seed=seed)
    ridge = Ridge(parts.views, parts.labels, n_classes, parts.weights)
    return _sweep(parts, lambda C: ridge.solve(parts.decay(C)), grid, score, on_progress)[0]


def _sweep(
    parts: Division,
    fit: Callable[[float], Solution],
    grid: Sequence[float],
    score: Score,
    on_progress: OnProgress,
    patience: int | None = None,
) -> tuple[Sweep, Solution]:
    points: list[SweepPoint] = []
    best: tuple[int, Solution] | None = None
    ordered = sorted(grid)
    for done, value in enumerate(ordered):
        on_progress(Progress("sweep", done, len(ordered), "value"))
        solution = fit(value)
        predicted = predict(parts.held, solution.weight, solution.bias)
        reached = score(predicted, parts.held_labels)
        points.append(SweepPoint(value, reached, bool(solution.converged)))
        if best is None or reached > points[best[0]].score:
            best = done, solution
        elif patience is not None and done - best[0] >= patience:
            break
    on_progress(Progress("sweep", len(ordered), len(ordered), "value"))
    assert best is not None
    chosen, solution = best
    edge = {0: "lowest", len(ordered) - 1: "highest"}.get(chosen, "")
    n_fit, n_holdout = len(parts.labels), len(parts.held_labels)
    return Sweep(points[chosen].C, tuple(points), n_fit, n_holdout, edge), solution
