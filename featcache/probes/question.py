"""A question to a cache: which column is asked, of which images, on which side each of them is.

Features belong to images. What is asked of them may change: `Question` names the columns of a
table, and `ask` returns the features and targets of each side. Without a question the target is
the cache's own labels, on its own splits, and no feature is copied.

*Cache rows* number the images of all splits, in the order train, val, test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, DatasetError, RecipeError, TableError, one_line
from ..options import check_choice
from ..sampling import LIMIT_SEED, drawn_sides, stratified_rows, text_hashes
from ..store.cache import Cache, CachedSplit, load, newest_cache
from ..store.copies import hash_numbers, n_copied
from ..store.format import ROLE_WORDS, ROLES
from ..tables.joining import join
from ..tables.reading import read_table
from ..tables.table import Table, listed
from ..tables.target import Target, read_target
from ..tables.where import rows_where
from .blocks import Features, Rows, Stacked, each_block

TASKS = ("auto", "classification", "multilabel", "regression")
_TRAIN, _VAL, _TEST = range(3)  # places in ROLES
_NOWHERE, _UNKNOWN = -1, -2
_DRAWN = ("content", "group", "id")  # what draws the sides of a data set without given splits
_LISTED = 5


@dataclass(frozen=True)
class Question:
    """What to ask of the images of a cache; without any of these, the cache's own labels.

    Parameters
    ----------
    target : str or sequence of str, optional
        The column to predict, or several; also as ``"a,b"``.
    task : str
        ``"auto"`` decides by the values, and a note says how: ``"classification"`` for text,
        ``"multilabel"`` for lists and for several columns of 0 and 1, ``"regression"`` for
        numbers.
    separator : str, optional
        Between the labels of one cell, as ``";"`` in ``"cat;dog"``: multi-label.
    labels : str, Path, Table, pandas.DataFrame or pyarrow.Table, optional
        A table to join now, instead of the one attached to the cache.
    by : str, optional
        The column of ``labels`` that names the images; found by its name by default.
    split_column : str, optional
        The column with the side of each image: train, val or test.
    group : str, optional
        The column whose images stay on one side, such as a patient.
    where : str, optional
        Only images for which this holds, such as ``'age >= 40 and site != "B"'``.
    weight_column : str, optional
        The column with the weight of each training image.
    """

    target: str | Sequence[str] | None = None
    task: str = "auto"
    separator: str | None = None
    labels: Any = None
    by: str | None = None
    split_column: str | None = None
    group: str | None = None
    where: str | None = None
    weight_column: str | None = None

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        if self.by is not None and self.labels is None:
            raise RecipeError(
                f"by: expected it with labels, a table to join, found {self.by!r} alone"
            )
        if self.target is None and self.labels is None:
            for name, given in (("task", self.task != "auto"), ("separator", self.separator)):
                if given:
                    raise RecipeError(
                        f"{name}: expected it with a target, found none; the cache's own labels "
                        "are classes"
                    )

    @property
    def needs_table(self) -> bool:
        """Whether anything but the cache's own labels and splits is asked."""
        columns = (self.target, self.split_column, self.group, self.where, self.weight_column)
        return self.labels is not None or any(one is not None for one in columns)

    def record(self) -> dict[str, Any]:
        """Return what was asked, by option, as JSON; empty for the cache's own labels."""
        given = {one.name: getattr(self, one.name) for one in fields(Question)}
        if self.task == "auto":
            del given["task"]
        if not isinstance(self.labels, (str, Path, type(None))):
            given["labels"] = "a table in memory"
        if self.target is not None and not isinstance(self.target, str):
            given["target"] = list(self.target)
        return {
            name: value if isinstance(value, list) else str(value)
            for name, value in given.items()
            if value is not None
        }


def opened(
    cache: str | Path | Cache | None, *, mmap: bool = False, cuts: Sequence[str] = ()
) -> Cache:
    """Return a cache with features (N, D) at these cuts: the given one, or the newest."""
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache(), mmap=mmap)
    cache.check_vectors(cuts)
    if len(cuts) > 1 and mmap:
        raise RecipeError(
            f"cut: expected one with --mmap, found {', '.join(cuts)}, which would be copied side "
            "by side into memory; leave out --mmap"
        )
    return cache


