"""Cross-validation: every image is predicted by a head that saw neither it nor its group.

Within each fold the penalty is chosen on a holdout of that fold's training images, so the images
that are predicted choose nothing. Varma and Simon, "Bias in error estimation when using
cross-validation for model selection", BMC Bioinformatics 7 (2006), 91.

The score is that of all out-of-fold predictions together, averaged over the repeats. For F1 and
other ratios of counts this is less biased than the mean of the folds' scores: Forman and Scholz,
"Apples-to-apples in cross-validation studies", SIGKDD Explorations 12 (2010), 49-57.

The interval is over draws of test images, as for one test split: 1,000 resamples of whole groups,
or of images where there are none (Field and Welsh, "Bootstrapping clustered data", Journal of the
Royal Statistical Society B 69 (2007), 369-390). It takes the heads as given. Folds share training
images, so no unbiased estimate of the variance over draws of them exists: Bengio and Grandvalet,
"No unbiased estimator of the variance of k-fold cross-validation", Journal of Machine Learning
Research 5 (2004), 1089-1105.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..metrics import score as measured
from ..metrics import softmax, wilson_interval
from ..progress import OnProgress, Progress, silent
from ..sampling import folds as fold_numbers
from .blocks import Features, Rows, each_block, loaded
from .job import Job
from .objective import Solution
from .scaling import Scaling
from .sweep import C_GRID, Sweep
from .weights import sample_weights, total_weight

# Neighbours in C_GRID differ by a factor of 2, which the folds' own noise hides.
_GRID = C_GRID[1::2]
_PATIENCE = 3  # values of the grid
_RESAMPLES = 1000


@dataclass(frozen=True)
class Fitted:
    """What one fold's heads say of its test images.

    ``predicted`` (M, ...) and ``probabilities`` (M, ...) or None are kept for every image.
    """

    predicted: np.ndarray
    probabilities: np.ndarray | None = None
    sweep: Sweep | None = None
    C: float | None = None
    converged: bool = True


@dataclass(frozen=True)
class Fold:
    """One fold of one repeat.

    Parameters
    ----------
    repeat, fold : int
        From 0.
    n_train, n_test : int
        Images fitted, the holdout of the sweep among them, and images predicted.
    C : float or None
        The penalty, in scikit-learn's terms; None where each head of the fold has its own.
    score : float
        On the fold's test images.
    converged : bool
        Whether the head reached its tolerance.
    at_edge : str
        ``"lowest"`` or ``"highest"`` where C is at that end of the grid, else empty.
    """

    repeat: int
    fold: int
    n_train: int
    n_test: int
    C: float | None
    score: float
    converged: bool
    at_edge: str


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Out-of-fold predictions of N images in R repeats, and their score.

    ``predicted`` (R, N, ...) has -1 or NaN for images in no fold; ``probabilities`` float64
    (R, N, 2) are those of the predicted class and of the label, NaN for ridge; ``numbers`` int64
    (R, N) the folds, -1 for none. ``of_one_group`` are classes whose images are all in one group:
    a head that predicts them never saw the class.
    """

    score: float
    interval: tuple[float, float]
    folds: tuple[Fold, ...]
    n_images: int
    n_groups: int
    predicted: np.ndarray
    probabilities: np.ndarray | None
    numbers: np.ndarray
    wall_s: float
    of_one_group: tuple[int, ...] = ()


FitPredict = Callable[[np.ndarray, np.ndarray, OnProgress], Fitted]
ScoreRows = Callable[[np.ndarray, np.ndarray], float]


