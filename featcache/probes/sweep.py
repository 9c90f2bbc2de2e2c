"""The choice of C: a grid, scored on a stratified holdout of the training split.

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
from ..sampling import stratified_rows
from .blocks import Features, Rows
from .lbfgs import coordinates_of, train_lbfgs
from .objective import Solution, predict
from .recipes import ExactRecipe
from .ridge import Ridge
from .scaling import Moments

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
        scikit-learn's: 1 / (N * lambda).
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


def sweep_lbfgs(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ExactRecipe,
    *,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
    score: Score = top1,
    on_progress: OnProgress = silent,
) -> Sweep:
    """Sweep C for logistic regression on training features (N, D), one array per flip view.

    The views of an image are fitted or held out together; the first one is scored. Raises
    DatasetError where a class is too small to divide.
    """
    solution: Solution | None = None
    coordinates: Moments | None = None

    def fit(fit_views: list[Features], fit_labels: np.ndarray, value: float) -> Solution:
        nonlocal solution, coordinates
        coordinates = coordinates or coordinates_of(fit_views)
        decay = 1 / (value * len(fit_views) * len(fit_labels))
        eased = replace(recipe, weight_decay=decay, tolerance=max(recipe.tolerance, _TOLERANCE))
        solution = train_lbfgs(
            fit_views, fit_labels, n_classes, eased, start=solution, coordinates=coordinates
        )
        return solution

    return _sweep(views, labels, fit, grid, seed, score, on_progress)


def sweep_ridge(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    *,
    grid: Sequence[float] = C_GRID,
    seed: int = 0,
    score: Score = top1,
    on_progress: OnProgress = silent,
) -> Sweep:
    """Sweep C for ridge regression, with one eigendecomposition for all values."""
    ridge: Ridge | None = None

    def fit(fit_views: list[Features], fit_labels: np.ndarray, value: float) -> Solution:
        nonlocal ridge
        ridge = ridge or Ridge(fit_views, fit_labels, n_classes)
        return ridge.solve(1 / (value * len(fit_views) * len(fit_labels)))

    return _sweep(views, labels, fit, grid, seed, score, on_progress)


def _sweep(
    views: Sequence[Features],
    labels: np.ndarray,
    fit: Callable[[list[Features], np.ndarray, float], Solution],
    grid: Sequence[float],
    seed: int,
    score: Score,
    on_progress: OnProgress,
) -> Sweep:
    counts = np.bincount(labels)
    rare = np.flatnonzero(counts == 1)
    if rare.size:
        raise DatasetError(
            f"sweep: expected 2 training images of every class, so that one can be held out, found "
            f"1 of class {rare[0]} ({rare.size} such classes); use --no-sweep, or choose --C"
        )
    held_out = max(round(HOLDOUT_SHARE * len(labels)), len(np.unique(labels)))
    holdout = stratified_rows(labels, held_out, seed, "holdout of the training images")
    fitted = np.setdiff1d(np.arange(len(labels)), holdout)
    # Gathered block by block in every pass: a copy would need 0.8 of the features' memory and
    # save an eighth of the time.
    fit_views: list[Features] = [Rows(features, fitted) for features in views]
    fit_labels, holdout_labels = labels[fitted], labels[holdout]
    held = Rows(views[0], holdout)
    points = []
    ordered = sorted(grid)
    for done, value in enumerate(ordered):
        on_progress(Progress("sweep", done, len(ordered), "value"))
        solution = fit(fit_views, fit_labels, value)
        predicted = predict(held, solution.weight, solution.bias)
        points.append(SweepPoint(value, score(predicted, holdout_labels), bool(solution.converged)))
    on_progress(Progress("sweep", len(ordered), len(ordered), "value"))
    best = max(points, key=lambda point: point.score)
    edges = {ordered[0]: "lowest", ordered[-1]: "highest"}
    return Sweep(best.C, tuple(points), len(fitted), len(holdout), edges.get(best.C, ""))
