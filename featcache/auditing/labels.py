"""Likely wrong labels, found by heads that were not trained on the image.

A training image is judged by a head fitted to the other folds, a test image by one fitted to the
whole training split. Confident learning sets a threshold for each class j: the mean probability of
j over the training images labelled j. So a class of which the head is never confident is not
suspected as a whole. An image counts as class j where its probability of j reaches that
threshold; among several such classes the most likely one counts. A suspect counts as another class
than its label, and its label is not the most likely class either: the off-diagonal of the
confident joint. Suspects are ranked by p(label), their self-confidence, which finds planted errors
better than the margin to the suggested class (docs/audit.md has both).

Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", Journal
of Artificial Intelligence Research 70 (2021), 1373-1411. This is our own implementation: cleanlab,
the authors' library, is under the AGPL-3.0, which this Apache-2.0 project cannot depend on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..metrics import softmax
from ..probes.blocks import Features, Rows, each_block, loaded
from ..probes.lbfgs import train_lbfgs
from ..probes.objective import Solution
from ..probes.recipes import ExactRecipe
from ..probes.sweep import C_GRID
from ..progress import OnProgress, Progress

_GRID = C_GRID[::3]
_TOLERANCE = 1e-3  # of the objective: enough to compare probabilities
_TINY = 1e-12


@dataclass(frozen=True)
class Heads:
    """Probabilities float64 (N, K) of training images and (M, K) of test images, and the penalty.

    Rows of training images are NaN where no head can judge: the only image of a class.
    """

    train: np.ndarray
    test: np.ndarray
    C: float  # chosen by the log-loss on one fold


@dataclass(frozen=True)
class Doubts:
    """The suspects of one split, the most suspect first; rows are among its labelled images."""

    rows: np.ndarray  # int64 (S,)
    suggested: np.ndarray  # int64 (S,): classes
    self_confidence: np.ndarray  # float64 (S,): probability of the label
    confidence: np.ndarray  # float64 (S,): probability of the suggested class


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
) -> Heads:
    """Fit one head per fold and one on all; labels int64 (N,) are 0 to K - 1, each present."""
    counts = np.bincount(labels)
    # The only image of a class cannot be held out: every head trains on it, and none judges it.
    single = counts[labels] == 1
    numbers = np.where(single, -1, fold_numbers(labels, folds, seed))
    probabilities = np.full((len(labels), len(counts)), np.nan)
    fold_sizes = np.bincount(numbers[~single], minlength=folds)
    used = [int(fold) for fold in np.argsort(-fold_sizes, kind="stable") if fold_sizes[fold]]
    total = len(used) + 1
    on_progress(Progress("heads", 0, total, "fit"))
    C = 1.0  # where no image can be held out to choose it
    solution: Solution | None = None
    for done, fold in enumerate(used):
        held, kept = np.flatnonzero(numbers == fold), np.flatnonzero(numbers != fold)
        features = loaded(Rows(train, kept))
        unseen = Rows(train, held)
        if not done:
            C, solution = _choose(features, labels[kept], unseen, labels[held], len(counts))
        else:
            solution = _fit(features, labels[kept], len(counts), C, solution)
        probabilities[held] = _probabilities(solution, unseen)
        on_progress(Progress("heads", done + 1, total, "fit"))
    solution = _fit(train, labels, len(counts), C, solution)
    on_progress(Progress("heads", total, total, "fit"))
    return Heads(probabilities, _probabilities(solution, test), C)


def _choose(
    features: Features,
    labels: np.ndarray,
    held: Features,
    held_labels: np.ndarray,
    n_classes: int,
) -> tuple[float, Solution]:
    """Return the C with the lowest log-loss on the held-out fold, and its solution.

    The log-loss falls and then rises with C: the search stops where it rises.
    """
    best: tuple[float, float, Solution] | None = None
    solution: Solution | None = None
    for C in _GRID:
        solution = _fit(features, labels, n_classes, C, solution)
        own = _probabilities(solution, held)[np.arange(len(held_labels)), held_labels]
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


def _probabilities(solution: Solution, features: Features) -> np.ndarray:
    transposed = solution.weight.T.astype(np.float32)

    def of_block(features: Features, rows: slice) -> np.ndarray:
        return softmax(np.asarray(features[rows], np.float32) @ transposed + solution.bias)

    n_classes = len(solution.bias)
    blocks = each_block([features], of_block, features.shape[1] + 4 * n_classes)
    return np.concatenate([np.empty((0, n_classes)), *blocks])


def doubts(probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> Doubts:
    """Return the suspects among labelled images, by probabilities (N, K) and thresholds (K,).

    Images whose probabilities are NaN are left out.
    """
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = reached.argmax(axis=1)
    rows = np.flatnonzero(
        (reached.max(axis=1, initial=-1.0) >= 0)
        & (suggested != labels)
        & (probabilities.argmax(axis=1) != labels)
    )
    own = probabilities[rows, labels[rows]]
    other = probabilities[rows, suggested[rows]]
    order = np.argsort(own, kind="stable")
    return Doubts(rows[order], suggested[rows][order], own[order], other[order])


def thresholds_of(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean probability of each class over the images with its label: float64 (K,).

    It is infinite for a class without judged images: no image counts as that class.
    """
    n_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    judged = ~np.isnan(own)
    counts = np.bincount(labels[judged], minlength=n_classes)
    sums = np.bincount(labels[judged], own[judged], minlength=n_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
