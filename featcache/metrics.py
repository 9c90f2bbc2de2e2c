"""Accuracy and how sure one may be of it. Arrays in, plain numbers out."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["agreement", "top1", "wilson_interval"]

_Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows whose predicted class is the label: in [0, 1]."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Return the fraction of rows on which two classifiers say the same, right or wrong."""
    return top1(one, other)


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
