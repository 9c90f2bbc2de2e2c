"""Thumbnails of the images behind a cache, which must have the digest in the cache."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.batches import decoded_batches
from ..datasets.dataset import Dataset, Split
from ..datasets.images import HASH_BYTES, FileImages, reading_threads
from ..datasets.loading import NAMES, load_dataset
from ..datasets.named import CIFAR10, default_data_root
from ..errors import DatasetError, FeatcacheError, visible_line
from ..preprocess import Preprocess, upscale
from ..progress import OnProgress, Progress
from ..store.cache import Cache

Place = tuple[str, int]  # role, and row in the cache's split

MAP_PIXELS, LIST_PIXELS = 32, 64
_BATCH = 1024


class Pictures:
    """Thumbnails of the images of a cache, from a data set of the same digest."""

    def __init__(self, dataset: Dataset, cache: Cache) -> None:
        self._splits = dict(dataset.splits())
        self._rows: dict[str, np.ndarray] = {}
        for (role, split), (_, kept) in zip(dataset.splits(), cache.splits(), strict=True):
            numbers = {name: row for row, name in enumerate(split.ids)}
            # What did not decode is not in the cache, so that rows may have moved up.
            self._rows[role] = np.array([numbers[name] for name in kept.ids], np.int64)

    def small(
        self, places: Sequence[Place], side: int, on_progress: OnProgress
    ) -> dict[Place, str]:
        """Return a WebP of ``side`` pixels of each image in base64; none of unreadable ones."""
        wanted = sorted(set(places))
        quality = 50 if side == MAP_PIXELS else 75
        found = {}
        on_progress(Progress("thumbnails", 0, len(wanted)))
        for first in range(0, len(wanted), _BATCH):
            part = wanted[first : first + _BATCH]
            for role in self._splits:
                rows = np.array([row for own, row in part if own == role], np.int64)
                for place, pixels in self._decoded(role, rows, side):
                    found[place] = _webp(pixels, quality)
            on_progress(Progress("thumbnails", first + len(part), len(wanted)))
        return found

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
    """Return the pictures of a cache's images, or None and the reason.

    The images are where ``dataset`` says; by default those of `NAMES`, where this machine has
    them. Whatever else a cache names, it may name for a stranger, so nothing is fetched from or
    looked for there.

    Raises
    ------
    DatasetError
        ``dataset`` was given, and is not what the cache was made from.
    """
    place = dataset
    if place is None and cache.meta.get("dataset") in NAMES:
        place = cache.meta["dataset"]
    try:
        if place is None:
            made_of = cache.meta.get("dataset_path")
            known = f" (the cache was made from {visible_line(made_of)[:200]})" if made_of else ""
            raise DatasetError(f"name the images with --dataset PATH{known}")
        if dataset is None:
            _check_there(place, data_root)
        if not isinstance(place, Dataset):
            place = load_dataset(
                place, data_root=data_root, on_error="skip", on_progress=on_progress
            )
        source = place.source
        wanted, found = cache.meta["dataset_digest"], place.digest_with(on_progress, "skip")
        if found != wanted:
            part = _limited(place, cache)
            if part is None or part.digest_with(on_progress, "skip") != wanted:
                part = _by_ids(place, cache)
            place = part
        if place is None:
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
    """Return the path, URL or name that a cache was extracted from; None where it is unknown."""
    named = meta["dataset"] if meta.get("dataset") in NAMES else None
    return meta.get("dataset_path") or named


def _limited(dataset: Dataset, cache: Cache) -> Dataset | None:
    """Return the part of a data set that a limited extraction of the cache's size takes."""
    n_train, n_test = (len(part) + len(part.skipped) for part in (cache.train, cache.test))
    try:
        return dataset.limited(n_train, n_test)
    except DatasetError:
        return None  # no draw is that large


def _by_ids(dataset: Dataset, cache: Cache) -> Dataset | None:
    """Return the splits of a cache over its own images, if they are in a data set; labels aside.

    A table may have given the labels and the splits.
    """
    found: dict[str, tuple[str, bytes]] = {}  # id -> file name and hash
    for _, split in dataset.splits():
        images = split.images
        if not isinstance(images, FileImages):
            return None
        hashes = np.frombuffer(bytes(images.hashes), np.uint8).reshape(-1, HASH_BYTES)
        rows = zip(split.ids, images.names, hashes, strict=True)
        found.update((id_, (name, content.tobytes())) for id_, name, content in rows)
        files = images.files
    parts = {}
    for role, kept in cache.splits():
        places = [found.get(id_) for id_ in kept.ids]
        known = [place for place in places if place is not None]
        content = b"".join(content for _, content in known)
        if kept.content_hashes is None or content != kept.content_hashes.tobytes():
            return None
        images = FileImages(files, [name for name, _ in known], bytearray(content))
        labels = np.asarray(kept.labels)
        parts[role] = Split(images, labels, tuple(cache.class_names), tuple(kept.ids))
    train, val, test = parts["train"], parts.get("val"), parts["test"]
    return replace(dataset, train=train, val=val, test=test)


def _check_there(name: object, data_root: str | Path | None) -> None:
    """Raise DatasetError unless the images are there; nothing is downloaded for thumbnails."""
    root = Path(data_root) if data_root else default_data_root()
    archives = (CIFAR10.folder, CIFAR10.filename)
    if name == "cifar10" and not any((root / archive).exists() for archive in archives):
        raise DatasetError(
            f"{root}: expected cifar10 there, found none; name its folder with --data-root"
        )


def as_picture(pixels: np.ndarray, side: int) -> str:
    """Return pixels (s, s, 3) as a WebP of another side in base64."""
    return _webp(_enlarged(pixels[None], side)[0], 75)


def _enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return pixels (N, s, s, 3) at another side; tiny ones by repetition, which is crisp."""
    found = pixels.shape[1]
    if found == side:
        return pixels
    if found <= side // 2 and side % found == 0:
        return pixels.repeat(side // found, axis=1).repeat(side // found, axis=2)
    return upscale(pixels, Preprocess(side))


def _webp(pixels: np.ndarray, quality: int) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode()