def cut_names(cut: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the cuts that an option names, with commas between; none for the cache's first."""
    if cut is None:
        return ()
    words = cut.split(",") if isinstance(cut, str) else cut
    names = tuple(word.strip() for word in words)
    if not names or "" in names or len(set(names)) < len(names):
        raise RecipeError(f"cut: expected names, each once, found {cut!r}; try --cut cls,mean")
    return names


@dataclass(frozen=True, eq=False)
class Part:
    """One side of a question: n images whose target is known, in ascending cache ``rows``.

    ``views`` are features (n, D), the cache's own arrays where they are a whole split. ``labels``
    are int64 (n,) of classes; int8 (n, L) of labels, -1 where missing; float64 (n, T) of numbers,
    NaN where missing. ``groups`` int64 (n,) and ``weights`` float64 (n,) are there where they were
    asked for. ``n_unlabelled`` images of this side have no target and are left out.
    """

    views: list[Features]
    labels: np.ndarray
    rows: np.ndarray
    cache: Cache = field(repr=False)
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None
    n_unlabelled: int = 0

    def __len__(self) -> int:
        """Return n."""
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> Part:
        """Return some of the images, int64 positions, without copying their features."""
        return replace(
            self,
            views=[Rows(features, chosen) for features in self.views],
            labels=self.labels[chosen],
            rows=self.rows[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            weights=None if self.weights is None else self.weights[chosen],
        )

    @cached_property
    def ids(self) -> list[str]:
        """Name of each image."""
        names = [name for _, split in self.cache.splits() for name in split.ids]
        return [names[row] for row in self.rows.tolist()]


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with the images that answer it.

    ``task`` is ``"classes"``, ``"labels"`` or ``"numbers"``; images of ``val`` choose a penalty.
    ``describes`` is the question in JSON: target, task, split, group, where and table.
    """

    task: str
    names: tuple[str, ...]
    train: Part
    val: Part | None
    test: Part
    notes: tuple[str, ...]
    describes: dict[str, Any]

    @property
    def n_unlabelled(self) -> int:
        """Images of all sides that are left out, without a target."""
        return sum(part.n_unlabelled for part in (self.train, self.val, self.test) if part)

    def only_classes(self, verb: str) -> Asked:
        """Return the question, or raise RecipeError where its target is not classes."""
        if self.task != "classes":
            raise RecipeError(
                f"{verb}: expected classes, found {self.task} in {self.describes['target']}; give "
                "another --target, or --task classification"
            )
        return self


def ask(
    cache: Cache,
    question: Question | None = None,
    *,
    views: Sequence[str] = ("identity",),
    cuts: Sequence[str] = (),
    train_limit: int | None = None,
    test_limit: int | None = None,
    test_cache: Cache | None = None,
    together: bool | None = False,
) -> Asked:
    """Return the images of each side whose target is known, without copying their features.

    Several ``cuts`` stand side by side, copied; none are the cache's first. ``views`` are those of
    training images; where some of these come from a split without flip views, only
    ``"identity"``. A limit draws a stratified sample of that size, always the same.
    ``together``, for cross-validation, puts all images into ``train``; None only where no image is
    in test. Raises TableError for a table, column or expression that does not fit, or a group on
    both sides of a given split; DatasetError without labelled images on a side or two classes to
    learn from; and CacheCorruptError for features that are not finite.
    """
    question = question or Question()
    if test_cache is not None and question.needs_table:
        raise RecipeError(
            "test: expected no other question with a test cache, found one of its own table; "
            "merge the caches and give a split column"
        )
    answers = _answers(cache, question)
    sides, split, notes = _sides(cache, question, answers, bool(together))
    if together is None and not (sides == _TEST).any():
        together = True
        sides, split, notes = _sides(cache, question, answers, True)
    images = _Images(cache, answers, cuts)
    train = images.part(sides == _TRAIN, "train", views, train_limit)
    if len(train.views) < len(views):
        notes.append("flip views are not used: not all training images have them")
    if question.weight_column is not None:
        _check_weights(cache, question.weight_column, train)
    target = answers.target
    if target.task == "classes":
        class_counts(cache, train.labels, len(target.names))
    val = images.part(sides == _VAL, "val")
    if val.n_unlabelled:
        notes.append(f"{val.n_unlabelled:,} val images without a label are left out")
    if together:
        test = images.part(np.zeros(len(sides), bool), "")
        train, copied = _with_copies_together(train)
        notes += copied
    elif test_cache is None:
        test = images.part(sides == _TEST, "test", limit=test_limit)
    else:
        test = own_test_images(test_cache, cuts=cuts, limit=test_limit)
    notes += _warnings(target, train, test)
    return Asked(
        target.task,
        target.names,
        train,
        val if len(val) else None,
        test,
        (*answers.notes, *notes),
        {
            "target": target.name or None,
            "task": target.task,
            "split": split,
            "group": question.group,
            "where": question.where,
            "table": answers.table.source if answers.table else None,
        },
    )


def own_test_images(cache: Cache, *, cuts: Sequence[str] = (), limit: int | None = None) -> Part:
    """Return the images of the test split that have one of the cache's own labels."""
    answers = _answers(cache, Question())
    sides, _, _ = _sides(cache, Question(), answers, False)
    return _Images(cache, answers, cuts).part(sides == _TEST, "test", limit=limit)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """The training images of a question: those with a class, if any, and those without.

    ``rows`` int64 (n,) are the cache rows of images without one, ascending, ``features`` (n, D)
    theirs.
    """

    names: tuple[str, ...]
    labelled: Part
    rows: np.ndarray
    features: Features


def unlabelled(cache: Cache, question: Question) -> Unlabelled:
    """Return the training images without a class, as `ask` returns those with one.

    Raises as `ask`; DatasetError where every training image has a class.
    """
    answers = _answers(cache, question)
    target = answers.target
    if target.task != "classes":
        raise RecipeError(
            f"target: expected classes, found {target.task} in {target.name}; give another "
            "--target, or --task classification"
        )
    sides, _, _ = _sides(cache, question, answers, False)
    images = _Images(cache, answers, ())
    rows = answers.rows[(sides == _TRAIN) & target.missing]
    if not len(rows):
        raise DatasetError(
            f"{cache.path}: expected training images without a class, found that all "
            f"{(sides == _TRAIN).sum():,} have one; name a column with missing values with --target"
        )
    return Unlabelled(
        target.names,
        images.part(sides == _TRAIN, ""),
        rows,
        images.features(rows, "identity"),
    )


@dataclass(frozen=True, eq=False)
class _Answers:
    """What is known about the images that a question is about: n of them, in cache rows."""

    rows: np.ndarray  # int64 (n,)
    target: Target
    table: Table | None  # of these rows
    groups: np.ndarray | None
    weights: np.ndarray | None
    notes: tuple[str, ...]


def _answers(cache: Cache, question: Question) -> _Answers:
    """Read the table, keep the rows that are asked about, and read their target."""
    labels = np.concatenate([split.labels for _, split in cache.splits()])
    own = Target("", "classes", labels, cache.class_names, "")
    rows = np.arange(len(labels))
    if not question.needs_table:
        return _Answers(rows, own, None, None, None, ())
    table, key, notes = _table(cache, question)
    if question.where is not None:
        rows = np.flatnonzero(rows_where(table, question.where))
        if not len(rows):
            raise TableError(
                f"{table.source}: expected images where {one_line(question.where)}, found none of "
                f"{len(labels):,}; give another --where"
            )
        table = table.take(rows)
    columns = _target_columns(table, question, key)
    if columns:
        target = read_target(table, columns, task=question.task, separator=question.separator)
        notes += (target.note,) * bool(target.note)
    else:
        target = replace(own, values=labels[rows])
    groups = None
    if question.group is not None:
        names = table[question.group].texts()
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        groups = np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))
        # An image without a group is a group of its own.
        alone = table[question.group].missing
        groups[alone] = -1 - np.arange(alone.sum())
        if alone.any():
            without = f"{alone.sum():,} images without a {one_line(question.group)}"
            notes += (f"{without} are each a group of their own",)
    weights = None if question.weight_column is None else _numbers(table, question.weight_column)
    return _Answers(rows, target, table, groups, weights, notes)


