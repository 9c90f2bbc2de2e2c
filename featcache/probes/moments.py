"""Mean and covariance of features, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .blocks import each_block
from .rows import Features

__all__ = ["Moments", "moments"]


@dataclass(frozen=True)
class Moments:
    """How features lie.

    Parameters
    ----------
    total : int
        Rows, of all views together.
    mean : numpy.ndarray
        float64 (D,).
    directions : numpy.ndarray
        float64 (D, D): eigenvectors of the covariance, one per column.
    variances : numpy.ndarray
        float64 (D,), ascending, none below 0: its eigenvalues.
    """

    total: int
    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray


def moments(views: Sequence[Features]) -> Moments:
    """Measure features (N, D) of every view; products are float32, sums over blocks float64."""
    dim = views[0].shape[1]
    shift = np.asarray(views[0][:1], np.float32)[0]  # keeps squares small in float32

    def of_block(features: Features, rows: slice) -> tuple[int, np.ndarray, np.ndarray]:
        x = np.asarray(features[rows], np.float32) - shift
        return len(x), x.sum(axis=0, dtype=np.float64), x.T @ x

    total, sums, squares = 0, np.zeros(dim), np.zeros((dim, dim))
    for count, linear, quadratic in each_block(views, of_block, 2 * dim):
        total += count
        sums += linear
        squares += quadratic
    shifted = sums / total
    variances, directions = np.linalg.eigh(squares / total - np.outer(shifted, shifted))
    return Moments(total, shifted + shift, directions, np.clip(variances, 0, None))
