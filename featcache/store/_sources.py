"""What is to be written into a cache: arrays in memory, or rows that come one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import ShapeMismatchError
from ._format import DTYPES, encode_id

__all__ = ["Source", "SplitArrays", "encoded_ids", "split_sources"]


@dataclass(frozen=True)
class Source:
    """An array to be written.

    Parameters
    ----------
    dtype : numpy.dtype
        Little-endian.
    shape : tuple of int
        Rows first.
    blocks : callable
        Returns the rows as arrays, one after the other.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @classmethod
    def of(cls, array: np.ndarray) -> Source:
        """Return the source of an array in memory."""
        array = np.ascontiguousarray(array)
        return cls(array.dtype, array.shape, lambda: (array,))


@dataclass(frozen=True)
class SplitArrays:
    """What a cache keeps of one split.

    Parameters
    ----------
    features : numpy.ndarray
        float32 or float16 (N, …), of the identity view.
    labels : numpy.ndarray
        int64 (N,).
    ids : tuple of str
        N names.
    views : mapping of str to numpy.ndarray
        Features (N, D) of further flip views.
    """

    features: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    views: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        n = len(self.labels)
        for name, array in {"features": self.features, **self.views}.items():
            if (
                array.dtype != self.features.dtype
                or array.dtype.str not in DTYPES.values()
                or array.shape != (n, *self.features.shape[1:])
                or array.ndim < 2
            ):
                raise ShapeMismatchError(
                    f"{name}: expected float32 or float16 ({n}, D) for {n} labels, found "
                    f"{array.dtype} {array.shape}"
                )
        if self.labels.dtype != np.int64 or len(self.ids) != n:
            raise ShapeMismatchError(
                f"labels: expected int64 ({n},) and {n} ids, found {self.labels.dtype} "
                f"and {len(self.ids)} ids"
            )


def split_sources(role: str, split: SplitArrays) -> dict[str, Source]:
    """Return the sources of a split's arrays, by their names in the file."""
    return {
        f"{role}/features": Source.of(split.features),
        f"{role}/labels": Source.of(split.labels),
        f"{role}/ids": Source.of(encoded_ids(split.ids)),
        **{f"{role}/views/{view}": Source.of(array) for view, array in split.views.items()},
    }


def encoded_ids(ids: Iterable[str]) -> np.ndarray:
    """Return names as bytes of one length (N,)."""
    encoded = [encode_id(name) for name in ids]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")
