"""Measures of classes, labels and numbers, and their 95 % intervals, on arrays.

Top-1 weighs images, so large classes dominate it on imbalanced data. Balanced accuracy and macro
F1 weigh classes equally. For one head an interval is over draws of test images
(`wilson_interval`, `score_interval`), for heads on several draws of training images over these
draws (`mean_interval`). Several labels an image have `average_precisions`, numbers have
`number_scores`. Labels int64 (M,) are in [0, n_classes); other arrays raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METRICS = ("top1", "balanced", "f1")

_Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
_RESAMPLES = 1000


@dataclass(frozen=True)
class ReliabilityBin:
    """The ``n`` images whose confidence lies above ``low`` and at or below ``high``, in [0, 1].

    ``confidence`` is their mean, ``accuracy`` the fraction right; None without images.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows whose predicted class is the label: in [0, 1]."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the fraction of rows whose label is among the k highest of scores (M, K).

    Among equal scores the lower class ranks higher, as in ``argmax``. NaN is never a hit.
    """
    n_classes = scores.shape[1]
    if not 1 <= k <= n_classes:
        raise ValueError(f"k: expected a number from 1 to {n_classes} classes, found {k}")
    _check(labels, labels, n_classes)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    above = (~(scores < own)).sum(axis=1) - 1  # written so that NaN counts as above
    above -= ((scores == own) & (np.arange(n_classes) > labels[:, None])).sum(axis=1)
    hits = (above < k) & ~np.isnan(own[:, 0])
    return float(np.mean(hits))


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return int64 (K, K): how many images with label i were predicted as class j."""
    _check(predicted, labels, n_classes)
    cells = np.asarray(labels, np.int64) * n_classes + predicted
    counts: np.ndarray = np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)
    return counts


def per_class_accuracy(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the recall of each class, float64 (K,); NaN for a class without images."""
    hits, present, _ = _counts(predicted, labels, n_classes)
    return np.divide(hits, present, out=np.full(n_classes, np.nan), where=present > 0)


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """Return the mean recall over classes with images, as ``balanced_accuracy_score``."""
    return float(np.nanmean(per_class_accuracy(predicted, labels, n_classes)))


def macro_f1(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """Return the mean of F1 = 2 TP / (2 TP + FP + FN) over classes, as ``f1_score``'s macro.

    A class that is neither labelled nor predicted does not count.
    """
    hits, present, claimed = _counts(predicted, labels, n_classes)
    both = present + claimed  # 2 TP + FP + FN
    return float(np.mean(2 * hits[both > 0] / both[both > 0]))


def score(metric: str, predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """Return one of `METRICS` by name."""
    if metric == "top1":
        _check(predicted, labels, n_classes)
        return top1(predicted, labels)
    if metric == "balanced":
        return balanced_accuracy(predicted, labels, n_classes)
    if metric == "f1":
        return macro_f1(predicted, labels, n_classes)
    raise ValueError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits (M, K): float64, rows that sum to 1."""
    shifted = np.asarray(scores, np.float64)
    powers: np.ndarray = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits of any shape, each by itself: float64."""
    small = np.exp(-np.abs(np.asarray(scores, np.float64)))
    shares: np.ndarray = np.where(np.asarray(scores) >= 0, 1, small) / (1 + small)
    return shares


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15
) -> tuple[float, tuple[ReliabilityBin, ...]]:
    """Return the expected calibration error of probabilities (M, K), and its bins.

    The error is the mean of |accuracy - confidence| over equal bins of (0, 1], weighted by their
    images; it depends on the number of bins. Guo, Pleiss, Sun and Weinberger, "On calibration of
    modern neural networks", ICML 2017, section 2.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins: expected 1 or more, found {n_bins}")
    _check(labels, labels, probabilities.shape[1])
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (probabilities.min() >= 0 and np.abs(sums - 1).max() < 1e-2):
        raise ValueError("probabilities: expected rows in [0, 1] with sum 1; use softmax on logits")
    confidence = np.minimum(probabilities.max(axis=1).astype(np.float64), 1)
    right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, n_bins + 1)
    inside = np.searchsorted(edges, confidence, side="left") - 1
    error, bins = 0.0, []
    for index in range(n_bins):
        rows = inside == index
        n = int(rows.sum())
        sure = float(confidence[rows].mean()) if n else None
        good = float(right[rows].mean()) if n else None
        if sure is not None and good is not None:
            error += n / len(labels) * abs(good - sure)
        bins.append(ReliabilityBin(float(edges[index]), float(edges[index + 1]), n, sure, good))
    return error, tuple(bins)


