"""The k-nearest-neighbour probe of a cache: how good the features are without any training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import RecipeError, ShapeMismatchError
from ..metrics import balanced_accuracy, macro_f1, top1, wilson_interval
from ..notebook import Rows, ShownAsTable
from ..progress import OnProgress, Progress, silent
from ..runs import cache_facts, new_run, runs_folder, save_run
from ..store.cache import Cache, load, newest_cache
from .blocks import Features
from .labelled import labelled
from .search import nearest_blocks


@dataclass(frozen=True)
class KnnResult(ShownAsTable):
    """Accuracy of the vote of k neighbours.

    Parameters
    ----------
    k : int
        Neighbours.
    top1 : float
        On the test split, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    balanced_accuracy, macro_f1 : float
        Mean recall and mean F1 over classes.
    n_train, n_test : int
        Images.
    wall_s : float
        Of all k together: the similarities are computed once.
    """

    k: int
    top1: float
    top1_interval: tuple[float, float]
    balanced_accuracy: float
    macro_f1: float
    n_train: int
    n_test: int
    wall_s: float


def knn(
    cache: str | Path | Cache | None = None,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> list[KnnResult]:
    """Classify the test split by the training split's nearest features.

    Nothing is chosen: every k is reported. Images without a label are left out. See
    `featcache.probes.knn` for the votes.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    ks : sequence of int
        Numbers of neighbours.
    temperature : float
        Of the votes' weights.
    runs : str or Path, optional
        Folder for the records, one for each k; ``cache/runs`` by default.
    on_progress : callable
        Hears of test images.

    Returns
    -------
    list of KnnResult
        By increasing k.

    Raises
    ------
    CacheError
        No cache, or one that cannot be trusted.
    RecipeError
        A k below 1 or above the number of training images, or no positive temperature.
    """
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache())
    cache.check_vectors()
    train, test = labelled(cache, "train"), labelled(cache, "test")
    labels = test.labels
    n_classes = len(cache.class_names)
    started = time.perf_counter()
    voted = knn_probe(
        train.views[0],
        train.labels,
        test.views[0],
        n_classes,
        ks,
        temperature,
        on_progress=on_progress,
    )
    spent = time.perf_counter() - started
    results: Rows[KnnResult] = Rows()
    for k, predicted in voted.items():
        accuracy = top1(predicted, labels)
        result = KnnResult(
            k=k,
            top1=accuracy,
            top1_interval=wilson_interval(accuracy, len(labels)),
            balanced_accuracy=balanced_accuracy(predicted, labels, n_classes),
            macro_f1=macro_f1(predicted, labels, n_classes),
            n_train=len(train.labels),
            n_test=len(labels),
            wall_s=spent,
        )
        results.append(result)
        run = new_run(runs_folder(runs), f"knn{k}")
        record = {"kind": "knn", "method": f"knn, k = {k}", **asdict(result), "run": run.name}
        rate = len(labels) / spent
        save_run(
            run,
            {
                **record,
                **cache_facts(cache),
                "epochs": [],
                "n_epochs": 0,
                "images_per_s": rate,
                "temperature": temperature,
            },
        )
    return results


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