def cross_validate(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    job: Job,
    *,
    n_folds: int,
    repeats: int = 1,
    groups: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    class_weight: str | Mapping[Any, Any] | None = None,
    class_names: Sequence[str] | None = None,
    scale: str = "none",
    on_progress: OnProgress = silent,
) -> CrossValidation:
    """Cross-validate a linear head that classifies features (N, D), one array per flip view.

    A fold trains on all views of its training images, and predicts its test images from the first.
    Where the ``job`` has no penalty it is chosen within each fold. Images of one of the ``groups``
    int64 (N,) are never on both sides, neither of a fold nor of the holdout within it. ``weights``
    and ``class_weight`` with ``class_names`` are as in `sample_weights`, "balanced" by the training
    images of each fold; they count in the fits and not in the scores, and an image of weight 0 is
    in no fold. Repeats draw their folds with the job's seed, the one after it, ... Raises
    DatasetError for more folds than groups, or than images of a class.
    """
    each = sample_weights(labels, n_classes, None, weights)
    is_ridge = job.solver == "ridge"
    if not is_ridge:
        job = replace(job, grid=_GRID, patience=_PATIENCE)

    def scored(predicted: np.ndarray, rows: np.ndarray) -> float:
        return measured(job.metric, predicted, labels[rows], n_classes)

    def fit_predict(train: np.ndarray, test: np.ndarray, on_progress: OnProgress) -> Fitted:
        chosen = [Rows(features, train) for features in views]
        scaling = Scaling(scale, chosen)
        inputs = [loaded(scaling.lazily(features)) for features in chosen]
        known = labels[train]
        given = None if each is None else each[train]
        own = sample_weights(known, n_classes, class_weight, given, class_names)
        of_fold, swept = job.with_penalty(
            inputs,
            known,
            n_classes,
            on_progress,
            weights=own,
            groups=None if groups is None else groups[train],
        )
        solution = of_fold.train(inputs, known, n_classes, on_progress, weights=own)
        held = scaling.lazily(Rows(views[0], test))
        predicted, probabilities = _judge(held, labels[test], solution, not is_ridge)
        C = 1 / (of_fold.recipe.weight_decay * total_weight(inputs, own))
        return Fitted(predicted, probabilities, swept, C, bool(solution.converged))

    found = over_folds(
        labels,
        fit_predict,
        scored,
        n_folds=n_folds,
        repeats=repeats,
        groups=groups,
        left_out=None if each is None else each == 0,
        proportion=job.metric == "top1",
        seed=job.seed,
        on_progress=on_progress,
    )
    return replace(found, of_one_group=() if groups is None else _of_one_group(labels, groups))


