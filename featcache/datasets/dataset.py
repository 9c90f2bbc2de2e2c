"""Data sets: a name or a path becomes labelled images with ids and a digest.

``digits`` and ``cifar10`` are known by name; any folder of class folders is a
data set, with or without ``train/`` and ``test/`` above the classes, and so is
a ``.zip`` of one, read in place; either may be behind a URL. Images are decoded
when they are asked for, so a data set of a million photos costs its list of names.

Where no split is given, the content of each image decides its side (`drawn_sides`). So an image
stays on its side when others are added, and when it is renamed or moved to another class.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np

from ..errors import DatasetError, one_line
from ..progress import OnProgress, Progress, silent
from ..sampling import LIMIT_SEED, drawn_sides, stratified_rows
from ..tables.table import Table
from .images import HASH_BYTES, FileImages, Images, OnError, OnHashed

UNLABELLED = -1  # the label of an image that has none
_IDS_AT_ONCE = 4096


def check_labels(labels: np.ndarray, n_classes: int, where: str) -> None:
    """Refuse labels outside [0, n_classes), but for -1: an image without a label.

    OneFlow's cross-entropy does not: it returns a loss of 0 for them, and the head learns
    nonsense in silence.
    """
    bad = np.flatnonzero((labels < UNLABELLED) | (labels >= n_classes))
    if bad.size:
        raise DatasetError(
            f"{where}: expected labels from 0 to {n_classes - 1} ({n_classes} classes), or -1 "
            f"without a label, found "
            f"{labels[bad[0]]} in row {bad[0]} ({bad.size} such rows); correct the labels or the "
            "class names"
        )


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one role: training, validation or test.

    Parameters
    ----------
    images : Images
        N images; ``images[i]`` is an upright RGB ``PIL.Image.Image``.
    labels : numpy.ndarray
        Integers (N,), in [0, len(class_names)), or -1 without a label; kept as int64.
    class_names : tuple of str
        In label order; empty where nothing is labelled.
    ids : tuple of str
        One per image, unique: the path inside the folder or archive, or
        ``train/00042``.

    Raises
    ------
    DatasetError
        Labels that are no integers, lengths that differ, a label outside the classes, an id
        twice.
    """

    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.images)
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
            raise DatasetError(
                f"split: expected each id once, found {one_line(repr(twice))} more than once"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray) -> Split:
        """Return the split of these rows, in this order."""
        return Split(
            self.images.take(rows),
            self.labels[rows],
            self.class_names,
            tuple(self.ids[row] for row in rows),
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the images' bytes, labels, ids and class names, in order."""
        return self.digest_with(silent)

    def digest_with(self, on_hashed: OnHashed, on_error: OnError = "fail") -> str:
        """Return `digest`; where it has yet to be made, ``on_hashed`` hears how many are.

        With ``"skip"``, a file that cannot be read counts by its name.
        """
        if "_digest" not in self.__dict__:
            digest = hashlib.sha256()
            digest.update(json.dumps([list(self.class_names), list(self.ids)]).encode())
            digest.update(self.labels.astype("<i8").tobytes())
            self.images.update_digest(digest, on_hashed, on_error)
            self.__dict__["_digest"] = digest.hexdigest()
        return str(self.__dict__["_digest"])


class Division:
    """An undivided data set of files, which are hashed when a side is asked for."""

    def __init__(self, whole: Split) -> None:
        self.whole = whole
        self._sides: dict[str, Split] | None = None

    def side(self, role: str, on_hashed: OnHashed = silent, on_error: OnError = "fail") -> Split:
        """Return the images of ``"train"`` or ``"test"``; with "skip" also unreadable ones."""
        if self._sides is None:
            images = self.whole.images
            assert isinstance(images, FileImages)
            if not images.hashes:
                images.update_digest(hashlib.sha256(), on_hashed, on_error)
            hashes = np.frombuffer(bytes(images.hashes), np.uint8).reshape(-1, HASH_BYTES)
            is_test = drawn_sides(hashes)
            rows = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
            self._sides = {name: self.whole.take(taken) for name, taken in rows.items()}
        return self._sides[role]


class DrawnSplit(Split):
    """One side of an undivided data set; only its classes are known before it is hashed."""

    def __init__(self, division: Division, role: str) -> None:
        object.__setattr__(self, "class_names", division.whole.class_names)
        object.__setattr__(self, "division", division)
        object.__setattr__(self, "_role", role)

    division: Division
    _role: str

    @cached_property
    def images(self) -> Images:
        """Its images."""
        return self.division.side(self._role).images

    @cached_property
    def labels(self) -> np.ndarray:
        """Their labels."""
        return self.division.side(self._role).labels

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Their ids."""
        return self.division.side(self._role).ids


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training, perhaps a validation, and a test split over the same classes.

    Parameters
    ----------
    name : str
        As files are named after it: letters, digits, ``.``, ``_``, ``-``.
    train, test : Split
        Disjoint images; one of the two may be empty.
    source : str
        Where the images came from and how they were split, for a person.
    notes : tuple of str
        One sentence each on files that were left out.
    path : str, optional
        The path or URL as it was given; None for named data sets and those from arrays.
    val : Split, optional
        More images, to choose options by.
    divided_by : str
        What divided the images: ``"given"`` roles, their ``"content"`` (`undivided_dataset`), or
        the ``"group"`` that each belongs to.
    table : Table, optional
        What a table says of the images, a row for each of ``table_ids``.
    table_ids : tuple of str
        The ids of the rows.

    Raises
    ------
    DatasetError
        Such a name cannot be a file's, or there is no image at all.
    """

    name: str
    train: Split
    test: Split
    source: str
    notes: tuple[str, ...] = ()
    path: str | None = None
    val: Split | None = None
    divided_by: str = "given"
    table: Table | None = None
    table_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name):
            raise DatasetError(
                f"data set name: expected 1 to 100 letters, digits, '.', '_', '-', found "
                f"{self.name!r}; give it another"
            )
        if not any(map(len, self.listed())):
            raise DatasetError(f"{self.name}: expected at least one image, found none; add images")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order; none where nothing is labelled."""
        return self.train.class_names

    @property
    def undivided(self) -> Division | None:
        """The division where all images have the side that their content decides."""
        if isinstance(self.train, DrawnSplit) and isinstance(self.test, DrawnSplit):
            return self.train.division
        return None

    def listed(self) -> Sequence[Split]:
        """Return the splits, or all images of an undivided data set, of which none is read."""
        division = self.undivided
        return [split for _, split in self.splits()] if division is None else [division.whole]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the splits' digests."""
        return dataset_digest(*(split.digest for _, split in self.splits()))

    def digest_with(self, on_progress: OnProgress, on_error: OnError = "fail") -> str:
        """Return `digest`; where it has yet to be made, ``on_progress`` hears how far it is.

        With ``"skip"``, a file that cannot be read counts by its name, and is left to whoever
        decodes it to tell of.
        """
        begin, total = 0, sum(map(len, self.listed()))

        def heard(done: int) -> None:
            on_progress(Progress("hash images", begin + done, total))

        if self.undivided:
            self.undivided.side("train", heard, on_error)
            return self.digest
        for split in self.listed():
            split.digest_with(heard, on_error)
            begin += len(split)
        return self.digest

    def limited(self, train: int | None, test: int | None) -> Dataset:
        """Return a stratified part: so many images of each split, all where None.

        The draw is the one that `featcache.probe` and `featcache.finetune` limit themselves
        by. A number that leaves a class without an image is a DatasetError.
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
        """Return ("train", split), ("val", split) where there is one, and ("test", split)."""
        val = () if self.val is None else (("val", self.val),)
        return (("train", self.train), *val, ("test", self.test))


def undivided_dataset(name: str, whole: Split, source: str, notes: tuple[str, ...] = ()) -> Dataset:
    """Return a data set without a given split: the content of each image decides its side."""
    division = Division(whole)
    train, test = DrawnSplit(division, "train"), DrawnSplit(division, "test")
    return Dataset(name, train, test, source, notes, divided_by="content")


def listing_digest(dataset: Dataset) -> str:
    """Return SHA-256 (hex) of the names, labels and classes of a data set, no file read."""
    return dataset_digest(
        *(
            split_digest(split.class_names, split.ids, [split.labels], ())
            for split in dataset.listed()
        )
    )


def split_digest(
    class_names: Sequence[str],
    ids: Iterable[str],
    labels: Iterable[np.ndarray],
    hashes: Iterable[np.ndarray],
) -> str:
    """Return `Split.digest` of a split of files, made of its parts one after the other.

    Labels are arrays of integers, hashes are uint8 (any, 32), all in the order of the ids.
    """
    digest = hashlib.sha256()
    # The JSON of [class names, ids], without the list of all ids in memory.
    digest.update(f"[{json.dumps(list(class_names))}, [".encode())
    names, separator = iter(ids), ""
    while part_of_ids := list(islice(names, _IDS_AT_ONCE)):
        digest.update(f"{separator}{json.dumps(part_of_ids)[1:-1]}".encode())
        separator = ", "
    digest.update(b"]]")
    for part in labels:
        digest.update(part.astype("<i8").tobytes())
    for part in hashes:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def dataset_digest(*splits: str) -> str:
    """Return `Dataset.digest` of the digests of train, perhaps val, and test."""
    return hashlib.sha256("\n".join(splits).encode()).hexdigest()
