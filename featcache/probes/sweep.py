"""The choice of C: a grid, scored on held-out training images, or on the split val.

The test split has no part in it. Each solution along the grid starts from the one before. The
chosen C is then fitted to all training features.

A fifth of the training images is held out; where that is less than `_SURE` images, each fifth in
turn. The standard error of an accuracy of 80 % is 4 points on 100 images: neighbours in the grid
differ by less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import DatasetError, RecipeError
from ..metrics import top1
from ..progress import OnProgress, Progress, silent
from ..sampling import folds, stratified_rows
from .blocks import Features, Rows
from .lbfgs import Shared, train_lbfgs
from .objective import Solution, predict
from .recipes import ExactRecipe
from .ridge import Ridge
from .weights import counted, total_weight

# From a head that hardly fits to one that almost interpolates, for ResNet features.
C_GRID = tuple(float(value) for value in np.logspace(-4, 2, 20))
_RATIO = C_GRID[1] / C_GRID[0]
_BEYOND = 20  # values below C_GRID, and above, that follow while they are better: to 1e-10 and 2e8
HOLDOUT_SHARE = 0.2
_SURE = 100
# Above so many products, of 3,300 images with 512 features and 10 classes, the whole grid takes
# seconds: the largest values take half of them, and are seldom the best.
_MANY_NUMBERS, _STRIDES = 1 << 24, (4, 2, 1)
_PATIENCE = 2  # then: every fourth value ends after so many in a row that are no better
_FOLD_STRIDES = (4, 2)  # of a few images, whose own noise hides a factor of 2
_TOLERANCE = 1e-3  # enough to rank the values; the chosen one is solved to the recipe's own

_MOST_VALUES = 1000

Score = Callable[[np.ndarray, np.ndarray], float]


def grid_of(grid: str | Sequence[float]) -> tuple[float, ...]:
    """Return values of C, ascending: those given, or of ``"start:stop:count"`` at equal ratios.

    Raises RecipeError where they are not two different positive numbers or more.
    """
    values: tuple[float, ...] = ()
    try:
        if isinstance(grid, str):
            first, last, number = grid.split(":")
            count, ends = int(number), (float(first), float(last))
            if 2 <= count <= _MOST_VALUES and min(ends) > 0 and max(ends) < math.inf:
                values = tuple(np.geomspace(*ends, count).tolist())
        else:
            values = tuple(float(value) for value in grid)
    except (TypeError, ValueError):
        pass
    good = len({value for value in values if 0 < value < math.inf})
    if not 2 <= len(values) <= _MOST_VALUES or good < len(values):
        raise RecipeError(
            f"grid: expected start:stop:count, such as 1e-6:1e5:45, or 2 to {_MOST_VALUES:,} "
            f"different positive numbers, found {grid!r}"
        )
    return tuple(sorted(values))


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
        By increasing C. Where a pass over the features is long (images times dimension times
        classes above 1.7e7) not the whole grid, but every fourth value, until two in a row are no
        better, and those around the best; of the default grid where several parts are held out,
        every fourth and those around the best. Beyond an end of the default
        grid as long as the score rises.
    n_fit, n_holdout : int
        Images fitted, of one part where several are held out in turn, and held out in all.
    at_edge : str
        ``"lowest"`` or ``"highest"`` where the best value is at that end of a given grid, so that
        a better one may lie outside; else empty.
    n_folds : int
        How many parts were held out in turn: 1, or up to 5 of few images.
    """

    C: float
    points: tuple[SweepPoint, ...]
    n_fit: int
    n_holdout: int
    at_edge: str
    n_folds: int = 1


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

    @property
    def numbers(self) -> int:
        """Return how many numbers times classes a pass multiplies."""
        n, dim = self.views[0].shape
        return len(self.views) * n * dim * (int(self.labels.max(initial=0)) + 1)

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
    in_turn: bool = True,
) -> list[Division]:
    """Hold out a part of the training images (N, D), stratified and with whole groups.

    The views of an image are fitted or held out together, and so are images of one of the
    ``groups`` int64 (N,). Of few images several parts are held out, each ``in_turn``. A given
    ``holdout``, features (M, D) and labels int64 (M,), is scored instead, and all training images
    are fitted; a class that only it has counts as an error. Raises DatasetError where a class is
    too small to divide.
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
        return [Division(views, labels, weights, *holdout)]
    classes, counts = np.unique(labels, return_counts=True)
    parts = int(counts.min()) if groups is None else len(np.unique(groups))
    if parts < 2 and groups is not None:
        raise DatasetError(
            "sweep: expected training images of 2 groups or more, so that one can be held "
            f"out, found {parts}; use --no-sweep, or choose --C"
        )
    if parts < 2:
        rare = classes[counts == 1]
        raise DatasetError(
            f"sweep: expected 2 training images of every class, so that one can be held out, "
            f"found 1 of class {rare[0]} ({rare.size} such classes); use --no-sweep, or "
            "choose --C"
        )
    if groups is None:
        count = max(round(HOLDOUT_SHARE * len(labels)), len(classes))
        held = stratified_rows(labels, count, seed, "holdout of the training images")
        if not in_turn or len(held) >= _SURE:
            return [_divided(views, labels, weights, held)]
    n_folds = min(round(1 / HOLDOUT_SHARE), parts)
    numbers = folds(labels, n_folds, seed, groups)
    # A class of a single group is better fitted than held out: only folds that allow it.
    left = np.array([len(np.unique(labels[numbers != fold])) for fold in range(n_folds)])
    chosen = np.flatnonzero(left == left.max())
    if groups is not None and (not in_turn or np.sum(numbers == chosen[0]) >= _SURE):
        chosen = chosen[:1]
    return [_divided(views, labels, weights, np.flatnonzero(numbers == fold)) for fold in chosen]


def _divided(
    views: Sequence[Features], labels: np.ndarray, weights: np.ndarray | None, held: np.ndarray
) -> Division:
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


def _fit_lbfgs(
    parts: Division, n_classes: int, recipe: ExactRecipe, until: float = math.inf
) -> Callable[[float], Solution]:
    """Return what fits one C, starting from the next smaller one.

    Large weights of a larger C would leave traces: at a small C the objective hardly sees them.
    """
    found: dict[float, Solution] = {}
    shared = Shared(parts.views, parts.weights)
    tolerance = max(recipe.tolerance, _TOLERANCE)

    def fit(value: float) -> Solution:
        smaller = max((C for C in found if value >= C), default=None)
        found[value] = train_lbfgs(
            parts.views,
            parts.labels,
            n_classes,
            replace(recipe, weight_decay=parts.decay(value), tolerance=tolerance),
            weights=parts.weights,
            start=None if smaller is None else found[smaller],
            shared=shared,
            until=until if found else math.inf,  # one answer, whatever it takes
        )
        return found[value]

    return fit


def _fit_ridge(parts: Division, n_classes: int) -> Callable[[float], Solution]:
    """Return what fits one C, with one eigendecomposition for all."""
    ridge = Ridge(parts.views, parts.labels, n_classes, parts.weights)
    return lambda C: ridge.solve(parts.decay(C))


def sweep(
    parts: Sequence[Division],
    n_classes: int,
    recipe: ExactRecipe | None,
    *,
    grid: Sequence[float] | None = None,
    score: Score = top1,
    patience: int | None = None,
    until: float = math.inf,
    on_progress: OnProgress = silent,
) -> tuple[Sweep, Solution]:
    """Choose C on divided images; return also the first part's solution there, to start from.

    Without a ``recipe`` ridge regression is fitted instead of logistic regression. ``grid`` is
    `C_GRID`, and what follows beyond its ends, by default. Of a grid with ``patience`` the sweep
    ends after that many values in a row without a better score: the largest values of C take the
    most passes. It ends ``until`` that value of `time.perf_counter`, after one value at least.
    """
    fits = [
        _fit_lbfgs(part, n_classes, recipe, until) if recipe else _fit_ridge(part, n_classes)
        for part in parts
    ]
    points: dict[int, SweepPoint] = {}
    ordered = sorted(C_GRID if grid is None else grid)
    beyond = _BEYOND if grid is None else 0
    labels = np.concatenate([part.held_labels for part in parts])
    best = -1
    solution: Solution

    def is_better(at: int) -> bool:
        """Fit and score a value, and return whether it is the best one."""
        nonlocal best, solution
        total = max(len(ordered), len(points) + 1)
        so_far = f"{100 * points[best].score:.1f} % of held-out images so far" if points else ""
        on_progress(Progress("sweep", len(points), total, "value", so_far))
        C = ordered[at] if 0 <= at < len(ordered) else ordered[0] * _RATIO**at
        found = [fit(C) for fit in fits]
        predicted = [
            predict(part.held, one.weight, one.bias) for part, one in zip(parts, found, strict=True)
        ]
        reached = score(np.concatenate(predicted), labels)
        points[at] = SweepPoint(C, reached, all(bool(one.converged) for one in found))
        leads = len(points) == 1 or reached > points[best].score
        # Among equals of the grid the smallest.
        if leads or (reached == points[best].score and 0 <= at < best):
            best, solution = at, found[0]
        return best == at

    many = parts[0].numbers >= _MANY_NUMBERS or until < math.inf
    strides: tuple[int, ...] = _STRIDES if many else (1,)
    if many and patience is None:
        patience = _PATIENCE
    if len(parts) > 1 and grid is None:
        strides = _FOLD_STRIDES
    first = list(range(strides[0] // 2, len(ordered), strides[0]))
    if until < math.inf:
        # The middle at once: the time may allow no other.
        first.insert(0, first.pop(len(first) // 2))
    for at in first:
        if not is_better(at) and patience is not None and at - best >= patience * strides[0]:
            break
        if time.perf_counter() >= until:
            break
    for stride in strides:
        # Those around the best, until it is better than both.
        while around := [
            at
            for at in (best - stride, best + stride)
            if at not in points and -beyond <= at < len(ordered) + beyond
            if time.perf_counter() < until
        ]:
            for at in around:
                is_better(at)
    on_progress(Progress("sweep", len(points), len(points), "value"))
    edge = {-beyond: "lowest", len(ordered) - 1 + beyond: "highest"}.get(best, "")
    return (
        Sweep(
            points[best].C,
            tuple(points[at] for at in sorted(points)),
            round(np.mean([len(part.labels) for part in parts])),
            len(labels),
            edge,
            len(parts),
        ),
        solution,
    )
