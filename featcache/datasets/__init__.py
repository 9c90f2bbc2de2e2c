"""Data sets: a name or a path becomes labelled images with ids and a digest.

``digits`` and ``cifar10`` are known by name; any folder of class folders is a
data set, with or without ``train/`` and ``test/`` above the classes, and so is
a ``.zip`` of one, read in place. Images are decoded when they are asked for,
so a data set of a million photos costs its list of names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from ..files import user_path
from ..progress import OnProgress, Progress, silent
from ._decode import decode_image
from ._images import ArrayImages, FileImages, Images, OnHashed, unheard

__all__ = [
    "ArrayImages",
    "Dataset",
    "FileImages",
    "Images",
    "Split",
    "check_labels",
    "decode_image",
    "load_dataset",
    "named_urls",
]

NAMES = ("cifar10", "digits")


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


@dataclass(frozen=True)
class Split:
    """Labelled images of one role: training or test.

    Parameters
    ----------
    images : Images
        N images; ``images[i]`` is an upright RGB ``PIL.Image.Image``.
    labels : numpy.ndarray
        int64 (N,), in [0, len(class_names)).
    class_names : tuple of str
        In label order.
    ids : tuple of str
        One per image, unique: the path inside the folder or archive, or
        ``train/00042``.

    Raises
    ------
    DatasetError
        No image, lengths that differ, a label outside the classes, an id twice.
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
        if self.labels.shape != (n,) or len(self.ids) != n:
            raise DatasetError(
                f"split: expected {n} labels and ids for {n} images, found labels of shape "
                f"{self.labels.shape} and {len(self.ids)} ids"
            )
        check_labels(self.labels, len(self.class_names), f"split of {n} images")
        if len(set(self.ids)) != n:
            twice = next(name for name in self.ids if self.ids.count(name) > 1)
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
        return self._digest(unheard)

    def digest_with(self, on_hashed: OnHashed) -> str:
        """Return `digest`; where it has yet to be made, ``on_hashed`` hears how many are."""
        if "digest" not in self.__dict__:
            self.__dict__["digest"] = self._digest(on_hashed)  # where cached_property looks
        return self.digest

    def _digest(self, on_hashed: OnHashed) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps([list(self.class_names), list(self.ids)]).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        self.images.update_digest(digest, on_hashed)
        return digest.hexdigest()


@dataclass(frozen=True)
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
    """

    name: str
    train: Split
    test: Split
    source: str

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
        return hashlib.sha256(f"{self.train.digest}\n{self.test.digest}".encode()).hexdigest()

    def digest_with(self, on_progress: OnProgress) -> str:
        """Return `digest`; where it has yet to be made, ``on_progress`` hears how far it is."""
        before, total = len(self.train), len(self.train) + len(self.test)
        self.train.digest_with(lambda done: on_progress(Progress("hash images", done, total)))
        self.test.digest_with(
            lambda done: on_progress(Progress("hash images", before + done, total))
        )
        return self.digest

    def splits(self) -> Sequence[tuple[str, Split]]:
        """Return ("train", split) and ("test", split)."""
        return (("train", self.train), ("test", self.test))


def load_dataset(
    name_or_path: str | Path,
    *,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> Dataset:
    """Find a data set by name, or open a folder or a ``.zip``.

    Parameters
    ----------
    name_or_path : str or Path
        ``"cifar10"``, ``"digits"``, or a path.
    data_root : str or Path, optional
        Where named data sets are kept: `datasets.default_data_root` by default.
    on_progress : callable
        Hears of downloads.

    Raises
    ------
    DatasetError
        Nothing there, no classes, a class without images, an archive that is
        damaged or cannot be downloaded.
    """
    from . import _folder, _named

    if name_or_path == "digits":
        return _named.load_digits()
    if name_or_path == "cifar10":
        root = Path(data_root) if data_root else _named.default_data_root()
        return _named.load_cifar10(root, on_progress=on_progress)
    path = user_path(name_or_path)
    if not os.path.exists(path):  # Path.exists raises on a name that is too long
        raise DatasetError(
            f"{path}: expected a folder of class folders, a .zip of one, or one of "
            f"{', '.join(NAMES)}; found nothing there; try featcache extract digits"
        )
    return _folder.load_path(path)


def named_urls() -> list[str]:
    """Return where the named data sets that are not shipped come from."""
    from ._named import CIFAR10

    return [CIFAR10.url]
