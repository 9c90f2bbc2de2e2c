"""The probe that trains nothing: an image is what its nearest neighbours are.

Neighbours are found by the cosine of their features. The k nearest vote for their
class, each with the weight ``exp(similarity / temperature)``, and the class with
the largest sum is predicted. There is no optimum to miss and hardly anything to
tune, so that a good k-NN probe says that the features themselves are good,
and one far below the linear probe says that the head had to look for the
directions that matter. Every k is answered from the same neighbours: report the
curve, or the k that you named before you saw it.

Nothing of size M x N is ever stored. Blocks of test images meet blocks of training
images, and of each meeting the best neighbours alone are kept.

References
----------
Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance
discrimination", CVPR 2018: the weighted vote, temperature 0.07, k = 200. Caron et
al., "Emerging properties in self-supervised vision transformers", ICCV 2021:
k = 10, 20, 100 and 200.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import RecipeError, ShapeMismatchError
from ..progress import OnProgress, Progress, silent
from .rows import Features
from .scaling import unit_length

__all__ = ["knn_probe"]

_BLOCK_BYTES = 8 << 20  # of each array that a block needs; about five of them live at a time
_MAX_TEST_ROWS = 1024


def knn_probe(
    train_features: Features,
    train_labels: np.ndarray,
    test_features: Features,
    n_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    *,
    on_progress: OnProgress = silent,
) -> dict[int, np.ndarray]:
    """Predict the class of each test image by weighted votes of its nearest neighbours.

    Products are float32, votes float64. Ties have rules: of training images equally
    similar, as float32 has it, the one that comes first is nearer; of classes with
    equal votes the lower one wins. A feature of zeros has no direction, and its
    similarity to everything is 0.

    Parameters
    ----------
    train_features : numpy.ndarray or Rows
        (N, D); float16, float32 or float64, memory-mapped or not.
    train_labels : numpy.ndarray
        int64 (N,), in [0, n_classes).
    test_features : numpy.ndarray
        (M, D), as the training features.
    n_classes : int
        K.
    ks : sequence of int
        Numbers of neighbours, each from 1 to N.
    temperature : float
        Positive. The smaller, the more the nearest of the k decide.
    on_progress : callable
        Hears of test images.

    Returns
    -------
    dict of int to numpy.ndarray
        For each k, ascending, the predicted classes: int64 (M,).

    Raises
    ------
    RecipeError
        No k, a k below 1 or above N, or a temperature that is not positive.
    ShapeMismatchError
        Training and test features of different lengths.
    """
    n, m = len(train_features), len(test_features)
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > n:
        raise RecipeError(
            f"k: expected numbers of neighbours from 1 to the {n} training images, found "
            f"{', '.join(map(str, ks)) or 'none'}; ask for others"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise RecipeError(f"temperature: expected a positive number, found {temperature}")
    if train_features.shape[1:] != test_features.shape[1:]:
        raise ShapeMismatchError(
            f"test features: expected (M, {train_features.shape[1]}) as in training, found "
            f"{test_features.shape}; both must come from the same backbone"
        )
    train_rows, test_rows = _block_sizes(train_features.shape[1], n_classes, ks[-1])
    predicted = {k: np.empty(m, np.int64) for k in ks}
    for start in range(0, m, test_rows):
        on_progress(Progress("k-NN", start, m))
        block = slice(start, start + test_rows)
        similarity, neighbours = _nearest(test_features[block], train_features, ks[-1], train_rows)
        classes = train_labels[neighbours]
        # Relative to the nearest, where exp cannot overflow; a common factor elects nobody.
        weights = np.exp((similarity - similarity[:, :1]) / temperature)
        votes = np.zeros((len(classes), n_classes))
        counted = 0
        for k in ks:
            votes += _tally(classes[:, counted:k], weights[:, counted:k], n_classes)
            counted = k
            predicted[k][block] = votes.argmax(axis=1)
    on_progress(Progress("k-NN", m, m))
    return predicted


def _block_sizes(dim: int, n_classes: int, k: int) -> tuple[int, int]:
    """Return how many training and test images meet at once."""
    train_rows = max(256, _BLOCK_BYTES // (4 * dim))
    widest = 4 * max(train_rows, dim, 2 * n_classes, 4 * k)  # bytes per test image
    return train_rows, min(_MAX_TEST_ROWS, max(16, _BLOCK_BYTES // widest))


def _nearest(
    queries: np.ndarray, train_features: Features, k: int, train_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return similarity, float64, and row of the k nearest, nearest first: (B, k) each."""
    queries = unit_length(queries)
    best = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(train_features), train_rows):
        similarity = queries @ unit_length(train_features[start : start + train_rows]).T
        values, columns = _candidates(similarity, best, k)
        # What is there comes from earlier rows: a stable sort leaves it first among equals.
        values, columns = np.hstack([best, values]), np.hstack([rows, columns + start])
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(values, order, axis=1)
        rows = np.take_along_axis(columns, order, axis=1)
    return best.astype(np.float64), rows


def _candidates(similarity: np.ndarray, best: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return value and column of all that can displace one of the k best: (B, W) each.

    Columns ascend. Rows with fewer than W of them end in values of minus infinity.
    """
    if best.shape[1] == k:
        # After the first blocks few come closer than the k-th, and picking these out costs
        # far less than a partition. Only where many do, as when rows are sorted by class, not.
        closer = similarity > best[:, -1:]
        counts = closer.sum(axis=1)
        if counts.max() <= 4 * k:
            row, column = np.nonzero(closer)
            place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            values = np.full((len(similarity), counts.max()), -np.inf, np.float32)
            columns = np.zeros(values.shape, np.int64)
            values[row, place], columns[row, place] = similarity[row, column], column
            return values, columns
    columns = _largest(similarity, k)
    return np.take_along_axis(similarity, columns, axis=1), columns


def _largest(similarity: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k largest of each row, ascending; of equals the first."""
    n = similarity.shape[1]
    if k >= n:
        return np.tile(np.arange(n), (len(similarity), 1))
    columns = np.argpartition(similarity, n - k, axis=1)[:, n - k :]
    least = np.take_along_axis(similarity, columns, axis=1).min(axis=1)
    # argpartition takes any of those that equal the k-th: where some were left out, choose.
    left_out = (similarity >= least[:, None]).sum(axis=1) > k
    for row in np.flatnonzero(left_out):
        candidates = np.flatnonzero(similarity[row] >= least[row])
        order = np.argsort(-similarity[row, candidates], kind="stable")
        columns[row] = candidates[order[:k]]
    columns.sort(axis=1)
    return columns


def _tally(classes: np.ndarray, weights: np.ndarray, n_classes: int) -> np.ndarray:
    """Return float64 (B, K): the sum of the weights that each class got."""
    cells = np.arange(len(classes))[:, None] * n_classes + classes
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(classes) * n_classes)
    tally: np.ndarray = votes.reshape(len(classes), n_classes)
    return tally