def _table(cache: Cache, question: Question) -> tuple[Table, str, tuple[str, ...]]:
    """Return a table with a row for each cache row, its key column, and notes of the join."""
    if question.labels is None:
        table = cache.table
        if table is None:
            raise TableError(
                f"{cache.path}: expected a table with the columns that are asked, found none; "
                f"attach one with featcache label {cache.path} table.csv, or give --labels"
            )
        return table, "", ()
    table = read_table(question.labels)
    joined = join(
        table,
        [name for _, split in cache.splits() for name in split.ids],
        _content_hashes(cache),
        by=question.by,
        dataset_path=cache.meta.get("dataset_path"),
    )
    return table.take(joined.rows), joined.column, joined.notes


def _target_columns(table: Table, question: Question, key: str) -> list[str]:
    """Return the names of the target's columns, none for the cache's own labels."""
    if question.target is None:
        if question.labels is None:
            return []
        others = (question.split_column, question.group, question.weight_column)
        left = [name for name in table.columns if name not in (key, *others)]
        if "label" in left:
            left = ["label"]
        if len(left) > 1:
            raise TableError(
                f"{table.source}: expected the column to predict, found {listed(left, _LISTED)}; "
                "name it with --target"
            )
        return left
    given = [question.target] if isinstance(question.target, str) else list(question.target)
    # A column's name may itself contain commas.
    names = [
        name
        for one in given
        for name in ([one] if one in table.columns else map(str.strip, one.split(",")))
    ]
    if not names or "" in names or len(set(names)) < len(names):
        raise RecipeError(
            f"target: expected names of columns, each once, found {question.target!r}"
        )
    return names


