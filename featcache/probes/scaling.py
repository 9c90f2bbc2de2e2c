"""Feature scaling, and the moments of features (N, D).

``standardize`` subtracts the training mean and divides by the standard deviation: an affine map
that is folded into the head. Weights of images have no part in it, as in a pipeline of
scikit-learn. ``l2`` divides each feature by its Euclidean length: not affine, so
the head records it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..options import check_choice
from .blocks import Features, Rows, each_block, some_rows
from .weights import mean_1

_ROUNDING = 1e-6  # relative, of float32

SCALINGS = ("none", "standardize", "l2")


class Scaling:
    """One of `SCALINGS`, fitted to the training features (N, D) of each flip view."""

    def __init__(self, kind: str, views: Sequence[Features]) -> None:
        check_choice("scale", kind, SCALINGS)
        self.kind = kind
        if kind == "standardize":
            dim = views[0].shape[1]
            total = sum(len(features) for features in views)
            mean = sum(each_block(views, _sums, dim), np.zeros(dim)) / total

            def squares(features: Features, rows: slice) -> np.ndarray:
                return np.square(features[rows] - mean).sum(axis=0)

            # float64, in several arrays: 6 * dim float32 numbers per row.
            spread = np.sqrt(sum(each_block(views, squares, 6 * dim), np.zeros(dim)) / total)
            # A constant number keeps its scale; only rounding gives it a spread.
            constant = spread <= np.abs(mean) * _ROUNDING
            self._spread = np.where(constant, 1.0, spread)
            self._mean = mean

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Return scaled features (N, D), float32; the same array where nothing is scaled."""
        if self.kind == "standardize":
            return ((features - self._mean) / self._spread).astype(np.float32)
        return unit_length(features) if self.kind == "l2" else features

    def lazily(self, features: Features) -> Features:
        """Return features that are scaled when they are read."""
        return features if self.kind == "none" else Rows(features, change=self.apply)

    def fold(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the head for features before `apply`; for ``l2`` the head stays as it is."""
        if self.kind != "standardize":
            return weight, bias
        plain = weight / self._spread
        folded = bias - plain @ self._mean
        return plain.astype(np.float32), folded.astype(np.float32)


def unit_length(features: np.ndarray) -> np.ndarray:
    """Return float32 features (N, D) of length 1; a zero feature stays zero."""
    lengths = np.linalg.norm(np.asarray(features, np.float32), axis=1, keepdims=True)
    unit: np.ndarray = (features / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit


def _sums(features: Features, rows: slice) -> np.ndarray:
    sums: np.ndarray = features[rows].sum(axis=0, dtype=np.float64)
    return sums


_COVARIANCE_ROWS = 40  # times D: enough for the coordinates of a search


def covariance_rows(
    views: Sequence[Features], weights: np.ndarray | None
) -> tuple[list[Features], np.ndarray | None]:
    """Return rows that are enough for a covariance of (N, D), of each view, and their weights."""
    n, dim = views[0].shape
    chosen = some_rows(n, _COVARIANCE_ROWS * dim // len(views))
    part = None if weights is None else weights[chosen]
    return [Rows(features, chosen) for features in views], part


def moments_of_some(views: Sequence[Features], weights: np.ndarray | None = None) -> Moments:
    """Return the moments of features (N, D) of each view, from a part of the rows."""
    return moments(*covariance_rows(views, weights))


_PLAIN = 1e9  # sizes up to this, and down to its inverse, need no other unit
_SIZED_ROWS = 4096


def power_of_two(views: Sequence[Features]) -> float:
    """Return a unit in which features (N, D) have squares in range: 1 for all that are not extreme.

    A power of two, so that dividing by it rounds nothing.
    """
    n = len(views[0])
    some = (np.asarray(features[some_rows(n, _SIZED_ROWS)]) for features in views)
    largest = max((float(np.abs(part).max(initial=0)) for part in some), default=0.0)
    if not 0 < largest < np.inf or 1 / _PLAIN < largest < _PLAIN:
        return 1.0
    return float(2.0 ** np.clip(np.round(np.log2(largest)), -1000, 1000))


def scaled(views: Sequence[Features], unit: float) -> Sequence[Features]:
    """Return features in another unit, divided when they are read."""
    if unit == 1:
        return views

    def divide(rows: np.ndarray) -> np.ndarray:
        return (np.asarray(rows, np.float64) / unit).astype(np.float32)

    if views[0].dtype == np.float64:
        return [np.asarray(features[:]) / unit for features in views]
    return [Rows(features, change=divide) for features in views]


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance of ``total`` rows, float64; weighted where rows have weights.

    The columns of ``directions`` (D, m) are the covariance's eigenvectors, or some orthonormal
    ones; ``variances`` (m,) those along them, ascending and not negative, and ``rest`` the mean
    variance along all others.
    """

    total: int
    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: float = 0.0


def moments(views: Sequence[Features], weights: np.ndarray | None = None) -> Moments:
    """Return the moments of all views (N, D); products are float32, sums over blocks float64.

    ``weights`` (N,) are of the rows of each view, equal by default.
    """
    dim = views[0].shape[1]
    shift = np.asarray(views[0][:1], np.float32)[0]  # keeps squares small in float32
    relative = None if weights is None else mean_1(weights).astype(np.float32)[:, None]

    def of_block(features: Features, rows: slice) -> tuple[int, np.ndarray, np.ndarray]:
        x = np.asarray(features[rows], np.float32) - shift
        weighted = x if relative is None else x * relative[rows]
        return len(x), weighted.sum(axis=0, dtype=np.float64), weighted.T @ x

    total, sums, squares = 0, np.zeros(dim), np.zeros((dim, dim))
    for count, linear, quadratic in each_block(views, of_block, 2 * dim):
        total += count
        sums += linear
        squares += quadratic
    shifted = sums / total
    variances, directions = np.linalg.eigh(squares / total - np.outer(shifted, shifted))
    return Moments(total, shifted + shift, directions, np.clip(variances, 0, None))