def wilson_interval(accuracy: float, n: int, z: float = _Z_95) -> tuple[float, float]:
    """Return the interval of an accuracy on n images, 95 % by default: Wilson's score interval.

    Unlike the normal approximation it stays within [0, 1] and is valid at 0 and at 1. Wilson,
    "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if n <= 0:
        return 0.0, 1.0
    z2 = z**2 / n
    centre = (accuracy + z2 / 2) / (1 + z2)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_interval(
    metric: str, predicted: np.ndarray, labels: np.ndarray, n_classes: int
) -> tuple[float, float]:
    """Return the 95 % interval of one of `METRICS` over draws of the test images.

    Top-1 is a proportion and has `wilson_interval`. The others have the 2.5th to the 97.5th
    percentile of 1,000 resamples, stratified by class. Efron and Tibshirani, "An introduction to
    the bootstrap" (1993), chapter 13.
    """
    measured = score(metric, predicted, labels, n_classes)
    if metric == "top1":
        return wilson_interval(measured, len(labels))
    order = np.argsort(labels, kind="stable")
    predicted, labels = np.asarray(predicted)[order], np.asarray(labels)[order]
    present = np.bincount(labels, minlength=n_classes)
    first, size = (np.cumsum(present) - present)[labels], present[labels]
    generator = np.random.default_rng(0)
    measures = []
    for _ in range(_RESAMPLES):
        rows = first + (generator.random(len(labels)) * size).astype(np.int64)
        measures.append(score(metric, predicted[rows], labels, n_classes))
    low, high = np.percentile(measures, (2.5, 97.5))
    return float(low), float(high)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two or more scores: Student's t, cut to [0, 1]."""
    from scipy.special import stdtrit

    n = len(scores)
    if n < 2:
        raise ValueError(f"scores: expected 2 or more, found {n}")
    mean = float(np.mean(scores))
    half = float(stdtrit(n - 1, 0.975) * np.std(scores, ddof=1) / math.sqrt(n))
    return max(0.0, mean - half), min(1.0, mean + half)


@dataclass(frozen=True)
class PairedTest:
    """Two classifiers on the same images: McNemar's test of a difference in accuracy.

    Parameters
    ----------
    n : int
        Images.
    n_only_first, n_only_second : int
        Images that one of them alone classifies correctly.
    difference : float
        Accuracy of the first minus that of the second, in [-1, 1].
    interval : tuple of 2 floats
        Of the difference, 95 %: the adjusted Wald interval of Bonett and Price.
    p_value : float
        Two-sided mid-p value of the exact test.
    """

    n: int
    n_only_first: int
    n_only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_test(first: np.ndarray, second: np.ndarray) -> PairedTest:
    """Compare two classifiers by which images they classify correctly: bool (M,) each, M > 0.

    Images on which both are right or both are wrong say nothing about the difference. Among the
    others, each is as likely to be right under the null hypothesis.

    References
    ----------
    Fagerland, Lydersen and Laake, "Recommended tests and confidence intervals for paired binomial
    proportions", Statistics in Medicine 33 (2014), 2850-2875.
    """
    from scipy.special import bdtr

    n = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    fewer, discordant = min(only_first, only_second), only_first + only_second
    # Two tails: twice the probability of fewer, plus once that of as many.
    tails = [bdtr(at, discordant, 0.5) for at in (fewer, fewer - 1) if at >= 0]
    one, other = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = _Z_95 * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    return PairedTest(
        n=n,
        n_only_first=only_first,
        n_only_second=only_second,
        difference=(only_first - only_second) / n,
        interval=(max(-1.0, one - other - half), min(1.0, one - other + half)),
        p_value=min(1.0, float(sum(tails))),
    )