def _numbers(table: Table, name: str) -> np.ndarray:
    """Return a column as float64 (n,), NaN where missing."""
    numbers = table[name].numbers()
    if numbers is None:
        raise TableError(f"{table.source}: expected numbers in the column {name!r}, found others")
    return numbers


def _sides(
    cache: Cache, question: Question, answers: _Answers, together: bool
) -> tuple[np.ndarray, str, list[str]]:
    """Return the side of each image, int8 (n,): a place in ROLES, or -1; whence, and notes."""
    lengths = {role: len(split.labels) for role, split in cache.splits()}
    own = np.repeat([ROLES.index(role) for role in lengths], list(lengths.values()))
    sides = own.astype(np.int8)[answers.rows]
    if together:
        return np.full_like(sides, _TRAIN), "folds", []
    if question.split_column is not None:
        assert answers.table is not None
        sides, notes = _column_sides(answers.table, question.split_column)
        split = f"column {question.split_column}"
    else:
        found = cache.meta.get("split")
        split, notes = str(found) if found in _DRAWN else "given", []
    if question.group is None or answers.groups is None or answers.table is None:
        return sides, split, notes
    if split in _DRAWN:
        grouped = np.flatnonzero(answers.groups >= 0)
        _, first, of_group = np.unique(
            answers.groups[grouped], return_index=True, return_inverse=True
        )
        names = answers.table[question.group].texts()[grouped[first]]
        is_test = drawn_sides(text_hashes(names.tolist()))[of_group]
        sides[grouped] = np.where(is_test, _TEST, _TRAIN)
        return sides, "group", notes
    _check_groups(cache, question.group, answers, sides)
    return sides, split, notes


def _column_sides(table: Table, name: str) -> tuple[np.ndarray, list[str]]:
    """Read the sides of a split column, and count the images that have none."""
    texts = table[name].texts()
    words = {"": _NOWHERE, **ROLE_WORDS}
    read: dict[str, int] = {
        text: words.get(text.strip().lower(), _UNKNOWN) for text in set(texts) - {None}
    }
    unknown = sorted(text for text, side in read.items() if side == _UNKNOWN)
    if unknown:
        raise TableError(
            f"{table.source}: expected train, val or test in the split column {name!r}, found "
            f"{listed(unknown, _LISTED)}; correct them, or cross-validate with --cv"
        )
    of_rows = (_NOWHERE if text is None else read[text] for text in texts)
    sides = np.fromiter(of_rows, np.int8, len(texts))
    n_left = int((sides == _NOWHERE).sum())
    left = f"{n_left:,} images without a side in the column {one_line(name)} are left out"
    return sides, [left] * bool(n_left)


