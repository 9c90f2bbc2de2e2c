"""Where batches come from: images that are decoded ahead, or features that were cached.

Both are asked in the same words, so that a run on cached features sees the same images, in
the same order and the same flip views, as one on the images themselves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..datasets.batches import decoded_batches
from ..datasets.dataset import Split
from ..datasets.images import reading_threads
from ..preprocess import FLIP_VIEWS, Preprocess, apply_view
from .recipes import FinetuneRecipe

# The flip views that an augmentation draws from, each as likely as the others.
AUGMENT_VIEWS: Mapping[str, tuple[str, ...]] = {
    "tutorial": FLIP_VIEWS,
    "flip": ("identity", "hflip"),
    "crop-flip": ("identity", "hflip"),
    "none": ("identity",),
}

# 4 of CIFAR-10's 32 pixels: He et al., CVPR 2016, section 4.2.
_SHIFT = 1 / 8
# Sets the draw of shifts apart from that of order and views, which have (seed, epoch) alone.
_SHIFT_KEY = 1


@dataclass(frozen=True, eq=False)
class Draw:
    """One batch of training images, as it was drawn.

    Parameters
    ----------
    rows : numpy.ndarray
        int64 (n,), their rows in the split.
    views : numpy.ndarray or None
        int64 (n,), the flip view of each, as an index into `AUGMENT_VIEWS`; None: as they are.
    shifts : numpy.ndarray or None
        float64 (n, 2) in [-1, 1]: how far each is moved down and to the right, in units of
        an eighth of its side; None: not at all.
    """

    rows: np.ndarray
    views: np.ndarray | None = None
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
    """Pixels of a split, decoded ahead by threads.

    Parameters
    ----------
    split : Split
        The images.
    preprocess : Preprocess
        What the pixels are to be.
    """

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
        """Yield uint8 (n, s, s, 3) for each draw.

        Flips and shifts are applied to pixels that may be smaller than the backbone's
        input: enlarging commutes with flipping.

        Raises
        ------
        DatasetError
            An image that cannot be read or decoded.
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
    """Features of a split at one cut.

    Parameters
    ----------
    views : mapping of str to numpy.ndarray
        Flip view -> (N, ...) features.
    labels : numpy.ndarray
        int64 (N,).
    start : str
        The cut.
    rows : numpy.ndarray, optional
        int64: use these rows alone, in this order.
    """

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
                wanted = slice(None) if draw.views is None else draw.views == view
                batch[wanted] = self._views[name][rows[wanted]]
                if draw.views is None:
                    break
            yield batch


def draw_shifts(recipe: FinetuneRecipe, n: int, seed: int, epoch: int) -> np.ndarray | None:
    """Draw how far each image of an epoch is moved: float64 (n, 2) in [-1, 1], or None."""
    if recipe.augment != "crop-flip":
        return None
    return np.random.default_rng((seed, epoch, _SHIFT_KEY)).uniform(-1, 1, (n, 2))


def shift_reach(side: int) -> int:
    """Return by how many pixels an image of this side is moved at most."""
    return round(side * _SHIFT)


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
    """Move each image by its shift; black comes in at the border."""
    side = pixels.shape[1]
    reach = shift_reach(side)
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    corners = reach - np.rint(shifts * reach).astype(np.int64)
    moved = np.empty_like(pixels)
    for image, (top, left), place in zip(padded, corners.tolist(), moved, strict=True):
        place[...] = image[top : top + side, left : left + side]
    return moved


class Movement(NamedTuple):
    """Where the pixels of each image come from.

    Parameters
    ----------
    rows, columns : numpy.ndarray
        int64 (N, s): the row of the image that each row shows, and the column that each
        column shows; s where there is none, for black.
    """

    rows: np.ndarray
    columns: np.ndarray


def movement_of(draw: Draw, names: tuple[str, ...], side: int) -> Movement | None:
    """Return how the images of a draw are moved; None where none is.

    Parameters
    ----------
    draw : Draw
        Its views and shifts.
    names : tuple of str
        The flip views that ``draw.views`` counts.
    side : int
        Of the images, in pixels.
    """
    flips = draw.views is not None and len(names) > 1
    if not flips and draw.shifts is None:
        return None
    n = len(draw.rows)
    places = []
    for axis, kinds in enumerate((("vflip", "hvflip"), ("hflip", "hvflip"))):
        place = np.tile(np.arange(side), (n, 1))
        if flips:
            flipped = np.isin(np.array(names)[draw.views], kinds)
            place[flipped] = place[flipped, ::-1]
        if draw.shifts is not None:
            place -= np.rint(draw.shifts[:, axis, None] * shift_reach(side)).astype(np.int64)
            place[(place < 0) | (place >= side)] = side
        places.append(place)
    return Movement(*places)


def move(flow: Any, planes: Any, rows: Any, columns: Any) -> Any:
    """Fetch every pixel of uint8 planes (N, C, s, s) from where a `Movement` says."""
    n, channels, side, _ = planes.shape
    padded = flow.nn.functional.pad(planes, (0, 1, 0, 1))
    down = rows.reshape(n, 1, side, 1).expand(n, channels, side, side + 1)
    across = columns.reshape(n, 1, 1, side).expand(n, channels, side, side)
    return flow.gather(flow.gather(padded, 2, down), 3, across)
