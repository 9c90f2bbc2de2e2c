"""Data sets: a name or a path becomes labelled images with ids and a digest.

``digits`` and ``cifar10`` are known by name; any folder of class folders is a
data set, with or without ``train/`` and ``test/`` above the classes, and so is
a ``.zip`` of one, read in place; either may be behind a URL. Images are decoded
when they are asked for, so a data set of a million photos costs its list of names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from ..progress import OnProgress, Progress, silent
from ..remote import located
from ..sampling import LIMIT_SEED, stratified_rows
from ._decode import decode_image
from ._hashes import (
    dataset_digest,
    listing_digest,
    recorded_hashes,
    recording,
    split_digest,
)
from ._images import (
    ArrayImages,
    FileImages,
    Images,
    OnError,
    OnHashed,
    ReadableImages,
    is_remote,
    reading_threads,
)

__all__ = [
    "ArrayImages",
    "Dataset",
    "FileImages",
    "Images",
    "OnError",
    "ReadableImages",
    "Split",
    "check_labels",
    "dataset_digest",
    "decode_image",
    "is_remote",
    "listing_digest",
    "load_dataset",
    "named_urls",
    "reading_threads",
    "recorded_hashes",
    "recording",
    "split_digest",
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
    notes : tuple of str
        What a person should hear of: files that were left out, a sentence each.
    """

    name: str
    train: Split
    test: Split
    source: str
    notes: tuple[str, ...] = ()

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


def load_dataset(
    name_or_path: str | Path,
    *,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> Dataset:
    """Find a data set by name, or open a folder or a ``.zip``, here or behind a URL.

    Parameters
    ----------
    name_or_path : str or Path
        ``"cifar10"``, ``"digits"``, a path, or a URL that fsspec knows: ``"s3://bucket/photos"``,
        ``"https://host/photos.zip"``.
    data_root : str or Path, optional
        Where named data sets are kept: `datasets.default_data_root` by default.
    on_progress : callable
        Hears of downloads.

    Raises
    ------
    DatasetError
        Nothing there, no classes, a class without images, an archive that is
        damaged or cannot be downloaded.
    RemoteError
        A URL whose protocol has no package here, that cannot be reached, or is refused.
    """
    from . import _folder, _named

    if name_or_path == "digits":
        return _named.load_digits()
    if name_or_path == "cifar10":
        root = Path(data_root) if data_root else _named.default_data_root()
        return _named.load_cifar10(root, on_progress=on_progress)
    if not str(name_or_path).strip():  # Path("") would be the current folder
        raise DatasetError(
            f"data set: expected a folder of class folders, a .zip of one, or one of "
            f"{', '.join(NAMES)}; found an empty name; try featcache extract digits"
        )
    path = located(name_or_path)
    if not isinstance(path, Path):
        from ._remote import load_url

        return load_url(path)
    found = _found_at(path)
    if found not in ("a folder", "a file"):
        raise DatasetError(
            f"{path}: expected a folder of class folders, a .zip of one, or one of "
            f"{', '.join(NAMES)}; found {found}; try featcache extract digits"
        )
    return _folder.load_path(path)


def _found_at(path: Path) -> str:
    """Say what is at a path: "a folder", "a file", or why there is neither."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        dangling = os.path.islink(path)
        return f"a link to {os.readlink(path)}, where nothing is" if dangling else "nothing there"
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return f"a path that cannot be followed ({getattr(error, 'strerror', error)})"
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")


def named_urls() -> list[str]:
    """Return where the named data sets that are not shipped come from."""
    from ._named import CIFAR10

    return [CIFAR10.url]
