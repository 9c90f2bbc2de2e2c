"""How far the features of the same images are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._arrays import map_array
from ._cache import Cache
from ._format import StoredArray, array_name
from ._walk import iterate_rows

__all__ = ["FeatureDiff", "diff_features", "stored_features"]


@dataclass(frozen=True)
class FeatureDiff:
    """How far the features of the same images are apart.

    Parameters
    ----------
    cut, view : str
        Which features: ``"avgpool"``, ``"identity"``.
    shape_a, shape_b : tuple of int
        Of one image's features; () where a cache has none.
    n_rows : int
        Images that were compared: those that both have; 0 where the shapes differ, and
        then the numbers below say nothing.
    n_different : int
        Of these, how many differ at all.
    max_abs : float
        Largest absolute difference of two numbers.
    mean_cosine, min_cosine : float
        Over the images.
    farthest : str
        The image of the smallest cosine; "" where there is none.
    """

    cut: str
    view: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    n_rows: int
    n_different: int
    max_abs: float
    mean_cosine: float
    min_cosine: float
    farthest: str


def stored_features(cache: Cache, role: str, cut: str, view: str) -> StoredArray | None:
    """Return where the features of a cut and view lie; None where the cache has none."""
    return cache.index.arrays.get(f"{role}/{array_name(cut, view, cache.cuts[0])}")


def diff_features(
    a: Cache,
    b: Cache,
    role: str,
    cut: str,
    view: str,
    partner: np.ndarray,
    on_rows: Callable[[int], None],
) -> FeatureDiff:
    """Compare the features of one cut and view, a few rows at a time.

    Parameters
    ----------
    a, b : Cache
        At least one of them has such features.
    role, cut, view : str
        Which.
    partner : numpy.ndarray
        int64 (N of a,): the row in b of the same image; -1 where it has none.
    on_rows : callable
        Hears how many more rows of a have been seen.

    Raises
    ------
    CacheCorruptError
        A block is not what was written.
    """
    one, other = (stored_features(cache, role, cut, view) for cache in (a, b))
    gap = _Gap()
    if one and other and one.row_shape == other.row_shape:
        for _ in iterate_rows(other):  # verifies what is then looked up in any order
            pass
        mapped, row = map_array(other), 0
        for piece in iterate_rows(one):
            wanted = partner[row : row + len(piece)]
            known = wanted >= 0
            gap.add(row + np.flatnonzero(known), piece[known], mapped[wanted[known]])
            row += len(piece)
            on_rows(len(piece))
    else:
        on_rows(len(partner))
    return FeatureDiff(
        cut=cut,
        view=view,
        shape_a=one.row_shape if one else (),
        shape_b=other.row_shape if other else (),
        n_rows=gap.n_rows,
        n_different=gap.n_different,
        max_abs=gap.max_abs,
        mean_cosine=gap.sum_cosine / gap.n_rows if gap.n_rows else 0.0,
        min_cosine=gap.min_cosine,
        farthest=getattr(a, role).ids[gap.farthest] if gap.n_rows else "",
    )


class _Gap:
    """How far rows are apart, taken in piece by piece."""

    def __init__(self) -> None:
        self.n_rows = self.n_different = self.farthest = 0
        self.max_abs = self.sum_cosine = 0.0
        self.min_cosine = 1.0

    def add(self, numbers: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """Take in rows (n, …) that belong together, and their numbers in the split (n,)."""
        if not len(numbers):
            return
        left, right = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (left, right))
        different = (left != right).any(axis=1)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = np.einsum("ij,ij->i", left, right) / np.where(lengths > 0, lengths, 1)
        cosine[~different] = 1.0
        lowest = int(cosine.argmin())
        if not self.n_rows or cosine[lowest] < self.min_cosine:
            self.min_cosine, self.farthest = float(cosine[lowest]), int(numbers[lowest])
        self.n_rows += len(numbers)
        self.n_different += int(different.sum())
        self.max_abs = max(self.max_abs, float(np.abs(left - right).max()))
        self.sum_cosine += float(cosine.sum())
