"""What an export writes: arrays of a cache under flat names, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..progress import OnProgress, Progress
from ..store import Cache, iterate_rows

__all__ = ["Reading", "text_of"]


class Reading:
    """The arrays of a cache that are exported, and how far they have been read.

    Parameters
    ----------
    cache : Cache
        Where they are read from.
    roles : tuple of str
        The splits.
    wanted : callable
        Tells whether the array of a split is exported, by its name: ``"features"``.
    on_progress : callable
        Hears of bytes.

    Attributes
    ----------
    arrays : dict of str to StoredArray
        ``"train_features"``, ``"train_views_hflip"`` …: the names in the cache with
        underscores.
    """

    def __init__(
        self,
        cache: Cache,
        roles: tuple[str, ...],
        wanted: Callable[[str], bool],
        on_progress: OnProgress,
    ) -> None:
        self.cache = cache
        self.roles = roles
        self.arrays = {
            name.replace("/", "_"): array
            for name, array in cache.index.arrays.items()
            if name.partition("/")[0] in roles and wanted(name.partition("/")[2])
        }
        self._on_progress = on_progress
        self._done = 0

    @property
    def n_rows(self) -> int:
        """Images, all splits together."""
        return sum(self.arrays[f"{role}_labels"].shape[0] for role in self.roles)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of an array, each block of them verified, as `iterate_rows`."""
        total = sum(array.size_bytes for array in self.arrays.values())
        for piece in iterate_rows(self.arrays[name]):
            yield piece
            self._done += piece.nbytes
            self._on_progress(Progress("exporting", self._done, total, "B"))

    def whole(self, name: str) -> np.ndarray:
        """Return a small array: ids or labels."""
        array = self.arrays[name]
        return np.concatenate([np.empty((0, *array.row_shape), array.dtype), *self.pieces(name)])

    def batches(self, name: str, n_rows: int) -> Iterator[np.ndarray]:
        """Yield the rows of an array, ``n_rows`` at a time; fewer in the end."""
        held: list[np.ndarray] = []
        for piece in self.pieces(name):
            while len(piece):
                room = n_rows - sum(map(len, held))
                held.append(piece[:room])
                piece = piece[room:]
                if sum(map(len, held)) == n_rows:
                    yield np.concatenate(held)
                    held = []
        if held:
            yield np.concatenate(held)


def text_of(value: Any) -> str:
    """Return text that any encoding takes: what of a file name is no text is spelt out."""
    return str(value).encode("utf-8", "backslashreplace").decode()
