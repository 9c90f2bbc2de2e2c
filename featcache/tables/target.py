"""What is asked of a table: classes, several labels per image, or numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import QuestionError, TableError, one_line
from .table import LIKE_MISSING, Column, Table, listed, number_text

Kind = Literal["classes", "labels", "numbers"]

# What the task is called on the command line.
TASKS: dict[str, Kind] = {
    "classification": "classes",
    "multilabel": "labels",
    "regression": "numbers",
}
_MANY = 20  # a column of more different whole numbers is taken as a quantity
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True, eq=False)
class Target:
    """The answers that a head is to learn.

    ``values`` are classes (one of several), int64 (N,), -1 where missing; labels (any of
    several), int8 (N, L) of 0 and 1, -1 where missing; or numbers, float64 (N, T), NaN where
    missing.
    """

    name: str  # the column, or several joined by ", "
    task: Kind
    values: np.ndarray
    names: tuple[str, ...]  # of the classes, of the L labels, or of the T columns
    note: str = ""  # what the column was taken as and why, where that is not obvious

    @property
    def missing(self) -> np.ndarray:
        """Which rows have no value at all: bool (N,)."""
        if self.task == "numbers":
            return np.isnan(self.values).all(axis=1)
        return self.values < 0 if self.task == "classes" else (self.values < 0).all(axis=1)


def read_target(
    table: Table, columns: Sequence[str], *, task: str = "auto", separator: str | None = None
) -> Target:
    """Read a target from one or more columns of a table.

    ``task`` is ``"classification"``, ``"multilabel"``, ``"regression"``, or ``"auto"``: text is
    classes; lists, text with a ``separator`` such as ``"|"``, and several columns of 0 and 1 (or
    true and false) are labels; several columns of numbers are numbers. One column of numbers is
    taken as numbers if it has fractions or more than 20 different values, else as classes in
    numeric order; the note says which. A value that does not fit the task, no values, only one
    class, or as many classes as rows are a TableError.
    """
    if task != "auto" and task not in TASKS:
        raise QuestionError(f"expected a task auto, {', '.join(TASKS)}, found {task!r}")
    if not columns:
        raise QuestionError(f"{table.source}: expected the name of a target column, found none")
    for number, name in enumerate(columns):
        if name in columns[:number]:
            raise QuestionError(f"{table.source}: expected different columns, found {name!r} twice")
        if table[name].missing.all():
            raise TableError(
                f"{table.source}: expected values in the column {name!r}, found all "
                f"{len(table):,} missing; name another column"
            )
    wanted = TASKS.get(task)
    if separator == "":
        raise QuestionError("separator: expected at least one character, found none")
    if len(columns) == 1:
        return _one_column(table, columns[0], wanted, separator)
    if separator is not None:
        raise QuestionError(
            f"{table.source}: expected one column with a separator, found {len(columns)}; leave "
            "one of the two out"
        )
    if wanted == "classes":
        raise QuestionError(
            f"{table.source}: expected one column of classes, found {len(columns)}: "
            f"{listed(columns)}; name one, or ask for multilabel"
        )
    flags = [_flags(table[name]) for name in columns]
    if wanted == "labels" or (wanted is None and not any(one is None for one in flags)):
        return _labels_of_columns(table, columns, flags)
    return _numbers(table, columns)


def _one_column(table: Table, name: str, wanted: Kind | None, separator: str | None) -> Target:
    column = table[name]
    if column.kind == "list" or separator is not None:
        if wanted not in (None, "labels"):
            found = "lists" if column.kind == "list" else "a separator"
            raise TableError(
                f"{table.source}: expected single values in {name!r}, found {found}; ask for "
                "multilabel"
            )
        return _labels_of_lists(table, name, separator)
    if wanted == "labels":
        flags = _flags(column)
        if flags is None:
            raise TableError(
                f"{table.source}: expected lists, or 0 and 1, in {name!r}, found "
                f"{_example(column)}; give the separator of its labels"
            )
        return _labels_of_columns(table, [name], [flags])
    if wanted == "numbers":
        return _numbers(table, [name])
    numbers = column.numbers()
    if numbers is None or wanted == "classes":
        return _classes(table, name, numbers)
    known = numbers[~np.isnan(numbers)]
    different = np.unique(known)
    fractions = different[different != np.floor(different)]
    if len(fractions) or len(different) > _MANY:
        why = (
            f"it has fractions such as {number_text(float(fractions[0]))}"
            if len(fractions)
            else f"it has {len(different):,} different numbers"
        )
        target = _numbers(table, [name])
        note = (
            f"{name}: taken as numbers (regression), since {why}; --task classification takes it "
            "as classes"
        )
    else:
        target = _classes(table, name, numbers)
        note = (
            f"{name}: taken as {len(target.names)} classes in numeric order, since it has only "
            f"{len(different)} different whole numbers; --task regression takes it as numbers"
        )
    return Target(target.name, target.task, target.values, target.names, note)


def _classes(table: Table, name: str, numbers: np.ndarray | None) -> Target:
    texts = table[name].texts()
    if numbers is None:
        order = sorted(set(texts) - {None})
    else:
        texts = texts.copy()
        texts[np.isnan(numbers)] = None
        value_of = dict(zip(texts, numbers.tolist(), strict=True))
        order = sorted(set(texts) - {None}, key=lambda text: (value_of[text], text))
    n_known = int((texts != None).sum())  # noqa: E711 - by element
    if len(order) < 2:
        found = f"only {order[0]!r:.120}" if order else "none"
        raise TableError(
            f"{table.source}: expected at least two classes in {name!r}, found {found}; name "
            "another column"
        )
    if len(order) == n_known:
        raise TableError(
            f"{table.source}: expected classes in {name!r}, found {n_known:,} different values in "
            f"{n_known:,} rows, like an id; name another column"
        )
    number_of = {text: number for number, text in enumerate(order)}
    number_of[None] = -1
    values = np.fromiter(map(number_of.__getitem__, texts), np.int64, len(texts))
    like = [text for text in order if text.strip().lower() in LIKE_MISSING]
    note = (
        f"{name}: {like[0]!r} is a class; leave a field empty for a missing value" if like else ""
    )
    return Target(name, "classes", values, tuple(order), note)


def _labels_of_lists(table: Table, name: str, separator: str | None) -> Target:
    column = table[name]
    if column.kind == "number":
        raise TableError(
            f"{table.source}: expected text with {separator!r} in {name!r}, found numbers; leave "
            "the separator out"
        )
    sets: dict[object, tuple[str, ...] | None] = {None: None}
    for value in set(column.values) - {None}:
        parts: Iterable[str] = value if column.kind == "list" else value.split(separator)
        sets[value] = tuple(part.strip() for part in parts if part.strip())
    names = sorted({label for labels in sets.values() for label in labels or ()})
    if not names:
        raise TableError(f"{table.source}: expected labels in {name!r}, found none in any row")
    number_of = {label: number for number, label in enumerate(names)}
    patterns = np.zeros((len(sets), len(names)), np.int8)
    for pattern, labels in zip(patterns, sets.values(), strict=True):
        pattern[[number_of[label] for label in labels or ()]] = 1
    patterns[0] = -1  # of None
    pattern_of = {value: number for number, value in enumerate(sets)}
    rows = np.fromiter(map(pattern_of.__getitem__, column.values), np.int64, len(column))
    return _checked_labels(table, name, patterns[rows], names)


def _labels_of_columns(
    table: Table, columns: Sequence[str], flags: Sequence[np.ndarray | None]
) -> Target:
    read = []
    for name, values in zip(columns, flags, strict=True):
        if values is None:
            raise TableError(
                f"{table.source}: expected 0 and 1, or true and false, in {name!r}, found "
                f"{_example(table[name], flags=True)}; leave the column out"
            )
        read.append(values)
    return _checked_labels(table, ", ".join(columns), np.stack(read, axis=1), columns)


def _checked_labels(table: Table, name: str, values: np.ndarray, names: Sequence[str]) -> Target:
    """Refuse labels that no row tells apart; note those that are the same in every row."""
    varies = (values == 0).any(axis=0) & (values == 1).any(axis=0)
    if not varies.any():
        raise TableError(
            f"{table.source}: expected labels that some rows have and others lack in {name!r}, "
            "found the same in every row; name another column"
        )
    same = [label for label, one in zip(names, varies, strict=True) if not one]
    note = f"{name}: {len(same)} labels are the same in every row: {listed(same)}" if same else ""
    return Target(name, "labels", values, tuple(names), note)


def _numbers(table: Table, columns: Sequence[str]) -> Target:
    read = []
    for name in columns:
        values = table[name].numbers()
        if values is None:
            raise TableError(
                f"{table.source}: expected numbers in {name!r}, found {_example(table[name])}; "
                "name another column, or leave the field empty where it is missing"
            )
        if np.isinf(values).any():
            raise TableError(
                f"{table.where(int(np.isinf(values).argmax()))}: expected a finite number in "
                f"{name!r}, found {values[np.isinf(values)][0]}"
            )
        known = values[~np.isnan(values)]
        if not len(known) or known.min() == known.max():
            found = f"only {number_text(float(known[0]))}" if len(known) else "all missing"
            raise TableError(
                f"{table.source}: expected different numbers in {name!r}, found {found}; name "
                "another column"
            )
        read.append(values)
    return Target(", ".join(columns), "numbers", np.stack(read, axis=1), tuple(columns))


def _flags(column: Column) -> np.ndarray | None:
    """Return 0, 1 and -1 for missing, int8 (N,); None if a value is neither 0, 1, true or false."""
    if column.kind == "list":
        return None
    if column.kind == "number":
        if not np.isin(column.values[~column.missing], (0, 1)).all():
            return None
        return np.where(column.missing, -1, column.values).astype(np.int8)
    read = {value: _FLAGS.get(value.strip().lower()) for value in set(column.values) - {None}}
    if None in read.values():
        return None
    read[None] = -1
    return np.fromiter(map(read.__getitem__, column.values), np.int8, len(column))


def _example(column: Column, *, flags: bool = False) -> str:
    """Return the first value that is no number, or no flag, for a message."""
    for value in column.values[~column.missing]:
        alone = Column(column.kind, np.array([value], column.values.dtype))
        if (_flags(alone) if flags else alone.numbers()) is None:
            return one_line(repr(value))
    return one_line(repr(column.values[~column.missing][0]))
