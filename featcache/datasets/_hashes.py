"""The hash of a data set put together from parts that were read on many machines.

Each of them reads a share of the files, once, and hashes what it reads on the way. The
digest of the whole is then the same as if one machine had hashed every file first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from ._files import Files
from ._images import HASH_BYTES, FileImages, unreadable_hash

if TYPE_CHECKING:
    from . import Dataset, Split

__all__ = ["dataset_digest", "listing_digest", "recorded_hashes", "recording", "split_digest"]


class _RecordedFiles:
    """Files that are hashed when they are read, and the hashes kept until somebody takes them."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._hashes: dict[str, bytes] = {}

    @property
    def remote(self) -> bool:
        """Whether every read waits for a network."""
        return self._files.remote

    def names(self) -> list[str]:
        """List every file."""
        return self._files.names()

    def folders(self) -> list[str]:
        """List the folders."""
        return self._files.folders()

    def read(self, name: str) -> bytes:
        """Return a file's bytes, and keep their hash; that of a name where it cannot be read."""
        try:
            data = self._files.read(name)
        except DatasetError:
            self._hashes[name] = unreadable_hash(name)
            raise
        self._hashes[name] = hashlib.sha256(data).digest()
        return data

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return self._files.where(name)

    def take_hash(self, name: str) -> bytes:
        """Return the hash of a file that was read, and forget it."""
        return self._hashes.pop(name)


def recording(split: Split) -> Split | None:
    """Return the same split, whose files are hashed when they are read.

    Returns
    -------
    Split or None
        For `recorded_hashes`; None where the images are not files, and have no hashes.
    """
    images = split.images
    if not isinstance(images, FileImages):
        return None
    return replace(split, images=FileImages(_RecordedFiles(images.files), images.names))


def recorded_hashes(split: Split, rows: Iterable[int]) -> np.ndarray:
    """Return SHA-256 of the files of these rows, all of which were read once; and forget them.

    Parameters
    ----------
    split : Split
        From `recording`.
    rows : iterable of int
        n of them.

    Returns
    -------
    numpy.ndarray
        uint8 (n, 32).
    """
    images = split.images
    assert isinstance(images, FileImages)
    assert isinstance(images.files, _RecordedFiles)
    hashes = b"".join(images.files.take_hash(images.names[row]) for row in rows)
    return np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)


def listing_digest(dataset: Dataset) -> str:
    """Return SHA-256 (hex) of the names, labels and classes of a data set, no file read."""
    return dataset_digest(
        *(
            split_digest(split.class_names, split.ids, [split.labels], ())
            for _, split in dataset.splits()
        )
    )


def split_digest(
    class_names: Sequence[str],
    ids: Iterable[str],
    labels: Iterable[np.ndarray],
    hashes: Iterable[np.ndarray],
) -> str:
    """Return `Split.digest` of a split of files, made of its parts one after the other.

    Parameters
    ----------
    class_names : sequence of str
        In label order.
    ids : iterable of str
        Of all its images.
    labels : iterable of numpy.ndarray
        Integers, in the same order.
    hashes : iterable of numpy.ndarray
        uint8 (any, 32), as `recorded_hashes` gives them, in the same order.
    """
    digest = hashlib.sha256()
    # The JSON of [class names, ids], without the list of all ids in memory.
    digest.update(f"[{json.dumps(list(class_names))}, [".encode())
    for number, name in enumerate(ids):
        digest.update(f"{', ' if number else ''}{json.dumps(name)}".encode())
    digest.update(b"]]")
    for part in labels:
        digest.update(part.astype("<i8").tobytes())
    for part in hashes:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def dataset_digest(train: str, test: str) -> str:
    """Return `Dataset.digest` of both splits' digests."""
    return hashlib.sha256(f"{train}\n{test}".encode()).hexdigest()
