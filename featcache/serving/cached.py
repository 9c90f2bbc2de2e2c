"""A cache as a head sees it: its features in memory once, what is nearest to one, and pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import CacheMismatchError
from ..probes.head import Head
from ..probes.ingredients import feature_differences, head_cuts
from ..probes.knn import nearest
from ..probes.question import check_finite, opened
from ..progress import silent
from ..reporting.pictures import Pictures
from ..store.cache import Cache

_SIDE, _KEPT = 256, 512  # pixels of a picture; pictures in memory: some 5 MB


@dataclass(frozen=True)
class Near:
    """One of the cached images nearest to a query; its id, which is a file's name, stays here.

    Parameters
    ----------
    split : str
        The split of the cache that it is in.
    row : int
        Its row there.
    label : str or None
        Its class by the cache's own labels.
    similarity : float
        Cosine of the two features, in [-1, 1].
    """

    split: str
    row: int
    label: str | None
    similarity: float


class Cached:
    """The images of a cache, whose features are those that a head reads.

    Raises CacheMismatchError for other features, and CacheCorruptError where one is not finite.
    """

    def __init__(self, cache: Cache, head: Head, where: str) -> None:
        cuts = head_cuts(head.ingredients)
        differing = feature_differences(head.ingredients, cache.meta)
        parts = {}
        dim = head.weight.shape[1]
        if not differing:
            opened(cache, cuts=cuts)
            for role, split in cache.splits():
                parts[role] = [split.cut(cut) for cut in cuts] or [split.features]
            dim = sum(part.shape[1] for part in parts["train"])
            if dim != head.weight.shape[1]:
                differing = [f"length: head {head.weight.shape[1]}, here {dim}"]
        if differing:
            raise CacheMismatchError(
                f"{cache.path}: expected the features of {where}, found {'; '.join(differing)}; "
                "give the cache that the head was trained on, or one made alike"
            )
        for role, arrays in parts.items():
            check_finite(cache, role, arrays)
        self.path, self.class_names = cache.path, cache.class_names
        self.ids = {role: split.ids for role, split in cache.splits()}
        self.labels = {role: np.asarray(split.labels) for role, split in cache.splits()}
        ends = np.cumsum([len(labels) for labels in self.labels.values()]).tolist()
        self._starts = dict(zip(parts, [0, *ends], strict=False))
        self._features = np.empty((ends[-1], dim), np.float32)
        self.features: dict[str, np.ndarray] = {}  # by role, parts of one array
        for role, end in zip(parts, ends, strict=True):
            self.features[role] = self._features[self._starts[role] : end]
            np.concatenate(parts[role], axis=1, out=self.features[role], casting="same_kind")
        self.pictures: Pictures | None = None
        self.picture = lru_cache(_KEPT)(self._drawn)

    def nearest(self, features: np.ndarray, k: int) -> Iterator[list[Near]]:
        """Yield the k nearest images of each feature (N, D), the nearest first."""
        similarity, rows = nearest(features, self._features, min(k, len(self._features)))
        for cosines, numbers in zip(similarity.tolist(), rows.tolist(), strict=True):
            yield [self._near(row, one) for row, one in zip(numbers, cosines, strict=True)]

    def _near(self, row: int, similarity: float) -> Near:
        role = [role for role, start in self._starts.items() if start <= row][-1]
        row -= self._starts[role]
        label = self.labels[role][row]
        return Near(role, row, self.class_names[label] if label >= 0 else None, similarity)

    def _drawn(self, split: str, row: int) -> bytes | None:
        """Return the picture of an image as WebP; None where there is none."""
        if self.pictures is None or not 0 <= row < len(self.labels.get(split, ())):
            return None
        found = self.pictures.small([(split, row)], _SIDE, silent).get((split, row))
        return base64.b64decode(found) if found is not None else None
