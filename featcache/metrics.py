"""How good predictions are, and how sure one may be of it. Arrays in, plain numbers out.

Three numbers can stand for a classifier (`METRICS`). Top-1 counts images, so
that on imbalanced data the large classes decide it. Balanced accuracy and macro
F1 count classes, each as much as any other.

An interval says what would vary if the measurement were made again, and there
are two answers. With one head, other test images could have been drawn:
`wilson_interval`, and `score_interval` for every metric. With heads from
several draws of the training images, other draws could have been made:
`mean_interval`.

All of it is done on counts per class, so that nothing but `confusion_matrix`
itself needs memory for K x K numbers. Arrays that do not fit together, labels
out of range or no rows at all are a mistake of the caller: ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("top1", "balanced", "f1")

_Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
_RESAMPLES = 1000


@dataclass(frozen=True)
class ReliabilityBin:
    """The images whose confidence lies above ``low`` and at or below ``high``.

    Parameters
    ----------
    low, high : float
        Edges, in [0, 1].
    n : int
        Images.
    confidence, accuracy : float or None
        Mean confidence and fraction right; None in a bin without images.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows whose predicted class is the label: in [0, 1]."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Return the fraction of rows on which two classifiers say the same, right or wrong."""
    return top1(one, other)


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the fraction of rows whose label is among the k classes of highest score.

    Of equal scores the lower class counts as higher, as ``argmax`` has it: with k
    = 1 this is top-1. A score that is not a number never counts as a hit.

    Parameters
    ----------
    scores : numpy.ndarray
        (M, K): logits, probabilities, votes.
    labels : numpy.ndarray
        int64 (M,), in [0, K).
    k : int
        From 1 to K; with K every row is right, so it says nothing.
    """
    n_classes = scores.shape[1]
    if not 1 <= k <= n_classes:
        raise ValueError(f"k: expected a number from 1 to {n_classes} classes, found {k}")
    _check(labels, labels, n_classes)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    above = (~(scores < own)).sum(axis=1) - 1  # written so that NaN counts as above
    above -= ((scores == own) & (np.arange(n_classes) > labels[:, None])).sum(axis=1)
    found = (above < k) & ~np.isnan(own[:, 0])
    return float(np.mean(found))


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return int64 (K, K): how many images of class i were taken for class j.

    Parameters
    ----------
    predicted, labels : numpy.ndarray
        int64 (M,), in [0, n_classes).
    n_classes : int
        K.
    """
    _check(predicted, labels, n_classes)
    cells = np.asarray(labels, np.int64) * n_classes + predicted
    counts: np.ndarray = np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)
    return counts


def per_class_accuracy(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return float64 (K,): of the images of each class the fraction recognised, its recall.

    NaN for a class that no label names. Parameters as in `confusion_matrix`.
    """
    hits, present, _ = _counts(predicted, labels, n_classes)
    return np.divide(hits, present, out=np.full(n_classes, np.nan), where=present > 0)


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """Return the mean of `per_class_accuracy` over the classes that labels name: in [0, 1].

    scikit-learn's ``balanced_accuracy_score``. Parameters as in `confusion_matrix`.
    """
    return float(np.nanmean(per_class_accuracy(predicted, labels, n_classes)))


def macro_f1(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """Return F1 = 2 TP / (2 TP + FP + FN) of each class, averaged over classes: in [0, 1].

    A class that is neither labelled nor predicted anywhere has no F1 and does not
    count; one that is predicted but never labelled has 0. scikit-learn's
    ``f1_score(average="macro")``. Parameters as in `confusion_matrix`.
    """
    hits, present, claimed = _counts(predicted, labels, n_classes)
    both = present + claimed  # 2 TP + FP + FN
    return float(np.mean(2 * hits[both > 0] / both[both > 0]))


def score(metric: str, predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """Return one of `METRICS`, by name: in [0, 1]. Parameters as in `confusion_matrix`."""
    if metric == "top1":
        _check(predicted, labels, n_classes)
        return top1(predicted, labels)
    if metric == "balanced":
        return balanced_accuracy(predicted, labels, n_classes)
    if metric == "f1":
        return macro_f1(predicted, labels, n_classes)
    raise ValueError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return float64 (M, K): the probabilities that logits (M, K) stand for."""
    shifted = np.asarray(scores, np.float64)
    powers: np.ndarray = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15
) -> tuple[float, tuple[ReliabilityBin, ...]]:
    """Return how far confidence is from accuracy, and the bins that it was measured in.

    An image's confidence is the probability of its predicted class. The interval
    (0, 1] is cut into bins of equal width, and the error is the mean of |accuracy -
    confidence| over bins, weighted by their images: 0 for a head that is right
    on 80 % of what it is 80 % sure of.

    Parameters
    ----------
    probabilities : numpy.ndarray
        (M, K), each row in [0, 1] with sum 1.
    labels : numpy.ndarray
        int64 (M,), in [0, K).
    n_bins : int
        Their number changes the error, so compare at the same one.

    Returns
    -------
    error : float
        In [0, 1].
    bins : tuple of ReliabilityBin
        n_bins of them, for a reliability diagram.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks",
    ICML 2017, section 2.
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


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy measured on n images.

    Wilson's score interval: unlike the normal approximation it stays within
    [0, 1] and means something at 0 and at 1.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927), 209-212.
    """
    if n <= 0:
        return 0.0, 1.0
    z2 = _Z_95**2 / n
    centre = (accuracy + z2 / 2) / (1 + z2)
    half = _Z_95 * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_interval(
    metric: str, predicted: np.ndarray, labels: np.ndarray, n_classes: int
) -> tuple[float, float]:
    """Return the 95 % interval of one of `METRICS` over draws of the test images.

    Top-1 is a proportion and has `wilson_interval`. The others are not: theirs runs
    from the 2.5th to the 97.5th percentile over 1,000 resamples of the images,
    each class resampled by itself so that it keeps its number of images. Where
    every resample scores the same, as when all are right, it has no width.

    References
    ----------
    Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13.
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
    """Return the 95 % interval of the mean of two or more scores in [0, 1].

    Student's: mean ± t * s / sqrt(n), with t the 97.5 % point at n - 1 degrees of
    freedom, cut to [0, 1]. It is about the mean over draws, not about one draw,
    which varies more.

    References
    ----------
    Student, "The probable error of a mean", Biometrika 6 (1908), 1-25.
    """
    from scipy.special import stdtrit

    n = len(scores)
    if n < 2:
        raise ValueError(f"scores: expected 2 or more, found {n}")
    mean = float(np.mean(scores))
    half = float(stdtrit(n - 1, 0.975) * np.std(scores, ddof=1) / math.sqrt(n))
    return max(0.0, mean - half), min(1.0, mean + half)


def _counts(
    predicted: np.ndarray, labels: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each class, int64 (K,): right predictions, labels, predictions."""
    _check(predicted, labels, n_classes)
    hits = np.asarray(labels)[np.asarray(predicted) == labels]
    hit, present, claimed = (
        np.bincount(of, minlength=n_classes) for of in (hits, labels, predicted)
    )
    return hit, present, claimed


def _check(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> None:
    """Refuse what would be counted wrongly without a word."""
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
