"""Everything that one reads off the scores of a classifier on labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..metrics import (
    ReliabilityBin,
    balanced_accuracy,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    per_class_accuracy,
    softmax,
    top1,
    topk_accuracy,
)

__all__ = ["Evaluation", "evaluate_scores"]

_TOP = 5
_LISTED_CLASSES = 100  # a confusion matrix of more is a file of its own, not a field


@dataclass(frozen=True)
class Evaluation:
    """Measures of one classifier on n images; accuracies are fractions.

    Parameters
    ----------
    top1, balanced_accuracy, macro_f1 : float
        Over images; mean recall over classes; mean F1 over classes.
    top5 : float or None
        Whether the label is among the five best; None for six classes or fewer.
    calibration_error : float or None
        Expected calibration error in 15 bins; None where scores are no probabilities.
    per_class_accuracy : tuple of float or None
        Recall of each class, None for a class without test images.
    confusion : tuple of tuple of int
        Label by prediction. Empty, as the line above, for more than 100 classes.
    reliability : tuple of ReliabilityBin
        The bins that the calibration error was measured in; empty where it is None.
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
    """Measure class scores against labels.

    Parameters
    ----------
    scores : numpy.ndarray
        float (N, K); the softmax of a row is its probabilities where ``calibrated``.
    labels : numpy.ndarray
        int64 (N,).
    calibrated : bool
        Whether the scores are logits of a probability.
    """
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
