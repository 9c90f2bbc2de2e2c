"""The images behind a cache: found again, held against its digest, made small."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.batches import decoded_batches
from ..datasets.dataset import Dataset
from ..datasets.images import reading_threads
from ..datasets.loading import load_dataset
from ..datasets.named import CIFAR10, default_data_root
from ..errors import DatasetError, FeatcacheError
from ..preprocess import Preprocess, upscale
from ..progress import OnProgress, Progress
from ..remote import is_url
from ..store.cache import Cache

Place = tuple[str, int]  # role, and row in the cache's split

SPRITE_PIXELS = 32
LIST_PIXELS = 64
SHEET = 1024  # sprites of one sheet, 32 in a row: a megapixel, decoded when one of them is shown
_SHEET_SIDE = 32
# 4:2:0 works on squares of 16 pixels, so that no sprite bleeds into the next.
_SPRITE_QUALITY, _LIST_QUALITY = 60, 82
_GIVEN = re.compile(r"(.+), (?:[^,/]+/ and [^,/]+/ as given|divided by class, seed \d+)", re.DOTALL)


class Pictures:
    """Small pictures of the images of a cache.

    Parameters
    ----------
    dataset : Dataset
        Whose digest is the cache's.
    cache : Cache
        Its rows are what images are asked for by.
    """

    def __init__(self, dataset: Dataset, cache: Cache) -> None:
        self._splits = dict(dataset.splits())
        self._rows: dict[str, np.ndarray] = {}
        for (role, split), kept in zip(dataset.splits(), (cache.train, cache.test), strict=True):
            numbers = {name: row for row, name in enumerate(split.ids)}
            # What did not decode is not in the cache, so that rows may have moved up.
            self._rows[role] = np.array([numbers[name] for name in kept.ids], np.int64)

    def singles(self, places: Sequence[Place], on_progress: OnProgress) -> dict[Place, str]:
        """Return a data URI of each image; none of one that cannot be read any more."""
        wanted = sorted(set(places))
        found = {}
        for part, pixels in self._pixels(wanted, LIST_PIXELS, "list thumbnails", on_progress):
            for place, image in zip(part, pixels, strict=True):
                if image is not None:
                    found[place] = _uri(image, _LIST_QUALITY)
        return found

    def sheets(self, places: Sequence[Place], on_progress: OnProgress) -> list[str]:
        """Return data URIs of sheets that hold `SHEET` sprites each, in order."""
        made: list[str] = []
        for part, pixels in self._pixels(places, SPRITE_PIXELS, "map thumbnails", on_progress):
            side = SPRITE_PIXELS
            cells = np.full((SHEET, side, side, 3), 128, np.uint8)
            for number, image in enumerate(pixels):
                if image is not None:
                    cells[number] = image
            lines = -(-len(part) // _SHEET_SIDE)
            grid = cells[: lines * _SHEET_SIDE].reshape(lines, _SHEET_SIDE, side, side, 3)
            sheet = grid.transpose(0, 2, 1, 3, 4).reshape(lines * side, _SHEET_SIDE * side, 3)
            made.append(_uri(sheet, _SPRITE_QUALITY))
        return made

    def _pixels(
        self, places: Sequence[Place], side: int, stage: str, on_progress: OnProgress
    ) -> Iterator[tuple[Sequence[Place], list[np.ndarray | None]]]:
        """Yield places, `SHEET` at a time, with uint8 (side, side, 3) or None of each."""
        total = len(places)
        on_progress(Progress(stage, 0, total))
        for first in range(0, total, SHEET):
            part = places[first : first + SHEET]
            found: dict[Place, np.ndarray] = {}
            for role in self._splits:
                rows = np.array([row for own, row in part if own == role], np.int64)
                found.update(self._decoded(role, rows, side))
            yield part, [found.get(place) for place in part]
            on_progress(Progress(stage, first + len(part), total))

    def _decoded(
        self, role: str, rows: np.ndarray, side: int
    ) -> Iterator[tuple[Place, np.ndarray]]:
        if not len(rows):
            return
        numbers = self._rows[role][rows]
        batches = decoded_batches(
            self._splits[role].images,
            [numbers],
            Preprocess(side),
            workers=reading_threads(self._splits[role].images),
            on_error="skip",
        )
        with closing(batches):
            for batch in batches:
                back = dict(zip(numbers.tolist(), rows.tolist(), strict=True))
                whole = _enlarged(batch.pixels, side)
                for number, pixels in zip(batch.rows.tolist(), whole, strict=True):
                    yield (role, back[number]), pixels


def find_pictures(
    cache: Cache,
    dataset: str | Path | Dataset | None,
    data_root: str | Path | None,
    on_progress: OnProgress,
) -> tuple[Pictures | None, str]:
    """Find the images of a cache, and make sure that they are the same.

    Parameters
    ----------
    cache : Cache
        Whose images are wanted.
    dataset : str, Path or Dataset, optional
        Where they are; by default where they were when the cache was made.
    data_root : str or Path, optional
        Where named data sets are kept.
    on_progress : callable
        Hears of images that are hashed.

    Returns
    -------
    pictures : Pictures or None
        None where there are none.
    why : str
        Why there are none, for a person; empty where there are.

    Raises
    ------
    DatasetError
        ``dataset`` was given, and is not what the cache was made from.
    """
    place = dataset if dataset is not None else dataset_place(cache.meta)
    try:
        if place is None:
            raise DatasetError("the cache does not say where its images are")
        if dataset is None:
            _check_there(place, data_root)
        if not isinstance(place, Dataset):
            place = load_dataset(place, data_root=data_root, on_progress=on_progress)
        source = place.source
        wanted, found = cache.meta["dataset_digest"], place.digest_with(on_progress, "skip")
        if found != wanted:
            place = _limited(place, cache)
        if place is None or place.digest_with(on_progress, "skip") != wanted:
            raise DatasetError(
                f"{source}: expected the images that {cache.path} was made from (digest "
                f"{wanted[:8]}), found others ({found[:8]}); name the right ones with --dataset"
            )
        return Pictures(place, cache), ""
    except FeatcacheError as error:
        if dataset is not None:
            raise
        return None, str(error)


def dataset_place(meta: Mapping[str, Any]) -> str | None:
    """Return what `featcache.load_dataset` took when a cache was made, as far as it says so."""
    if meta.get("dataset") in ("cifar10", "digits"):
        given = _GIVEN.fullmatch(str(meta.get("dataset_source", "")))
        return given[1] if given else str(meta["dataset"])
    given = _GIVEN.fullmatch(str(meta.get("dataset_source", "")))
    return given[1] if given else None


def _limited(dataset: Dataset, cache: Cache) -> Dataset | None:
    """Return the part of a data set that a limited extraction of the cache's size takes."""
    n_train, n_test = (len(part) + len(part.skipped) for part in (cache.train, cache.test))
    try:
        return dataset.limited(n_train, n_test)
    except DatasetError:
        return None  # no draw is that large


def _check_there(place: str | Path | Dataset, data_root: str | Path | None) -> None:
    """Say where images were looked for; refuse to download a data set for its thumbnails."""
    if place == "digits" or isinstance(place, Dataset):
        return
    if place != "cifar10":
        if not is_url(place) and not Path(place).exists():
            raise DatasetError(
                f"{place}: expected the images there, found nothing; name their place with "
                "--dataset"
            )
        return
    root = Path(data_root) if data_root else default_data_root()
    if not any((root / name).exists() for name in (CIFAR10.folder, CIFAR10.filename)):
        raise DatasetError(
            f"{root}: expected cifar10 there, found none; name its place with --data-root"
        )


def _enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return pixels (N, s, s, 3) at another side; tiny ones by repetition, which is crisp."""
    found = pixels.shape[1]
    if found == side:
        return pixels
    if found <= side // 2 and side % found == 0:
        return pixels.repeat(side // found, axis=1).repeat(side // found, axis=2)
    return upscale(pixels, side)


def _uri(pixels: np.ndarray, quality: int) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
