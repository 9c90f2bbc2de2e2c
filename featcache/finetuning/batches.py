"""Batches of images, decoded ahead, or of cached features: same order, same flip views."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..datasets.batches import decoded_batches
from ..datasets.dataset import Split
from ..datasets.images import reading_threads
from ..preprocess import FLIP_VIEWS, Preprocess, apply_view
from ..store.reader import check_whole
from .recipes import FinetuneRecipe

# The flip views that an augmentation draws from, with equal probability.
AUGMENT_VIEWS: Mapping[str, tuple[str, ...]] = {
    "tutorial": FLIP_VIEWS,
    "flip": ("identity", "hflip"),
    "crop-flip": ("identity", "hflip"),
    "none": ("identity",),
}

# 4 of CIFAR-10's 32 pixels: He et al., CVPR 2016, section 4.2.
_SHIFT = 1 / 8
# Makes the draw of shifts differ from that of order and views, whose key is (seed, epoch).
_SHIFT_KEY = 1


@dataclass(frozen=True, eq=False)
class Draw:
    """One batch of training images, as it was drawn."""

    rows: np.ndarray  # int64 (n,), of the split
    views: np.ndarray | None = None  # int64 (n,), each an index into `AUGMENT_VIEWS`
    # float64 (n, 2) in [-1, 1]: the shift down and right, in eighths of the image's side.
    shifts: np.ndarray | None = None


class Source(Protocol):
    """The labelled inputs of one split."""

    labels: np.ndarray
    start: str | None

    def __len__(self) -> int:
        """Return N."""

    def batches(
        self, draws: Iterable[Draw], augment: str = "none"
    ) -> Generator[np.ndarray, None, None]:
        """Yield the inputs of each draw; close the generator when leaving early."""


class ImageSource:
    """Pixels of a split, decoded ahead by threads."""

    start: str | None = None

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        self._images = split.images
        self._preprocess = preprocess
        self.labels = split.labels

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def batches(
        self, draws: Iterable[Draw], augment: str = "none"
    ) -> Generator[np.ndarray, None, None]:
        """Yield uint8 (n, s, s, 3) for each draw, which may be smaller than the backbone's input.

        Flips and shifts are applied before enlarging, which commutes with flipping.
        """
        drawn = list(draws)
        decoded = decoded_batches(
            self._images,
            (draw.rows for draw in drawn),
            self._preprocess,
            workers=reading_threads(self._images),
        )
        with closing(decoded):
            for draw, batch in zip(drawn, decoded, strict=True):
                pixels = batch.pixels
                if draw.shifts is not None:
                    pixels = _shifted(pixels, draw.shifts)
                yield _flipped(pixels, draw.views, AUGMENT_VIEWS[augment])


class CachedSource:
    """Features of a split at the cut ``start``: flip view -> (N, ...); ``rows`` selects some."""

    def __init__(
        self,
        views: Mapping[str, np.ndarray],
        labels: np.ndarray,
        start: str,
        rows: np.ndarray | None = None,
    ) -> None:
        self._views = views
        self._rows = np.arange(len(labels)) if rows is None else rows
        self.labels = labels[self._rows]
        self.start: str | None = start

    def __len__(self) -> int:
        """Return N."""
        return len(self._rows)

    def batches(
        self, draws: Iterable[Draw], augment: str = "none"
    ) -> Generator[np.ndarray, None, None]:
        """Yield float32 (n, ...) for each draw."""
        names = AUGMENT_VIEWS[augment]
        for draw in draws:
            rows = self._rows[draw.rows]
            first = self._views[names[0]]
            batch = np.empty((len(rows), *first.shape[1:]), np.float32)
            for view, name in enumerate(names):
                chosen = slice(None) if draw.views is None else draw.views == view
                check_whole(self._views[name])
                batch[chosen] = self._views[name][rows[chosen]]
                if draw.views is None:
                    break
            yield batch


def draw_shifts(recipe: FinetuneRecipe, n: int, seed: int, epoch: int) -> np.ndarray | None:
    """Draw the shift of each image of an epoch: float64 (n, 2) in [-1, 1], or None."""
    if recipe.augment != "crop-flip":
        return None
    return np.random.default_rng((seed, epoch, _SHIFT_KEY)).uniform(-1, 1, (n, 2))


def _flipped(pixels: np.ndarray, views: np.ndarray | None, names: tuple[str, ...]) -> np.ndarray:
    """Return each image of a batch in its view, without touching the batch itself."""
    if views is None or len(names) == 1:
        return pixels
    flipped = np.empty_like(pixels)
    for view, name in enumerate(names):
        chosen = views == view
        flipped[chosen] = apply_view(pixels[chosen], name)
    return flipped


def _shifted(pixels: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Move each image by its shift, and fill with black at the border."""
    side = pixels.shape[1]
    reach = round(side * _SHIFT)
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    corners = reach - np.rint(shifts * reach).astype(np.int64)
    moved = np.empty_like(pixels)
    for image, (top, left), place in zip(padded, corners.tolist(), moved, strict=True):
        place[...] = image[top : top + side, left : left + side]
    return moved
