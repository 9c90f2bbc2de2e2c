"""Accuracy measures and their 95 % intervals, on arrays.

Top-1 weighs images, so large classes dominate it on imbalanced data. Balanced accuracy and macro
F1 weigh classes equally. For one head an interval is over draws of test images
(`wilson_interval`, `score_interval`), for heads on several draws of training images over these
draws (`mean_interval`). Labels int64 (M,) are in [0, n_classes); other arrays raise ValueError.
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
    """Return the fraction of rows on which two classifiers predict the same class."""
    return top1(one, other)


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


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy on n images: Wilson's score interval.

    Unlike the normal approximation it stays within [0, 1] and is valid at 0 and at 1. Wilson,
    "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
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


_TOP = 5
_LISTED_CLASSES = 100  # a confusion matrix of more is a file of its own, not a field


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
    """

    top1: float
    balanced_accuracy: float
    macro_f1: float
    top5: float | None
    calibration_error: float | None
    per_class_accuracy: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    reliability: tuple[ReliabilityBin, ...] = ()


def evaluate_scores(scores: np.ndarray, labels: np.ndarray, *, calibrated: bool) -> Evaluation:
    """Measure scores (N, K) against labels; ``calibrated`` scores are logits of probabilities."""
    n_classes = scores.shape[1]
    predicted = scores.argmax(axis=1)
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
    )


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
