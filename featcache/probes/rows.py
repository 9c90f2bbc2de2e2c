"""Rows of features that are read, and scaled, when a block of them is asked for.

The training part of a holdout, the labelled images, a limited draw, standardised or not:
none of them is a copy of the features until something needs it to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Features", "Rows", "in_memory", "loaded"]


class Rows:
    """Some rows of an array (N, D), in an order of one's own.

    Indexed by a slice or by numbers (n,) of rows it gives an array (n, D), which is all
    that an exact solver asks of features.

    Parameters
    ----------
    features : array
        (N, D): in memory, mapped, or again `Rows`.
    numbers : numpy.ndarray, optional
        int64 (n,), which rows; all by default.
    change : callable, optional
        Takes rows (n, D) and returns them as float32 (n, D), such as `Scaling.apply`.
    """

    def __init__(
        self,
        features: Any,
        numbers: np.ndarray | None = None,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._features = features
        self._numbers = numbers
        self._change = change
        self.dtype: np.dtype = np.dtype(np.float32) if change else features.dtype
        count = len(features) if numbers is None else len(numbers)
        self.shape: tuple[int, int] = (count, features.shape[1])

    def __len__(self) -> int:
        """Return n."""
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Read rows."""
        chosen = index if self._numbers is None else self._numbers[index]
        rows: np.ndarray = self._features[chosen]
        return self._change(rows) if self._change else rows

    @property
    def in_memory(self) -> bool:
        """Whether nothing is read from the disk."""
        return in_memory(self._features)


Features: TypeAlias = "np.ndarray | Rows"  # (N, D): an array, mapped or not, or some of its rows


def in_memory(features: Features) -> bool:
    """Return whether features lie in memory: neither mapped nor a cache's shards."""
    return features.in_memory if isinstance(features, Rows) else type(features) is np.ndarray


def loaded(features: Features) -> Features:
    """Return features as a float32 array where they lie in memory, and as they are elsewhere.

    What was mapped was mapped because it is too large; it is read again in every pass.
    """
    if not in_memory(features):
        return features
    if isinstance(features, np.ndarray):
        return np.asarray(features, np.float32)
    whole = np.empty(features.shape, np.float32)
    rows = 512  # at once, so that nothing but the result needs memory
    for first in range(0, len(features), rows):
        whole[first : first + rows] = features[first : first + rows]
    return whole