def _check_groups(cache: Cache, group: str, answers: _Answers, sides: np.ndarray) -> None:
    """Refuse a group whose images are on several sides of a given split."""
    groups = answers.groups
    assert groups is not None and answers.table is not None
    used = np.flatnonzero((sides != _NOWHERE) & (groups >= 0) & ~answers.target.missing)
    pairs = np.unique(groups[used] * len(ROLES) + sides[used]) // len(ROLES)
    numbers, n_sides = np.unique(pairs, return_counts=True)
    both = numbers[n_sides > 1]
    if not len(both):
        return
    names = answers.table[group].texts()
    _, first = np.unique(groups[used], return_index=True)
    found = names[used[first[n_sides > 1]]]
    raise TableError(
        f"{cache.path}: expected the images of each {group!r} on one side of the split, found "
        f"{len(both):,} of {len(numbers):,} on several: {listed(found, _LISTED)}; "
        f"cross-validate with --cv 5 --group {one_line(group)}, or give another --split-column"
    )


class _Images:
    """The images of a cache and what is known about them; a split is read when first needed."""

    def __init__(self, cache: Cache, answers: _Answers, cuts: Sequence[str]) -> None:
        self._cache = cache
        self._answers = answers
        self._cuts = cuts
        self._splits = cache.splits()
        self._ends = np.cumsum([len(split.labels) for _, split in self._splits])
        self._read: dict[tuple[str, str], Any] = {}

    def part(
        self,
        on_side: np.ndarray,
        role: str,
        views: Sequence[str] = ("identity",),
        limit: int | None = None,
    ) -> Part:
        """Return the images of a side, bool (n,), whose target is known."""
        answers, values = self._answers, self._answers.target.values
        chosen = np.flatnonzero(on_side & ~answers.target.missing)
        n_unlabelled = int(on_side.sum()) - len(chosen)
        if not len(chosen) and role in ("train", "test"):
            raise self._nothing(role, n_unlabelled)
        if limit is not None and answers.target.task == "classes":
            chosen = chosen[stratified_rows(values[chosen], limit, LIMIT_SEED, f"cached {role}")]
        elif limit is not None and limit < len(chosen):
            drawn = np.random.default_rng(LIMIT_SEED).choice(len(chosen), limit, replace=False)
            chosen = chosen[np.sort(drawn)]
        rows = answers.rows[chosen]
        if len(rows) and rows[-1] >= self._ends[0]:  # only training images have flip views
            views = ("identity",)
        return Part(
            [self.features(rows, view) for view in views],
            values[chosen],
            rows,
            self._cache,
            None if answers.groups is None else answers.groups[chosen],
            None if answers.weights is None else answers.weights[chosen],
            n_unlabelled,
        )

    def _nothing(self, role: str, n_unlabelled: int) -> DatasetError:
        target, is_asked = self._answers.target, self._answers.table is not None
        rest = f"{n_unlabelled} without a label" if n_unlabelled else "none"
        return DatasetError(
            f"{self._cache.path}: expected labelled {role} images"
            f"{f' of the target {target.name!r}' if target.name else ''}, found {rest}; "
            + (
                "ask for another target, split or --where, or cross-validate with --cv 5"
                if is_asked
                else "attach a table with featcache label and name a column with --target, or "
                f"extract a data set with some in {role}"
            )
        )

    def features(self, rows: np.ndarray, view: str) -> Features:
        """Return features (n, D) of ascending cache rows: a split's own array where it is all."""
        of_split = np.searchsorted(self._ends, rows, "right")
        touched = np.unique(of_split) if len(rows) else np.array([0])
        arrays = [self._array(number, view) for number in touched.tolist()]
        if len(arrays) == 1 and len(rows) == len(arrays[0]):
            whole: Features = arrays[0]
            return whole
        lengths = np.diff(self._ends, prepend=0)
        untouched = np.where(np.isin(np.arange(len(lengths)), touched), 0, lengths)
        places = rows - np.cumsum(untouched)[of_split] if len(rows) else rows
        return Rows(arrays[0] if len(arrays) == 1 else Stacked(arrays), places)

    def _array(self, number: int, view: str) -> Any:
        role, split = self._splits[number]
        if (role, view) not in self._read:
            array = side_by_side(split, self._cuts, view)
            check_finite(self._cache, role, [array])
            self._read[role, view] = array
        return self._read[role, view]


