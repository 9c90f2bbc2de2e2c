"""Likely wrong labels, by what a head says about images that it never saw.

Every training image gets its probabilities from a head fitted to the other folds, and
every test image from one fitted to all of train. Confident learning then asks more
than "does the head disagree": class j's threshold is the mean probability of j over the
training images labelled j, so that a class which the head is never sure of is not
suspected wholesale. An image counts as of class j where its probability reaches the
threshold of j, and of several such classes as of the likeliest. One that counts as of
another class than its label, and that the head would not give its label either, is
suspect: the off-diagonal of the confident joint. Suspects are ranked by p(label), their
self-confidence, which finds planted errors better than the margin to the suggested class
does (docs/audit.md has both).

The method is that of the paper, written anew here: cleanlab, its authors' library, is
under the AGPL-3.0, which does not fit into a project under the Apache-2.0.

References
----------
Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset
labels", Journal of Artificial Intelligence Research 70 (2021), 1373-1411.
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
_TOLERANCE = 1e-3  # of the objective: probabilities are compared, not their third digit
_TINY = 1e-12


@dataclass(frozen=True)
class Heads:
    """What heads say about labelled images; classes are those of the training labels.

    Parameters
    ----------
    train : numpy.ndarray
        float64 (N, K): of each training image by the head that did not see it; NaN where none
        can say, the only image of its class.
    test : numpy.ndarray
        float64 (M, K): by the head of all training images.
    C : float
        The penalty, chosen by the log-loss on one fold.
    """

    train: np.ndarray
    test: np.ndarray
    C: float


@dataclass(frozen=True)
class Doubts:
    """The suspects of one split: rows among its labelled images, the most suspect first.

    Parameters
    ----------
    rows, suggested : numpy.ndarray
        int64 (S,).
    self_confidence, confidence : numpy.ndarray
        float64 (S,): probability of the label, and of the suggested class.
    """

    rows: np.ndarray
    suggested: np.ndarray
    self_confidence: np.ndarray
    confidence: np.ndarray


def fold_numbers(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal each class's rows out to the folds in a drawn order: int64 (N,), in [0, folds).

    Every fold gets as many of a class as any other, or one more. The images of a class
    with fewer than folds go to as many folds, so that whichever is held out, the others stay.
    """
    numbers = np.empty(len(labels), np.int64)
    dealt = 0
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)
        np.random.default_rng((seed, label)).shuffle(rows)
        numbers[rows] = (dealt + np.arange(len(rows))) % folds
        dealt += len(rows)  # the next class goes on where this one ended: folds of one size
    return numbers


def fit_heads(
    train: Features,
    labels: np.ndarray,
    test: Features,
    folds: int,
    seed: int,
    on_progress: OnProgress,
) -> Heads:
    """Fit one head per fold and one on everything.

    Parameters
    ----------
    train, test : numpy.ndarray or Rows
        (N, D) and (M, D), finite.
    labels : numpy.ndarray
        int64 (N,), every number from 0 to K - 1 among them, K at least 2.
    folds : int
        At least 2.
    seed : int
        Of the folds.
    on_progress : callable
        Hears of heads.
    """
    counts = np.bincount(labels)
    # The only image of its class can't be held out: it stays in every head, and is not judged.
    single = counts[labels] == 1
    numbers = np.where(single, -1, fold_numbers(labels, folds, seed))
    probabilities = np.full((len(labels), len(counts)), np.nan)
    fold_sizes = np.bincount(numbers[~single], minlength=folds)
    used = [int(fold) for fold in np.argsort(-fold_sizes, kind="stable") if fold_sizes[fold]]
    total = len(used) + 1
    on_progress(Progress("heads", 0, total, "fit"))
    C = 1.0  # where no image can be held out to choose by
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
    """Return the C of least log-loss on the fold held out, and its solution.

    The log-loss falls and then rises with C: the search ends where it rises.
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
    """Return the suspects among labelled images; those whose probabilities are NaN are left out.

    Parameters
    ----------
    probabilities : numpy.ndarray
        float64 (N, K).
    labels : numpy.ndarray
        int64 (N,), in [0, K).
    thresholds : numpy.ndarray
        float64 (K,): from which probability on an image counts as of a class.
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
    """Return each class's mean probability over the images that bear its label: float64 (K,).

    Infinite for a class that no judged image bears: nothing counts as of it.
    """
    n_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    judged = ~np.isnan(own)
    counts = np.bincount(labels[judged], minlength=n_classes)
    sums = np.bincount(labels[judged], own[judged], minlength=n_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