_TOP = 5
_LISTED_CLASSES = 100  # a confusion matrix of more is a file of its own, not a field
_LISTED_WORST = 10


@dataclass(frozen=True)
class ClassAccuracy:
    """A class by its number, its ``n_right`` correct predictions, and its ``n`` images."""

    label: int
    n_right: int
    n: int


@dataclass(frozen=True)
class ConfusedPair:
    """A class whose images, ``n`` of its ``n_label``, are predicted as another; by number."""

    label: int
    prediction: int
    n: int
    n_label: int


@dataclass(frozen=True)
class Evaluation:
    """Measures of one classifier on a test split; accuracies are fractions.

    Parameters
    ----------
    top1, balanced_accuracy, macro_f1 : float
        Over images; mean recall over classes; mean F1 over classes.
    top5 : float or None
        Fraction of labels among the five highest scores; None for six classes or fewer.
    calibration_error : float or None
        Expected calibration error in 15 bins; None where scores are no probabilities.
    per_class_accuracy : tuple of float or None
        Recall of each class, None for a class without test images.
    confusion : tuple of tuple of int
        Counts, label by prediction. It and the recalls are empty for more than 100 classes.
    reliability : tuple of ReliabilityBin
        The bins of the calibration error; empty where it is None.
    worst_classes : tuple of ClassAccuracy
        The ten of lowest accuracy, of equal ones those with most images first.
    most_confused : tuple of ConfusedPair
        The ten with most images.
    n_classes_missed : int
        Classes with test images of which none is predicted right.
    """

    top1: float
    balanced_accuracy: float
    macro_f1: float
    top5: float | None
    calibration_error: float | None
    per_class_accuracy: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    reliability: tuple[ReliabilityBin, ...] = ()
    worst_classes: tuple[ClassAccuracy, ...] = ()
    most_confused: tuple[ConfusedPair, ...] = ()
    n_classes_missed: int = 0


def evaluate_scores(scores: np.ndarray, labels: np.ndarray, *, calibrated: bool) -> Evaluation:
    """Measure scores (N, K) against labels; ``calibrated`` scores are logits of probabilities."""
    n_classes = scores.shape[1]
    predicted = scores.argmax(axis=1)
    hits, present, _ = _counts(predicted, labels, n_classes)
    listed = n_classes <= _LISTED_CLASSES
    recalls = per_class_accuracy(predicted, labels, n_classes) if listed else ()
    matrix = confusion_matrix(predicted, labels, n_classes) if listed else ()
    error: float | None = None
    bins: tuple[ReliabilityBin, ...] = ()
    if calibrated and np.isfinite(scores).all():
        error, bins = expected_calibration_error(softmax(scores), labels)
    return Evaluation(
        top1=top1(predicted, labels),
        balanced_accuracy=balanced_accuracy(predicted, labels, n_classes),
        macro_f1=macro_f1(predicted, labels, n_classes),
        top5=topk_accuracy(scores, labels, _TOP) if n_classes > _TOP + 1 else None,
        calibration_error=error,
        per_class_accuracy=tuple(None if np.isnan(value) else float(value) for value in recalls),
        confusion=tuple(tuple(int(count) for count in row) for row in matrix),
        reliability=bins,
        worst_classes=_worst_classes(hits, present),
        n_classes_missed=int(((present > 0) & (hits == 0)).sum()),
        most_confused=_most_confused(predicted, labels, present),
    )


def _worst_classes(hits: np.ndarray, present: np.ndarray) -> tuple[ClassAccuracy, ...]:
    seen = np.flatnonzero(present)
    order = seen[np.lexsort((-present[seen], hits[seen] / present[seen]))]
    return tuple(
        ClassAccuracy(label, int(hits[label]), int(present[label]))
        for label in order[:_LISTED_WORST].tolist()
    )


def _most_confused(
    predicted: np.ndarray, labels: np.ndarray, present: np.ndarray
) -> tuple[ConfusedPair, ...]:
    # Not from a matrix: of 5,000 classes it would be 200 MB.
    wrong, n_classes = predicted != labels, len(present)
    cells, counts = np.unique(
        np.asarray(labels, np.int64)[wrong] * n_classes + predicted[wrong], return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:_LISTED_WORST].tolist()
    pairs = [(*divmod(int(cells[at]), n_classes), int(counts[at])) for at in order]
    return tuple(ConfusedPair(a, b, n, int(present[a])) for a, b, n in pairs)


