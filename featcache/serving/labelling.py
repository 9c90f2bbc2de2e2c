"""Labelling with a head that learns meanwhile: which image next, corrections, and the curve.

Suspects of the audit come first, images without a label in between, then those that the head is
least sure of. The head is trained again in a thread whenever labels changed; what changes meanwhile
is for the next time. Only training images are shown. The curve is the accuracy on val; without one
that of cross-validation, by the labels as they are now: it also rises because fewer of the labels
that it is measured by are wrong, and ends near the truth. Test images play no part.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..auditing.duplicates import Neighbours
from ..auditing.labels import (
    Heads,
    doubts,
    fit_heads,
    fold_numbers,
    probabilities_of,
    reference_of,
    with_neighbours,
)
from ..auditing.selection import margins_of
from ..errors import CacheMismatchError, DatasetError, FeatcacheError, one_line
from ..metrics import top1, wilson_interval
from ..probes.blocks import Rows
from ..probes.head import Head
from ..probes.knn import nearest
from ..probes.scaling import unit_length
from ..process import new_threads_ignore_ctrl_c
from ..progress import Progress
from .cached import Cached
from .corrections import Corrections

_FOLDS, _SEED, _NEIGHBOURS = 5, 0, 10
_LEASE_S = 60.0  # an image that one browser shows is not shown to another
_LIKELY = 9  # classes named with an image


@dataclass(frozen=True)
class Item:
    """An image to look at.

    Parameters
    ----------
    id : str
        Its name in the cache.
    row : int
        In the training split.
    label : str or None
        At present.
    suggested : str or None
        The likeliest class; None before the first training.
    probability : float or None
        Of that class, by a head that was not trained on this image, and its neighbours.
    likely : tuple of (str, float)
        The likeliest classes.
    why : str
        ``"suspect"``, ``"unlabelled"`` or ``"uncertain"``.
    version : int
        Of its label; a correction names the one that it is based on.
    """

    id: str
    row: int
    label: str | None
    suggested: str | None
    probability: float | None
    likely: tuple[tuple[str, float], ...]
    why: str
    version: int


@dataclass(frozen=True)
class Point:
    """The accuracy of the head after so many corrections, with a 95 % interval."""

    n_corrected: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a training brought: heads, probabilities (N, P) of the P classes present, the order.

    ``order`` int64 (N,) has the rows as they come up: of those in ``why`` first.
    """

    heads: Heads
    classes: np.ndarray
    probabilities: np.ndarray
    order: np.ndarray
    why: Mapping[int, str]


class _ClosedError(Exception):
    """Ends a training early."""


