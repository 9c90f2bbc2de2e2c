"""Likely wrong labels, found by heads that were not trained on the image.

A training image is judged by a head fitted to the other folds, a test image by one fitted to the
whole training split. The labels of its nearest training images weigh in, as a product of experts:
p(j) times a floor plus their vote for j.

Suspects are the images whose label is not the most likely class. They are ranked by

    score = sum_j p(j) w(label, j) / (p(label) + sum_j p(j) w(label, j)),    j other than the label

with w = 1 where nothing speaks for one class or the other. Two classes that look alike are confused
both ways, about as often; somebody who mistakes one class for another does so one way. So w(i, j)
is above 1 where images labelled i count as j clearly more often than the reverse, and below 1 for
the reverse. Counts are those of confident learning: an image counts as the most likely class among
those whose threshold it reaches, the mean probability of j over the training images labelled j. As
many suspects are listed as images count as another class than their label. benchmarks/audit.py
compares this with cleanlab's rankings.

Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", Journal
of Artificial Intelligence Research 70 (2021), 1373-1411. This is our own implementation: cleanlab,
the authors' library, is under the AGPL-3.0, which this Apache-2.0 project cannot depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics import softmax, wilson_interval
from ..probes.blocks import Features, Rows, each_block, loaded
from ..probes.lbfgs import train_lbfgs
from ..probes.objective import Solution
from ..probes.recipes import ExactRecipe
from ..probes.sweep import C_GRID
from ..progress import OnProgress, Progress

_GRID = C_GRID[::3]
_STEPS = (0.5, 1.0, 2.0, 4.0, 8.0)  # around the C of earlier heads
_TOLERANCE = 1e-3  # of the objective: enough to compare probabilities
_TINY = 1e-12
_TEMPERATURE = 0.07  # of the neighbours' cosines, as in DINO's k-NN
_FLOOR = 0.2  # of the neighbours' vote: they alone never rule a class out
_ERRORS = 4.0  # standard errors below the measured share of a direction
_POWER = 3.0  # of the ratio of the two directions


@dataclass(frozen=True)
class Heads:
    """Probabilities float64 (N, K) of training images and (M, K) of test images, and the penalty.

    Rows of training images are NaN where no head can judge: the only image of a class. The
    solutions are by fold; ``whole`` is that of all training images.
    """

    train: np.ndarray
    test: np.ndarray
    C: float  # chosen by the log-loss on one fold
    solutions: Mapping[int, Solution]
    whole: Solution


@dataclass(frozen=True)
class Doubts:
    """The suspects of one split, the most suspect first; rows are among its labelled images."""

    rows: np.ndarray  # int64 (S,)
    suggested: np.ndarray  # int64 (S,): classes
    self_confidence: np.ndarray  # float64 (S,): probability of the label
    confidence: np.ndarray  # float64 (S,): probability of the suggested class
    score: np.ndarray  # float64 (S,): in [0, 1]


@dataclass(frozen=True)
class Reference:
    """What the labels of the training split say of its classes.

    Parameters
    ----------
    thresholds : ndarray
        Float64 (K,): the mean probability of a class over the images with its label; infinite for
        a class without judged images.
    one_way : tuple of (int, int, float)
        Label, other class and weight, for the pairs of classes whose weight is not 1.
    """

    thresholds: np.ndarray
    one_way: tuple[tuple[int, int, float], ...]


def fold_numbers(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign the shuffled rows of each class to folds in turn: int64 (N,), in [0, folds).

    The folds' numbers of images of a class differ by at most 1.
    """
    numbers = np.empty(len(labels), np.int64)
    assigned = 0
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)
        np.random.default_rng((seed, label)).shuffle(rows)
        numbers[rows] = (assigned + np.arange(len(rows))) % folds
        assigned += len(rows)  # the next class starts at the next fold: folds of equal size
    return numbers


def fit_heads(
    train: Features,
    labels: np.ndarray,
    test: Features,
    folds: int,
    seed: int,
    on_progress: OnProgress,
    *,
    numbers: np.ndarray | None = None,
    start: Heads | None = None,
) -> Heads:
    """Fit one head per fold and one on all; labels int64 (N,) are 0 to K - 1, each present.

    ``numbers`` int64 (N,) are the folds of the images, by default `fold_numbers`. ``start`` are
    heads on other labels of these K classes: solutions to start from, and a C near by.
    """
    counts = np.bincount(labels)
    # The only image of a class cannot be held out: every head trains on it, and none judges it.
    single = counts[labels] == 1
    if numbers is None:
        numbers = fold_numbers(labels, folds, seed)
    numbers = np.where(single, -1, numbers)
    probabilities = np.full((len(labels), len(counts)), np.nan)
    fold_sizes = np.bincount(numbers[~single], minlength=folds)
    used = [int(fold) for fold in np.argsort(-fold_sizes, kind="stable") if fold_sizes[fold]]
    total = len(used) + 1
    on_progress(Progress("heads", 0, total, "fit"))
    C = start.C if start else 1.0  # where no image can be held out to choose it
    grid = [C * step for step in _STEPS] if start else _GRID
    solutions: dict[int, Solution] = {}
    solution: Solution | None = None
    for done, fold in enumerate(used):
        held, kept = np.flatnonzero(numbers == fold), np.flatnonzero(numbers != fold)
        features = loaded(Rows(train, kept))
        unseen = Rows(train, held)
        near = solution if start is None else start.solutions.get(fold, solution)
        if not done:
            C, solution = _choose(
                features, labels[kept], unseen, labels[held], len(counts), grid, near
            )
        else:
            solution = _fit(features, labels[kept], len(counts), C, near)
        solutions[fold] = solution
        probabilities[held] = probabilities_of(solution, unseen)
        on_progress(Progress("heads", done + 1, total, "fit"))
    whole = _fit(train, labels, len(counts), C, solution if start is None else start.whole)
    on_progress(Progress("heads", total, total, "fit"))
    return Heads(probabilities, probabilities_of(whole, test), C, solutions, whole)