def over_folds(
    targets: np.ndarray,
    fit_predict: FitPredict,
    score: ScoreRows,
    *,
    n_folds: int,
    repeats: int = 1,
    groups: np.ndarray | None = None,
    left_out: np.ndarray | None = None,
    proportion: bool = False,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> CrossValidation:
    """Cross-validate any head of targets (N, ...), of which integers (N,) are stratified.

    ``fit_predict`` is given the training rows and the test rows int64 of a fold, and chooses its
    penalty on the training rows alone. ``score`` is given predictions (M, ...) and the rows int64
    (M,) that they are of, some of them repeated. Images ``left_out``, bool (N,), are in no fold. A
    score that is a ``proportion`` of right images has the interval of `wilson_interval` where no
    resample can tell: without groups, or where all images are right or all wrong.
    """
    started = time.perf_counter()
    n = len(targets)
    rows = np.arange(n) if left_out is None else np.flatnonzero(~left_out)
    kin = None if groups is None else groups[rows]
    numbers = np.full((repeats, n), -1, np.int64)
    predicted: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    done: list[Fold] = []
    for repeat in range(repeats):
        numbers[repeat, rows] = fold_numbers(targets[rows], n_folds, seed + repeat, kin)
        for fold in range(n_folds):
            on_progress(Progress("folds", len(done), repeats * n_folds, "fold"))
            test = np.flatnonzero(numbers[repeat] == fold)
            train = rows[numbers[repeat, rows] != fold]
            fitted = fit_predict(train, test, on_progress)
            if predicted is None:
                predicted = _empty((repeats, n), fitted.predicted)
                if fitted.probabilities is not None:
                    probabilities = _empty((repeats, n), fitted.probabilities)
            predicted[repeat, test] = fitted.predicted
            if probabilities is not None:
                probabilities[repeat, test] = fitted.probabilities
            done.append(
                Fold(
                    repeat=repeat,
                    fold=fold,
                    n_train=len(train),
                    n_test=len(test),
                    C=fitted.C,
                    score=score(fitted.predicted, test),
                    converged=fitted.converged,
                    at_edge=fitted.sweep.at_edge if fitted.sweep else "",
                )
            )
    on_progress(Progress("folds", len(done), repeats * n_folds, "fold"))
    assert predicted is not None

    def pooled(drawn: np.ndarray) -> float:
        return float(np.mean([score(of_repeat[drawn], drawn) for of_repeat in predicted]))

    reached = pooled(rows)
    n_groups = len(rows) if kin is None else len(np.unique(kin))
    if proportion and (kin is None or reached in (0, 1)):
        interval = wilson_interval(reached, n_groups)
    else:
        interval = group_interval(pooled, rows, kin)
    return CrossValidation(
        score=reached,
        interval=interval,
        folds=tuple(done),
        n_images=len(rows),
        n_groups=n_groups,
        predicted=predicted,
        probabilities=probabilities,
        numbers=numbers,
        wall_s=time.perf_counter() - started,
    )


def group_interval(
    score: Callable[[np.ndarray], float],
    rows: np.ndarray,
    groups: np.ndarray | None,
    resamples: int = _RESAMPLES,
) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of a score over resamples of whole groups.

    ``score`` is given the drawn rows, some of them repeated; ``groups`` (N,) are those of
    ``rows`` int64 (N,), by default a group for each. Resamples without a finite score are left
    out.
    """
    members = np.arange(len(rows))
    if groups is not None:
        _, members = np.unique(groups, return_inverse=True)
    ordered = rows[np.argsort(members, kind="stable")]
    sizes = np.bincount(members)
    firsts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(resamples):
        drawn = generator.integers(len(sizes), size=len(sizes))
        lengths = sizes[drawn]
        # Row j of a drawn group stands at its first row + j.
        shift = np.repeat(firsts[drawn] - (np.cumsum(lengths) - lengths), lengths)
        scores.append(score(ordered[shift + np.arange(len(shift))]))
    finite = [value for value in scores if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def _of_one_group(labels: np.ndarray, groups: np.ndarray) -> tuple[int, ...]:
    """Return the classes whose images are all in one group."""
    pairs = np.unique(np.column_stack([labels, groups]), axis=0)
    classes, n_groups = np.unique(pairs[:, 0], return_counts=True)
    return tuple(int(label) for label in classes[n_groups == 1])


def _empty(shape: tuple[int, int], like: np.ndarray) -> np.ndarray:
    """Return an array for every repeat and image, of -1 or NaN where no fold writes."""
    missing = np.nan if np.issubdtype(like.dtype, np.floating) else -1
    return np.full((*shape, *like.shape[1:]), missing, like.dtype)


def _judge(
    features: Features, labels: np.ndarray, solution: Solution, calibrated: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted classes int64 (M,), and float64 (M, 2): their probability, the label's.

    Scores of all classes are kept for one block of images at a time.
    """
    transposed = solution.weight.T.astype(np.float32)

    def of_block(features: Features, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        scores = np.asarray(features[rows], np.float32) @ transposed + solution.bias
        predicted = scores.argmax(axis=1)
        if not calibrated:
            return predicted, np.full((len(scores), 2), np.nan)
        both = np.column_stack([predicted, labels[rows]])
        return predicted, np.take_along_axis(softmax(scores), both, axis=1)

    n_numbers = sum(solution.weight.shape) + 4 * len(solution.bias)
    blocks = list(each_block([features], of_block, n_numbers))
    return np.concatenate([block[0] for block in blocks]), np.concatenate(
        [block[1] for block in blocks]
    )