class Labelling:
    """A labelling session: several browsers, one table, one head that learns.

    All methods may be called from any thread.

    Parameters
    ----------
    cached : Cached
        The features; only its training images are labelled.
    head : Head
        A head of classes on such features: it says which classes there are.
    table : str or Path
        The CSV file of the labels, which is made where there is none; see `Corrections`.
    clock : callable
        Seconds, for tests.

    Attributes
    ----------
    newest : tuple of Head and Point or None
        The given head until somebody has corrected a label; then what was learnt last.

    Raises
    ------
    CacheMismatchError
        The head lacks a class of the cache.
    DatasetError
        No training images.
    TableError, OutputError
        As of `Corrections`.
    """

    def __init__(
        self,
        cached: Cached,
        head: Head,
        table: str | Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not cached.ids["train"]:
            raise DatasetError(f"{cached.path}: expected training images, found none")
        self._path, self.classes = cached.path, head.class_names
        self.newest: tuple[Head, Point | None] = head, None
        numbers = self._numbers(cached)
        scaled = unit_length if head.scaling == "l2" else np.asarray
        self._features = scaled(cached.features["train"])
        self._val = scaled(cached.features["val"]) if "val" in numbers else None
        self._val_labels = numbers.get("val")
        self._ids = cached.ids["train"]
        self._rows = {id_: row for row, id_ in enumerate(self._ids)}
        self._clock = clock
        self._neighbours: Neighbours | None = None

        known: dict[str, str | None] = {}
        for role, of_split in numbers.items():
            texts = [self.classes[number] if number >= 0 else None for number in of_split.tolist()]
            known = dict(zip(cached.ids[role], texts, strict=True)) | known
        self._corrections = Corrections(table, known)
        try:
            self._first = self._labels_now(first=True)
            self._labels = self._labels_now()
        except BaseException:
            self._corrections.close()
            raise
        self._n_labelled = int((self._labels >= 0).sum())
        self._n_changed = int((self._labels != self._first).sum())
        self._folds = fold_numbers(self._first + 1, _FOLDS, _SEED)
        corrected = (self._rows.get(id_) for id_ in self._corrections.corrected)
        self._reviewed = {row for row in corrected if row is not None}
        self._skipped: set[int] = set()
        self._left: set[int] = set()  # suspects and unlabelled that nobody has seen
        self._past = 0  # so many of the order were seen
        self._leases: dict[int, tuple[str, float]] = {}
        self.learnt: Learnt | None = None
        self._curve: list[Point] = []
        self._problem = ""
        self._changed = threading.Condition()  # also the lock of everything above
        self._n_changes, self._n_known, self._training = 1, 0, False
        self._closing = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Labelling:
        """Train in the background until the block ends."""
        with new_threads_ignore_ctrl_c():
            self._thread = threading.Thread(target=self._keep_learning, name="labelling")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop training, and let another process have the table."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._corrections.close()

    def next(self, browser: str, skip: str | None = None) -> Item | None:
        """Return the next image for a browser, None if there is none (yet).

        It stays with the browser for a minute: another one gets another image. ``skip`` is an id
        that is not to be shown again.
        """
        with self._changed:
            if skip is not None:
                row = self._row(skip)
                self._skipped.add(row)
                self._left.discard(row)
                self._leases.pop(row, None)
            if self.learnt is None:
                return None
            order, now = self.learnt.order, self._clock()
            while self._past < len(order) and self._is_seen(int(order[self._past])):
                self._past += 1
            for place in range(self._past, len(order)):
                row = int(order[place])
                holder, until = self._leases.get(row, ("", 0.0))
                if not self._is_seen(row) and (holder in ("", browser) or until <= now):
                    self._leases[row] = browser, now + _LEASE_S
                    return self._item(row, self.learnt.why.get(row, "uncertain"))
            return None

    def _is_seen(self, row: int) -> bool:
        return row in self._reviewed or row in self._skipped

    def correct(self, id_: str, label: str, version: int) -> tuple[bool, Item]:
        """Give an image a label, or confirm the one it has, and return its present state.

        False, and nothing is changed, where somebody else was faster: the version is not the
        present one. When it returns, the label is on the disk.
        """
        if label not in self.classes:
            raise DatasetError(
                f"label: expected a class of the head, found {one_line(repr(label))}"
            )
        with self._changed:
            row = self._row(id_)
            if version != self._corrections.version(id_):
                return False, self._item(row)
            self._corrections.correct(id_, label)
            self._after_change(row)
            return True, self._item(row)

    def undo(self, id_: str, version: int) -> tuple[bool, Item]:
        """Take an image's last correction back, unless somebody else was faster, as `correct`."""
        with self._changed:
            row = self._row(id_)
            if version != self._corrections.version(id_) or not self._corrections.undo(id_):
                return False, self._item(row)
            self._after_change(row)
            return True, self._item(row)

    def state(self) -> dict[str, Any]:
        """Return what a page shows, as JSON."""
        with self._changed:
            return {
                "classes": list(self.classes),
                "n_images": len(self._ids),
                "n_reviewed": len(self._reviewed),
                "n_changed": self._n_changed,
                "n_left": len(self._left),
                "ready": self.learnt is not None,
                "training": self._training or self._n_known < self._n_changes,
                **self.holdout(),
                "curve": [vars(point) for point in self._curve],
                "problem": self._problem or None,
            }

    def holdout(self) -> dict[str, Any]:
        """Return what the curve is measured on, as JSON."""
        if self._val_labels is None:
            return {"holdout": "cross-validation", "n_holdout": self._n_labelled}
        return {"holdout": "val", "n_holdout": int((self._val_labels >= 0).sum())}

    def to_keep(self) -> str:
        """Return the command that makes a head of what was learnt; nothing before a correction."""
        if not self._reviewed:
            return ""
        parts = ("featcache", "probe", self._path, "--labels", self._corrections.path)
        return shlex.join(map(str, (*parts, "--save-head", "better.safetensors")))

    def learn(self) -> None:
        """Train on the labels as they are now, and put the images in a new order."""
        with self._changed:
            labels, n_changes = self._labels.copy(), self._n_changes
            n_corrected, before = len(self._reviewed), self.learnt
            self._training = True
        learnt, point, problem = before, None, ""
        try:
            learnt, point = self._trained(labels, before, n_corrected)
        except FeatcacheError as error:
            problem = str(error)
        finally:
            with self._changed:
                self._training = False
        with self._changed:
            self.learnt, self._problem, self._n_known = learnt, problem, n_changes
            if learnt is not None and learnt is not before:
                self._past = 0
                self._left = {row for row in learnt.why if not self._is_seen(row)}
                if n_corrected:
                    self.newest = self._head_of(learnt), point
            if point is not None:
                self._curve = [one for one in self._curve if one.n_corrected != n_corrected]
                self._curve.append(point)
            self._changed.notify_all()

    def settled(self, timeout: float | None = None) -> bool:
        """Wait until the head knows every correction."""
        with self._changed:
            return self._changed.wait_for(lambda: self._n_known == self._n_changes, timeout)

    def _keep_learning(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._n_known < self._n_changes)
                if self._closing:
                    return
                before = self._n_changes
            try:
                self.learn()
                if self._neighbours is None and self.learnt is not None:
                    self.find_neighbours()
            except _ClosedError:
                return
            except Exception as error:  # the thread must go on, and the page say what happened
                with self._changed:
                    self._problem = f"training failed ({type(error).__name__})"
                    self._n_known = before

    def find_neighbours(self) -> None:
        """Find each image's neighbours, once; their votes count from the next training on."""
        count = min(_NEIGHBOURS, len(self._ids) - 1)
        found = nearest(
            self._features, self._features, count, exclude_self=True, on_progress=self._report
        )
        with self._changed:
            self._neighbours = Neighbours(*found)
            self._n_changes += 1

    def _report(self, _: Progress) -> None:
        if self._closing:
            raise _ClosedError

    def _trained(
        self, labels: np.ndarray, before: Learnt | None, n_corrected: int
    ) -> tuple[Learnt, Point | None]:
        rows = np.flatnonzero(labels >= 0)
        classes, given = np.unique(labels[rows], return_inverse=True)
        if len(classes) < 2:
            raise DatasetError(f"expected labels of at least 2 classes, found {len(classes)}")
        others = np.flatnonzero(labels < 0)
        same = before is not None and np.array_equal(before.classes, classes)
        heads = fit_heads(
            Rows(self._features, rows),
            given,
            Rows(self._features, others),
            _FOLDS,
            _SEED,
            self._report,
            numbers=self._folds[rows],
            start=before.heads if before is not None and same else None,
        )
        probabilities = np.empty((len(labels), len(classes)))
        probabilities[rows], probabilities[others] = heads.train, heads.test
        point = self._point(heads, classes, probabilities, labels, n_corrected)
        if self._neighbours is not None:
            columns = np.full(len(labels), -1)
            columns[rows] = given
            near = self._neighbours
            probabilities = with_neighbours(probabilities, near.similarity, columns[near.rows])
        order, why = _order(probabilities, rows, given, others)
        return Learnt(heads, classes, probabilities.astype(np.float32), order, why), point

    def _head_of(self, learnt: Learnt) -> Head:
        whole = learnt.heads.whole
        return replace(
            self.newest[0],
            weight=whole.weight.astype(np.float32),
            bias=whole.bias.astype(np.float32),
            class_names=tuple(self.classes[number] for number in learnt.classes.tolist()),
        )

    def _point(
        self,
        heads: Heads,
        classes: np.ndarray,
        probabilities: np.ndarray,
        labels: np.ndarray,
        n_corrected: int,
    ) -> Point | None:
        if self._val is not None and self._val_labels is not None:
            labels, probabilities = self._val_labels, probabilities_of(heads.whole, self._val)
        judged = (labels >= 0) & ~np.isnan(probabilities).any(axis=1)
        if not judged.any():
            return None
        accuracy = top1(classes[probabilities[judged].argmax(axis=1)], labels[judged])
        return Point(n_corrected, accuracy, *wilson_interval(accuracy, int(judged.sum())))

    def _after_change(self, row: int) -> None:
        label, time_ = self._corrections.state(self._ids[row])
        before, now = self._labels[row], -1 if label is None else self.classes.index(label)
        self._labels[row] = now
        self._n_labelled += int(now >= 0) - int(before >= 0)
        self._n_changed += int(now != self._first[row]) - int(before != self._first[row])
        (self._reviewed.add if time_ else self._reviewed.discard)(row)
        self._skipped.discard(row)
        self._leases.pop(row, None)
        if time_:
            self._left.discard(row)
        else:  # it comes up again
            self._past = 0
            self._left |= {row} & (self.learnt.why if self.learnt else {}).keys()
        self._n_changes += 1
        self._changed.notify_all()

    def _item(self, row: int, why: str = "") -> Item:
        id_, learnt = self._ids[row], self.learnt
        likely: tuple[tuple[str, float], ...] = ()
        if learnt is not None and not np.isnan(learnt.probabilities[row]).any():
            of_row = learnt.probabilities[row]
            best = np.argsort(-of_row, kind="stable")[:_LIKELY].tolist()
            likely = tuple(
                (self.classes[learnt.classes[number]], float(of_row[number])) for number in best
            )
        return Item(
            id=id_,
            row=row,
            label=self._corrections.state(id_)[0],
            suggested=likely[0][0] if likely else None,
            probability=likely[0][1] if likely else None,
            likely=likely,
            why=why,
            version=self._corrections.version(id_),
        )

    def _row(self, id_: str) -> int:
        if id_ not in self._rows:
            raise DatasetError(f"id: expected a training image, found {one_line(repr(id_))}")
        return self._rows[id_]

    def _numbers(self, cached: Cached) -> dict[str, np.ndarray]:
        """Return each split's labels as classes of the head, int64 (N,), -1 for none."""
        known = {name: number for number, name in enumerate(self.classes)}
        numbers = np.array([*(known.get(name, -2) for name in cached.class_names), -1])
        found = {role: numbers[labels] for role, labels in cached.labels.items()}
        for role, of_split in found.items():
            if (of_split == -2).any():
                name = cached.class_names[cached.labels[role][int((of_split == -2).argmax())]]
                raise CacheMismatchError(
                    f"{cached.path}: expected classes of the head, found {one_line(repr(name))}; "
                    "give a head that was trained on this cache"
                )
        return found

    def _labels_now(self, first: bool = False) -> np.ndarray:
        known = {name: number for number, name in enumerate(self.classes)} | {None: -1}
        labels = np.empty(len(self._ids), np.int64)
        for row, id_ in enumerate(self._ids):
            label = self._corrections.first[id_] if first else self._corrections.state(id_)[0]
            if label not in known:
                raise CacheMismatchError(
                    f"{self._corrections.name}: expected classes of the head, found "
                    f"{one_line(repr(label))} of {one_line(repr(id_))}; correct the table, or "
                    "name another"
                )
            labels[row] = known[label]
        return labels


def _order(
    probabilities: np.ndarray, rows: np.ndarray, given: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the rows as they come up, suspects and unlabelled in turn first, and why these do."""
    labelled = probabilities[rows]
    suspects = rows[doubts(labelled, given, reference_of(labelled, given)).rows]
    margins = margins_of(np.nan_to_num(probabilities, nan=-1.0))
    by_margin = np.argsort(margins, kind="stable")
    unlabelled = by_margin[np.isin(by_margin, others)]
    turns = np.concatenate([np.arange(len(suspects)), np.arange(len(unlabelled)) + 0.5])
    first = np.concatenate([suspects, unlabelled])[np.argsort(turns)]
    why = dict.fromkeys(suspects.tolist(), "suspect")
    why |= dict.fromkeys(unlabelled.tolist(), "unlabelled")
    return np.concatenate([first, by_margin[np.isin(by_margin, first, invert=True)]]), why