def _choose(
    features: Features,
    labels: np.ndarray,
    held: Features,
    held_labels: np.ndarray,
    n_classes: int,
    grid: Sequence[float],
    solution: Solution | None,
) -> tuple[float, Solution]:
    """Return the C with the lowest log-loss on the held-out fold, and its solution.

    The log-loss falls and then rises with C: the search stops where it rises.
    """
    best: tuple[float, float, Solution] | None = None
    for C in grid:
        solution = _fit(features, labels, n_classes, C, solution)
        own = probabilities_of(solution, held)[np.arange(len(held_labels)), held_labels]
        loss = float(-np.log(np.maximum(own, _TINY)).mean())
        if best is not None and loss >= best[0]:
            break
        best = loss, C, solution
    assert best is not None
    return best[1], best[2]


def _fit(
    features: Features, labels: np.ndarray, n_classes: int, C: float, start: Solution | None
) -> Solution:
    recipe = ExactRecipe(weight_decay=1 / (C * len(labels)), tolerance=_TOLERANCE)
    return train_lbfgs([features], labels, n_classes, recipe, start=start)


def probabilities_of(solution: Solution, features: Features) -> np.ndarray:
    """Return the probability of each class for features (N, D): float64 (N, K)."""
    transposed = solution.weight.T.astype(np.float32)

    def of_block(features: Features, rows: slice) -> np.ndarray:
        return softmax(np.asarray(features[rows], np.float32) @ transposed + solution.bias)

    n_classes = len(solution.bias)
    blocks = each_block([features], of_block, features.shape[1] + 4 * n_classes)
    return np.concatenate([np.empty((0, n_classes)), *blocks])


def with_neighbours(
    probabilities: np.ndarray, similarity: np.ndarray, neighbours: np.ndarray
) -> np.ndarray:
    """Return probabilities (N, K) times the neighbours' vote, normalised.

    ``neighbours`` int64 (N, k) are labels, -1 for none, and ``similarity`` (N, k) their cosines,
    the nearest first.
    """
    if not neighbours.shape[1]:
        return probabilities
    votes = np.exp((similarity - similarity[:, :1]).astype(np.float64) / _TEMPERATURE)
    votes[neighbours < 0] = 0
    votes /= np.maximum(votes.sum(axis=1, keepdims=True), _TINY)
    rows = np.arange(len(probabilities))
    joined = _FLOOR * probabilities
    for vote, label in zip(votes.T, neighbours.T, strict=True):
        joined[rows, label] += vote * probabilities[rows, label]  # label -1 has no vote
    joined /= np.maximum(joined.sum(axis=1, keepdims=True), _TINY)
    return joined


def reference_of(probabilities: np.ndarray, labels: np.ndarray) -> Reference:
    """Return what the training images' probabilities (N, K) and labels (N,) say of the classes."""
    n_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    judged = ~np.isnan(own)
    counts = np.bincount(labels[judged], minlength=n_classes)
    sums = np.bincount(labels[judged], own[judged], minlength=n_classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    counted = _counted(probabilities, labels, thresholds)
    other = np.flatnonzero(counted != labels)
    pairs, times = np.unique(labels[other] * n_classes + counted[other], return_counts=True)
    found = dict(zip(pairs.tolist(), times.tolist(), strict=True))
    one_way = []
    for pair, count in found.items():
        label, suggested = divmod(pair, n_classes)
        reverse = found.get(suggested * n_classes + label, 0)
        share = wilson_interval(count / (count + reverse), count + reverse, _ERRORS)[0]
        if share > 0.5:
            weight = (share / (1 - share)) ** _POWER
            one_way += [(label, suggested, weight), (suggested, label, 1 / weight)]
    return Reference(thresholds, tuple(one_way))


def _counted(probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the class that each image counts as, int64 (N,): its label where none is reached."""
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    return np.where(reached.max(axis=1, initial=-1.0) >= 0, reached.argmax(axis=1), labels)


def doubts(probabilities: np.ndarray, labels: np.ndarray, reference: Reference) -> Doubts:
    """Return the suspects among images with labels (N,), by probabilities (N, K).

    Images whose probabilities are NaN are left out.
    """
    best = probabilities.argmax(axis=1)
    judged = ~np.isnan(probabilities).any(axis=1)
    rows = np.flatnonzero(judged & (best != labels))
    listed = np.count_nonzero(_counted(probabilities, labels, reference.thresholds) != labels)
    likely, given, suggested = probabilities[rows], labels[rows], best[rows]
    own = likely[np.arange(len(rows)), given]
    others = 1 - own
    for label, other, weight in reference.one_way:
        chosen = given == label
        others[chosen] += (weight - 1) * likely[chosen, other]
    score = others / np.maximum(own + others, _TINY)
    # Far up, scores are 1 to the last digit: their complement ranks them.
    order = np.argsort(own / np.maximum(own + others, _TINY), kind="stable")[:listed]
    confidence = likely[np.arange(len(rows)), suggested]
    return Doubts(rows[order], suggested[order], own[order], confidence[order], score[order])