_RESAMPLED_CELLS = 1_000_000_000  # rows times labels times resamples: some 10 s
_CELLS_OF_A_NUMBER = 20  # as many as take as long
_RESAMPLED_BYTES = 1 << 28
_FEWEST_RESAMPLES = 100
_DRAWS_AT_ONCE, _NUMBERS_AT_ONCE = 64, 1 << 21

Interval = tuple[float, float]


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the average precision of scores (M,), as ``average_precision_score``.

    Rows of one score are taken together. ``labels`` (M,) are 0 or 1; NaN where none is 1.
    """
    ranking = _Ranking(np.asarray(scores), np.asarray(labels), len(labels))
    return float(ranking.weighted(np.ones((len(labels), 1), np.uint8))[0])


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision over several labels, with 95 % intervals over draws of test images.

    ``macro`` is the mean over labels with positives, ``micro`` that of all pairs of image and
    label in one ranking. None without positives.
    """

    macro: float | None
    macro_interval: Interval | None
    micro: float | None
    micro_interval: Interval | None
    per_label: tuple[float | None, ...]
    per_label_interval: tuple[Interval | None, ...]


def average_precisions(
    scores: np.ndarray, targets: np.ndarray, groups: np.ndarray | None = None
) -> AveragePrecision:
    """Measure scores (M, L) against targets int8 (M, L), in which -1 is not known and left out.

    Intervals are the 2.5th to the 97.5th percentile of 1,000 resamples of images, or of the
    ``groups`` int64 (M,) of images that belong together; above a million pairs of image and label
    of fewer, at least 100.
    """
    n, n_labels = targets.shape
    counts = _resampled_counts(n, groups, n_labels)
    single = np.ones((n, 1), np.uint8)
    per_label, resampled = [], []
    for label in range(n_labels):
        known = np.flatnonzero(targets[:, label] >= 0)
        ranking = _Ranking(scores[known, label], targets[known, label], n, known)
        per_label.append(float(ranking.weighted(single)[0]))
        resampled.append(ranking.weighted(counts))
    rows, columns = np.nonzero(targets >= 0)
    pairs = _Ranking(scores[rows, columns], targets[rows, columns], n, rows)
    draws = np.array(resampled).reshape(n_labels, -1)
    macro = _mean_of_finite(np.array(per_label)[:, None])[0] if n_labels else np.nan
    return AveragePrecision(
        macro=_finite(macro),
        macro_interval=_percentiles(_mean_of_finite(draws)),
        micro=_finite(pairs.weighted(single)[0]),
        micro_interval=_percentiles(pairs.weighted(counts)),
        per_label=tuple(map(_finite, per_label)),
        per_label_interval=tuple(map(_percentiles, draws)),
    )


