"""Data sets: a name or a path becomes labelled images with ids and a digest.

``digits`` and ``cifar10`` are known by name; any folder of class folders is a
data set, with or without ``train/`` and ``test/`` above the classes, and so is
a ``.zip`` of one, read in place; either may be behind a URL. Images are decoded
when they are asked for, so a data set of a million photos costs its list of names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import DatasetError
from ..progress import OnProgress, Progress, silent
from ..sampling import LIMIT_SEED, stratified_rows
from .images import (
    HASH_BYTES,
    FileImages,
    Files,
    Images,
    OnError,
    OnHashed,
    unreadable_hash,
)


def check_labels(labels: np.ndarray, n_classes: int, where: str) -> None:
    """Refuse labels outside [0, n_classes).

    OneFlow's cross-entropy does not: it returns a loss of 0 for them, and the
    head learns nonsense in silence.

    Raises
    ------
    DatasetError
        With the first row, its label and the range.
    """
    bad = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if bad.size:
        raise DatasetError(
            f"{where}: expected labels from 0 to {n_classes - 1} ({n_classes} classes), found "
            f"{labels[bad[0]]} in row {bad[0]} ({bad.size} such rows); correct the labels or the "
            "class names"
        )


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images of one role: training or test.

    Parameters
    ----------
    images : Images
        N images; ``images[i]`` is an upright RGB ``PIL.Image.Image``.
    labels : numpy.ndarray
        Integers (N,), in [0, len(class_names)); kept as int64.
    class_names : tuple of str
        In label order.
    ids : tuple of str
        One per image, unique: the path inside the folder or archive, or
        ``train/00042``.

    Raises
    ------
    DatasetError
        No image, labels that are no integers, lengths that differ, a label outside the
        classes, an id twice.
    """

    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check what every user of a split relies on."""
        n = len(self.images)
        if not n:
            raise DatasetError("split: expected at least one image, found none")
        if not isinstance(self.labels, np.ndarray) or self.labels.dtype.kind not in "iu":
            found = getattr(self.labels, "dtype", type(self.labels).__name__)
            raise DatasetError(
                f"split: expected labels as a NumPy array of integers (N,), found {found}; make "
                "them one with numpy.asarray(labels, dtype=numpy.int64)"
            )
        if self.labels.shape != (n,) or len(self.ids) != n:
            raise DatasetError(
                f"split: expected {n} labels and ids for {n} images, found labels of shape "
                f"{self.labels.shape} and {len(self.ids)} ids"
            )
        check_labels(self.labels, len(self.class_names), f"split of {n} images")
        object.__setattr__(self, "labels", self.labels.astype(np.int64, copy=False))
        if len(set(self.ids)) != n:
            twice = Counter(self.ids).most_common(1)[0][0]
            raise DatasetError(f"split: expected each id once, found {twice!r} more than once")

    def __len__(self) -> int:
        """Return N."""
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """Return the split of these rows, in this order."""
        return Split(
            self.images.take(rows),
            self.labels[rows],
            self.class_names,
            tuple(self.ids[row] for row in rows),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the images' bytes, labels, ids and class names, in order."""
        return self._digest(silent, "fail")

    def digest_with(self, on_hashed: OnHashed, on_error: OnError = "fail") -> str:
        """Return `digest`; where it has yet to be made, ``on_hashed`` hears how many are.

        With ``"skip"``, a file that cannot be read counts by its name.
        """
        if "digest" not in self.__dict__:
            # where cached_property looks
            self.__dict__["digest"] = self._digest(on_hashed, on_error)
        return self.digest

    def _digest(self, on_hashed: OnHashed, on_error: OnError) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps([list(self.class_names), list(self.ids)]).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        self.images.update_digest(digest, on_hashed, on_error)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split over the same classes.

    Parameters
    ----------
    name : str
        As files are named after it: letters, digits, ``.``, ``_``, ``-``.
    train, test : Split
        Disjoint images.
    source : str
        Where the images came from and how they were split, for a person.
    notes : tuple of str
        One sentence each on files that were left out.
    path : str, optional
        The path or URL as it was given; None for named data sets and those from arrays.
    """

    name: str
    train: Split
    test: Split
    source: str
    notes: tuple[str, ...] = ()
    path: str | None = None

    def __post_init__(self) -> None:
        """Refuse a name that would not be a file's."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name):
            raise DatasetError(
                f"data set name: expected 1 to 100 letters, digits, '.', '_', '-', found "
                f"{self.name!r}; give it another"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return self.train.class_names

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of both splits' digests."""
        return dataset_digest(self.train.digest, self.test.digest)

    def digest_with(self, on_progress: OnProgress, on_error: OnError = "fail") -> str:
        """Return `digest`; where it has yet to be made, ``on_progress`` hears how far it is.

        With ``"skip"``, a file that cannot be read counts by its name, and is left to whoever
        decodes it to tell of.
        """
        before, total = len(self.train), len(self.train) + len(self.test)

        def heard(begin: int) -> OnHashed:
            return lambda done: on_progress(Progress("hash images", begin + done, total))

        self.train.digest_with(heard(0), on_error)
        self.test.digest_with(heard(before), on_error)
        return self.digest

    def limited(self, train: int | None, test: int | None) -> Dataset:
        """Return a stratified part: so many images of each split, all where None.

        The draw is the one that `featcache.probe` and `featcache.finetune` limit themselves by.

        Raises
        ------
        DatasetError
            A number that leaves a class without an image.
        """

        def part(role: str, split: Split, limit: int | None) -> Split:
            if limit is None or limit >= len(split):
                return split
            what = f"{self.name} {role}"
            return split.take(stratified_rows(split.labels, limit, LIMIT_SEED, what))

        return replace(
            self, train=part("train", self.train, train), test=part("test", self.test, test)
        )

    def splits(self) -> Sequence[tuple[str, Split]]:
        """Return ("train", split) and ("test", split)."""
        return (("train", self.train), ("test", self.test))


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
