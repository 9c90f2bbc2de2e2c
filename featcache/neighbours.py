"""The k-nearest-neighbour probe of a cache: how good the features are without any training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .labelled import labelled
from .metrics import balanced_accuracy, macro_f1, top1, wilson_interval
from .notebook import Rows, ShownAsTable
from .probes import knn_probe
from .progress import OnProgress, silent
from .runs import cache_facts, new_run, runs_folder, save_run
from .store import Cache, load, newest_cache

__all__ = ["KnnResult", "knn"]


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