def f1_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold of probabilities (M,) with the highest F1 against labels (M,), 0 or 1.

    It lies half way between two probabilities. Among equals the highest; 0.5 without positives.
    Lipton, Elkan and Naryanaswamy, "Optimal thresholding of classifiers to maximize F1 measure",
    ECML 2014.
    """
    order = np.argsort(-probabilities, kind="stable")
    ranked, hits = np.asarray(probabilities, np.float64)[order], np.cumsum(labels[order])
    if not len(hits) or hits[-1] == 0:
        return 0.5
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    f1 = 2 * hits[ends] / (ends + 1 + hits[-1])
    end = ends[f1.argmax()]
    below = ranked[end + 1] if end + 1 < len(ranked) else 0.0
    return float((ranked[end] + below) / 2)


@dataclass(frozen=True)
class NumberScores:
    """How well one numeric target is predicted on the test split.

    Parameters
    ----------
    n_test : int
        Images with a value.
    r2 : float or None
        1 - sum of squared errors / sum of squares about the mean; None for a constant target.
    mae, rmse : float or None
        Mean absolute error and root of the mean squared error, in units of the target.
    spearman : float or None
        Correlation of ranks, equal values sharing the mean of theirs.
    r2_interval, mae_interval, rmse_interval, spearman_interval : tuple of 2 floats or None
        95 %, over resamples of test images, or of their groups.
    """

    n_test: int
    r2: float | None
    r2_interval: Interval | None
    mae: float | None
    mae_interval: Interval | None
    rmse: float | None
    rmse_interval: Interval | None
    spearman: float | None
    spearman_interval: Interval | None


def number_scores(
    predicted: np.ndarray, targets: np.ndarray, groups: np.ndarray | None = None
) -> tuple[tuple[NumberScores, ...], float | None, Interval | None]:
    """Measure predictions (M, T) against targets (M, T); NaN targets are left out.

    Returns the scores of each target, and the mean R2 over targets with its interval. Resamples are
    as in `average_precisions`; there are fewer than 1,000 above 50,000 numbers.
    """
    n, n_targets = targets.shape
    counts = _resampled_counts(n, groups, n_targets * _CELLS_OF_A_NUMBER)
    scored, r2s = [], []
    for target in range(n_targets):
        known = np.flatnonzero(~np.isnan(targets[:, target]))
        columns = _NumberColumns(predicted[known, target], targets[known, target])
        single = columns.weighted(np.ones((len(known), 1), np.uint8))
        draws = columns.weighted(counts[known])
        r2s.append((single[0], draws[0]))
        both: list[Any] = []
        for one, many in zip(single, draws, strict=True):
            both += [_finite(one[0]), _percentiles(many)]
        scored.append(NumberScores(len(known), *both))
    mean = _mean_of_finite(np.array([one for one, _ in r2s]))
    spread = _mean_of_finite(np.array([many for _, many in r2s]))
    return tuple(scored), _finite(mean[0]), _percentiles(spread)


class _Ranking:
    """Rows (M,) in the order of falling scores, to be measured at many weightings of them.

    ``rows`` int64 (M,) in [0, n) are their numbers, by default 0 to n - 1.
    """

    def __init__(
        self, scores: np.ndarray, labels: np.ndarray, n: int, rows: np.ndarray | None = None
    ) -> None:
        from scipy.sparse import csr_array

        order = np.argsort(-scores, kind="stable")
        ranked, numbers = scores[order], order if rows is None else rows[order]
        positives = np.flatnonzero(labels[order] > 0)
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        # Where the rows of the same score end, for each positive; once for several of them.
        ends, first = np.unique(last[np.searchsorted(last, positives)], return_index=True)
        # As sparse matrices with a row per end: sums over the rows between two ends.
        upto = np.append(0, ends + 1)
        self._above = csr_array(
            (np.ones(upto[-1], np.int32), numbers[: upto[-1]], upto), shape=(len(ends), n)
        )
        firsts, hits = np.append(first, len(positives)), numbers[positives]
        self._hits = csr_array((np.ones(len(hits), np.int32), hits, firsts), shape=(len(ends), n))

    def weighted(self, counts: np.ndarray) -> np.ndarray:
        """Return the average precision, float64 (R,), at each column of counts uint8 (n, R)."""
        if not self._above.shape[0]:
            return np.full(counts.shape[1], np.nan)
        found = []
        for part in _parts(counts):
            drawn = part.astype(np.int32)
            hits = self._hits @ drawn
            true = hits.cumsum(axis=0)
            share = true / np.maximum((self._above @ drawn).cumsum(axis=0), 1)
            with np.errstate(invalid="ignore"):  # a draw without positives
                found.append((hits * share).sum(axis=0) / true[-1])
        return np.concatenate(found)


class _NumberColumns:
    """Predictions and targets (M,), to be measured at many weightings of their rows."""

    def __init__(self, predicted: np.ndarray, targets: np.ndarray) -> None:
        error = np.asarray(predicted, np.float64) - targets
        centred = targets - (targets.mean() if len(targets) else 0.0)
        self._sums = np.column_stack([abs(error), error**2, centred, centred**2])
        self._constant = len(targets) == 0 or not np.any(targets != targets[0])
        self._orders = [np.argsort(values, kind="stable") for values in (predicted, targets)]
        self._values = predicted, targets

    def weighted(self, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return R2, MAE, RMSE and Spearman's correlation, float64 (R,) each."""
        parts = [self._at(part) for part in _parts(counts)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _at(self, drawn: np.ndarray) -> tuple[np.ndarray, ...]:
        weights = drawn.astype(np.float64)
        totals = weights.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):  # no rows, or a constant draw
            absolute, squared, linear, quadratic = self._sums.T @ weights / totals
            spread = quadratic - linear**2
            flat = self._constant | (spread <= 1e-12 * quadratic)
            r2 = np.where(flat, np.nan, 1 - squared / np.where(flat, 1, spread))
            x, y = (self._ranks(which, weights) for which in (0, 1))
            means = ((weights * x).sum(axis=0) / totals, (weights * y).sum(axis=0) / totals)
            x, y = x - means[0], y - means[1]
            together = (weights * x * y).sum(axis=0)
            apart = (weights * x * x).sum(axis=0) * (weights * y * y).sum(axis=0)
            spearman = np.where(apart > 0, together / np.sqrt(apart), np.nan)
        return r2, absolute, np.sqrt(squared), spearman

    def _ranks(self, which: int, weights: np.ndarray) -> np.ndarray:
        """Return the rank of each row in the draw, the mean of those of equal values."""
        order, values = self._orders[which], self._values[which]
        if not len(order):
            return weights
        ranked = values[order]
        starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        sizes = np.add.reduceat(weights[order], starts, axis=0)
        middles = sizes.cumsum(axis=0) - (sizes - 1) / 2
        ranks = np.empty_like(weights)
        ranks[order] = np.repeat(middles, np.diff(np.append(starts, len(order))), axis=0)
        return ranks


