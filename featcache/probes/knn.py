"""The probe that trains nothing: an image is what its nearest neighbours are.

Neighbours are found by the cosine of their features. The k nearest vote for their
class, each with the weight ``exp(similarity / temperature)``, and the class with
the largest sum is predicted. There is no optimum to miss and hardly anything to
tune, so that a good k-NN probe says that the features themselves are good,
and one far below the linear probe says that the head had to look for the
directions that matter. Every k is answered from the same neighbours: report the
curve, or the k that you named before you saw it.

Nothing of size M x N is ever stored: see `featcache.probes.search`.

References
----------
Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance
discrimination", CVPR 2018: the weighted vote, temperature 0.07, k = 200. Caron et
al., "Emerging properties in self-supervised vision transformers", ICCV 2021:
k = 10, 20, 100 and 200.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from ..errors import RecipeError, ShapeMismatchError
from ..progress import OnProgress, Progress, silent
from .rows import Features
from .search import nearest_blocks

__all__ = ["knn_probe"]

_VOTES_BYTES = 8 << 20  # of the votes that are counted at once


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
    predicted = {k: np.empty(m, np.int64) for k in ks}
    rows = max(16, _VOTES_BYTES // (8 * n_classes))
    on_progress(Progress("k-NN", 0, m))
    with closing(nearest_blocks(test_features, train_features, ks[-1])) as blocks:
        for block, similarity, neighbours in blocks:
            for first in range(0, len(neighbours), rows):
                part = slice(first, first + rows)
                voted = _votes(
                    similarity[part], train_labels[neighbours[part]], n_classes, ks, temperature
                )
                for k, classes in voted:
                    predicted[k][block][part] = classes
            on_progress(Progress("k-NN", block.stop, m))
    return predicted


def _votes(
    similarity: np.ndarray,
    classes: np.ndarray,
    n_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, for each k, the classes that the first k of each row (B, W) elect."""
    # Relative to the nearest, where exp cannot overflow; a common factor elects nobody.
    nearness = similarity.astype(np.float64) - similarity[:, :1]
    weights = np.exp(nearness / temperature)
    votes = np.zeros((len(classes), n_classes))
    counted = 0
    for k in ks:
        votes += _tally(classes[:, counted:k], weights[:, counted:k], n_classes)
        counted = k
        yield k, votes.argmax(axis=1)


def _tally(classes: np.ndarray, weights: np.ndarray, n_classes: int) -> np.ndarray:
    """Return float64 (B, K): the sum of the weights that each class got."""
    cells = np.arange(len(classes))[:, None] * n_classes + classes
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(classes) * n_classes)
    tally: np.ndarray = votes.reshape(len(classes), n_classes)
    return tally