def side_by_side(split: CachedSplit, cuts: Sequence[str], view: str = "identity") -> Any:
    """Return the features (N, D) of these cuts, copied if several; of the first cut if none."""
    if not cuts:
        return split.view(view)
    parts = [split.cut(cut, view) for cut in cuts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def class_counts(cache: Cache, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the training images of each class, int64 (K,); raise where fewer than 2 have any."""
    counts = np.bincount(labels, minlength=n_classes)
    present = np.count_nonzero(counts)
    if present < 2:
        raise DatasetError(
            f"{cache.path}: expected at least 2 classes with training images, found {present}; "
            "extract a data set with more, or ask for another target or split"
        )
    return counts


def check_finite(cache: Cache, role: str, arrays: Sequence[Any]) -> None:
    """Raise CacheCorruptError where a feature of arrays (N, D) is NaN or infinite."""

    def wrong(array: Any, rows: slice) -> int | None:
        finite = np.isfinite(array[rows]).all(axis=1)
        return None if finite.all() else rows.start + int(finite.argmin())

    for row in each_block(arrays, wrong, arrays[0].shape[1]):
        if row is not None:
            raise CacheCorruptError(
                f"{cache.path}: expected finite features, found NaN or infinity in {role}, row "
                f"{row}; extract it again with featcache extract --force"
            )


def _check_weights(cache: Cache, name: str, train: Part) -> None:
    assert train.weights is not None
    n_missing = int(np.isnan(train.weights).sum())
    if n_missing:
        raise TableError(
            f"{cache.path}: expected a weight of every training image in the column {name!r}, "
            f"found none of {n_missing:,}; fill them in, or leave these images out with --where "
            f"'not missing({one_line(name)})'"
        )


def _warnings(target: Target, train: Part, test: Part) -> list[str]:
    """Say which test images no head can get right, and which are also training images."""
    notes = []
    if target.task == "classes":
        unknown = np.bincount(train.labels, minlength=len(target.names))[test.labels] == 0
        if unknown.any():
            classes = [target.names[number] for number in np.unique(test.labels[unknown]).tolist()]
            more = f" and {len(classes) - _LISTED:,} more" if len(classes) > _LISTED else ""
            notes.append(
                f"{unknown.sum():,} of {len(test):,} test images are of classes without a "
                f"training image ({', '.join(map(one_line, classes[:_LISTED]))}{more}): each "
                "counts as an error"
            )
    of_train, of_test = _hashes(train), _hashes(test)
    if of_train is not None and of_test is not None:
        n_copies = n_copied(of_test, of_train)
        if n_copies:
            notes.append(
                f"{n_copies:,} of {len(test):,} test images are also in train (same bytes): the "
                "result is too good"
            )
    return notes


def _with_copies_together(images: Part) -> tuple[Part, list[str]]:
    """Make a group of the exact copies of an image where no other groups were asked for."""
    hashes = _hashes(images)
    if hashes is None:
        return images, []
    unique, numbers = np.unique(hashes, return_inverse=True)
    n_copies = len(hashes) - len(unique)
    if not n_copies:
        return images, []
    copies = f"{n_copies:,} of {len(hashes):,} images are exact copies of others (same bytes)"
    if images.groups is not None:
        return images, [f"{copies}: on one side where they are of one group"]
    return replace(images, groups=numbers), [f"{copies}: on the same side of every fold"]


def _hashes(part: Part) -> np.ndarray | None:
    """Return the `hash_numbers` of each image's content."""
    hashes = _content_hashes(part.cache)
    if hashes is None:
        return None
    return hash_numbers(hashes[part.rows])


def _content_hashes(cache: Cache) -> np.ndarray | None:
    """Return SHA-256 of every image's file, uint8 (N, 32); None where a split has none."""
    hashes = [split.content_hashes for _, split in cache.splits()]
    known = [one for one in hashes if one is not None]
    return np.concatenate(known) if len(known) == len(hashes) else None