def _resampled_counts(n: int, groups: np.ndarray | None, width: int) -> np.ndarray:
    """Return how often each row is in each bootstrap draw of rows or groups: uint8 (n, R)."""
    most = min(_RESAMPLED_CELLS // max(1, n * width), _RESAMPLED_BYTES // max(1, n))
    draws = min(_RESAMPLES, max(_FEWEST_RESAMPLES, most))
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    units = int(unit.max(initial=-1)) + 1
    generator = np.random.default_rng(0)
    counts = np.empty((units, draws), np.uint8)
    for draw in range(draws):
        counts[:, draw] = np.bincount(generator.integers(units, size=units), minlength=units)
    return counts if groups is None else counts[unit]


def _parts(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Yield counts (n, R) some columns at a time: fewer of long ones."""
    at_once = max(1, min(_DRAWS_AT_ONCE, _NUMBERS_AT_ONCE // max(1, len(counts))))
    for first in range(0, counts.shape[1], at_once):
        yield counts[:, first : first + at_once]


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Return the mean over rows of (L, R) without NaN, float64 (R,); NaN where all are."""
    known = ~np.isnan(values)
    sums, sizes = np.where(known, values, 0).sum(axis=0), known.sum(axis=0)
    return np.divide(sums, sizes, out=np.full(len(sums), np.nan), where=sizes > 0)


def _percentiles(draws: np.ndarray) -> Interval | None:
    """Return the 95 % interval of the draws that are defined; None where none is."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _counts(
    predicted: np.ndarray, labels: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each class, int64 (K,): correct predictions, labels, predictions."""
    _check(predicted, labels, n_classes)
    hits = np.asarray(labels)[np.asarray(predicted) == labels]
    hit, present, claimed = (
        np.bincount(of, minlength=n_classes) for of in (hits, labels, predicted)
    )
    return hit, present, claimed


def _check(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> None:
    """Refuse arrays that would be counted wrongly without an error."""
    if np.shape(predicted) != np.shape(labels) or np.ndim(labels) != 1 or len(labels) == 0:
        raise ValueError(
            f"predicted and labels: expected the same number of each, 1 or more, found shapes "
            f"{np.shape(predicted)} and {np.shape(labels)}"
        )
    for name, classes in (("predicted", predicted), ("labels", labels)):
        if not 0 <= np.min(classes) <= np.max(classes) < n_classes:
            raise ValueError(
                f"{name}: expected classes from 0 to {n_classes - 1}, found {np.min(classes)} to "
                f"{np.max(classes)}"
            )
