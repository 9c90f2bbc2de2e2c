"""A table in memory: named columns of the same length, and where each row was written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..errors import QuestionError, TableError, one_line
from ..options import did_you_mean

Kind = Literal["text", "number", "list"]

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
# What other programs write where a value is missing.
LIKE_MISSING = frozenset(("na", "n/a", "nan", "null", "none"))


@dataclass(frozen=True, eq=False)
class Column:
    """The values of one column.

    Parameters
    ----------
    kind : str
        ``"text"``: str, or None where missing; all of a CSV file is text. ``"number"``: NaN where
        missing. ``"list"``: tuples of str, or None where missing.
    values : numpy.ndarray
        (N,): float64 for numbers, else objects.
    """

    kind: Kind
    values: np.ndarray

    def __len__(self) -> int:
        """Return N."""
        return len(self.values)

    def take(self, rows: np.ndarray) -> Column:
        """Return these rows; -1 gives a missing value."""
        missing = np.nan if self.kind == "number" else None
        values = np.full(len(rows), missing, self.values.dtype)
        values[rows >= 0] = self.values[rows[rows >= 0]]
        return Column(self.kind, values)

    @property
    def missing(self) -> np.ndarray:
        """Which rows have no value: bool (N,)."""
        if self.kind == "number":
            return np.isnan(self.values)
        absent: np.ndarray = self.values == None  # noqa: E711 - by element
        return absent

    def numbers(self) -> np.ndarray | None:
        """Return the values as float64 (N,), NaN where missing; None if one is no number.

        Text counts as a number where it looks like one, and ``NA`` and its like as missing.
        """
        if self.kind == "number":
            return self.values
        if self.kind == "list":
            return None
        read: dict[str | None, float] = {None: np.nan}
        for text in set(self.values) - {None}:
            if _NUMBER.fullmatch(text):
                read[text] = float(text)
            elif text.strip().lower() in LIKE_MISSING:
                read[text] = np.nan
            else:
                return None
        return np.fromiter(map(read.__getitem__, self.values), np.float64, len(self))

    def texts(self) -> np.ndarray:
        """Return the values as str, None where missing, objects (N,); a list joined by commas."""
        if self.kind == "text":
            return self.values
        if self.kind == "list":
            joined = (None if value is None else ",".join(value) for value in self.values)
            return objects(joined, len(self))
        names = {value: number_text(value) for value in np.unique(self.values).tolist()}
        return objects(
            (names.get(value) if value == value else None for value in self.values.tolist()),
            len(self),
        )


def objects(values: Iterable[object], n: int) -> np.ndarray:
    """Return n values as an array of objects, tuples too."""
    return np.fromiter(values, object, n)


def number_text(value: float) -> str | None:
    """Return a number as a person writes it: 3.0 as ``3``; None for NaN."""
    if value != value:
        return None
    return str(int(value)) if value.is_integer() else repr(value)


_LONGEST_NAME = 1_000  # of a column: a message names it


def listed(names: Iterable[str], most: int = 12) -> str:
    """Return names for a message."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(one_line(repr(name)) for name in names[:most]) + more


@dataclass(frozen=True, eq=False)
class Table:
    """Columns by name.

    Parameters
    ----------
    columns : mapping of str to Column
        All of the same length N, at least one.
    source : str
        The file, for messages and the provenance.
    lines : numpy.ndarray, optional
        int64 (N,): the line on which each row begins, from 1; None where it was no text file.
    sha256 : str
        SHA-256 (hex) of the file, or ``""`` where it was none.
    """

    columns: Mapping[str, Column]
    source: str
    lines: np.ndarray | None = field(default=None, repr=False)
    sha256: str = ""

    def __post_init__(self) -> None:
        """Refuse a table without columns, or with columns of different lengths."""
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) != 1:
            found = f"columns of {sorted(lengths)} rows" if lengths else "no column"
            raise TableError(f"{self.source}: expected columns of one length, found {found}")
        long = next((name for name in self.columns if len(name) > _LONGEST_NAME), None)
        if long is not None:
            raise TableError(
                f"{self.source}: expected names of at most {_LONGEST_NAME:,} characters, found "
                f"{len(long):,}: {one_line(long)}; rename this column"
            )

    def __len__(self) -> int:
        """Return N."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Column:
        """Return a column, or raise QuestionError with the names that there are."""
        if name not in self.columns:
            raise QuestionError(
                f"{self.source}: expected a column {name!r}, found "
                f"{listed(self.columns)}{did_you_mean(name, self.columns)}"
            )
        return self.columns[name]

    def take(self, rows: np.ndarray) -> Table:
        """Return these rows, int64 (n,); -1 gives a row without values."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        lines = None if self.lines is None else np.where(rows >= 0, self.lines[rows], 0)
        return replace(self, columns=columns, lines=lines)

    def without(self, names: Sequence[str]) -> Table:
        """Return the table without these columns."""
        kept = {name: column for name, column in self.columns.items() if name not in names}
        return replace(self, columns=kept)

    def where(self, row: int) -> str:
        """Say where a row is, for a message."""
        if self.lines is None:
            return f"{self.source}, row {row}"
        return f"{self.source}, line {self.lines[row]}"
