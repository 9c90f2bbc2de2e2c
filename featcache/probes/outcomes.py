"""What a head predicted of each image, as the columns that a run keeps.

Every table has ``id``, ``split``, ``label``, ``prediction``, ``correct`` and ``error``, which is
larger the worse a prediction is: `featcache.worst_errors` sorts by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics import softmax
from .head import reached

Columns = dict[str, Any]


def class_outcomes(
    ids: Sequence[str],
    labels: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    *,
    probability: np.ndarray | None = None,
    label_probability: np.ndarray | None = None,
    error: np.ndarray | None = None,
    split: str = "test",
) -> Columns:
    """Return the columns of a single-label run.

    ``labels`` and ``predicted`` are int64 (M,), an image without a label has -1. The
    probabilities are those of the prediction and of the label, (M,), absent of scores that are
    none. ``error`` is 1 - label_probability by default.
    """
    by_label = np.array([*names, None], object)
    if error is None:
        assert label_probability is not None
        error = 1 - label_probability
    columns: Columns = {
        "id": list(ids),
        "split": [split] * len(labels),
        "label": by_label[labels].tolist(),
        "prediction": by_label[predicted].tolist(),
    }
    if probability is not None and label_probability is not None:
        columns["probability"] = np.asarray(probability, np.float64)
        columns["label_probability"] = np.asarray(label_probability, np.float64)
    columns["correct"] = np.asarray(labels == predicted)
    columns["error"] = np.asarray(error, np.float64)
    return columns


def outcomes_of_scores(
    ids: Sequence[str],
    labels: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    *,
    calibrated: bool,
) -> Columns:
    """Return the columns of a head's scores (M, K) on test images with labels int64 (M,).

    Scores that are no logits (``calibrated`` False: ridge) have no probabilities; the error is
    then the lead of the predicted class over the label.
    """
    predicted = scores.argmax(axis=1)
    rows = np.arange(len(labels))
    if not calibrated:
        lead = scores[rows, predicted] - scores[rows, labels]
        return class_outcomes(ids, labels, predicted, names, error=lead)
    shares = softmax(scores)
    return class_outcomes(
        ids,
        labels,
        predicted,
        names,
        probability=shares[rows, predicted],
        label_probability=shares[rows, labels],
    )


def label_outcomes(
    ids: Sequence[str],
    targets: np.ndarray,
    probabilities: np.ndarray,
    thresholds: np.ndarray,
    names: Sequence[str],
) -> Columns:
    """Return the columns of a multi-label run: targets int8 (M, L), -1 unknown.

    ``label`` and ``prediction`` list label names with ``"; "`` between them; each label has its
    probability in ``p: NAME``. The error is the largest |target - probability| of a known label.
    """
    known = targets >= 0
    above = reached(probabilities, thresholds)
    gap = np.where(known, np.abs(targets - probabilities), 0)
    return {
        "id": list(ids),
        "split": ["test"] * len(targets),
        "label": _listed(targets > 0, names),
        "prediction": _listed(above, names),
        "correct": ((above == (targets > 0)) | ~known).all(axis=1),
        "error": gap.max(axis=1, initial=0).astype(np.float64),
        **{
            f"p: {name}": probabilities[:, column].astype(np.float64)
            for column, name in enumerate(names)
        },
    }


def _listed(chosen: np.ndarray, names: Sequence[str]) -> list[str]:
    return ["; ".join(names[column] for column in np.flatnonzero(row)) for row in chosen]


def number_outcomes(
    ids: Sequence[str],
    targets: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    *,
    split: str = "test",
) -> Columns:
    """Return the columns of a regression run: float64 (M, T), NaN unknown.

    The error is the largest |residual| of an image, each target's in units of its own root mean
    square, so that targets of different units compare. Nothing is ``correct``.
    """
    residual = np.abs(predicted - targets)
    scale = np.sqrt(np.nanmean(np.square(residual), axis=0))
    in_units = np.nan_to_num(residual / np.where(scale > 0, scale, 1))
    several = len(names) > 1
    return {
        "id": list(ids),
        "split": [split] * len(targets),
        "label": _numbers(targets),
        "prediction": _numbers(predicted),
        "correct": np.zeros(len(targets), bool),
        "error": in_units.max(axis=1, initial=0),
        **{
            f"prediction: {name}": predicted[:, column].astype(np.float64)
            for column, name in enumerate(names)
            if several
        },
    }


def _numbers(values: np.ndarray) -> list[str]:
    return ["; ".join("" if np.isnan(one) else f"{one:.6g}" for one in row) for row in values]
