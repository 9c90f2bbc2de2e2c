"""Joining a table to images: which of its rows belongs to which image."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..errors import TableError, one_line
from ..remote import is_url
from .table import Table, listed

# Where images are named, the best first.
KEYS = (
    "id",
    "path",
    "file_name",
    "filename",
    "file",
    "image",
    "image_id",
    "image_path",
    "filepath",
    "content_hash",
    "sha256",
)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SHOWN = 3  # rows and images named in a note
_MOST_PARTS = 3  # of the ends of paths that are compared
_Keys = Sequence[str | None]


@dataclass(frozen=True, eq=False)
class Join:
    """Which row of a table each image has, and one line each on what does not fit."""

    rows: np.ndarray  # int64 (N,): a row of the table for each image, or -1
    column: str  # which names the images
    key: str  # how it does so, such as "path, equal to the id"
    notes: tuple[str, ...]
    n_missing: int  # images without a row
    n_doubled: int  # rows that repeat another
    n_left_over: int  # rows that belong to no image


def join(
    table: Table,
    ids: Sequence[str],
    hashes: np.ndarray | None = None,
    *,
    by: str | None = None,
    dataset_path: str | None = None,
) -> Join:
    """Find the row of a table for each image.

    A value names an image if it equals the id; or as a path, absolute or relative to the table's
    folder, of a file in ``dataset_path``; or as the SHA-256 of the file. Only where no value of
    any column does, the ends of the paths are compared, and at last the file names without
    suffix; of these, a name that two images or two rows share counts for none. ``hashes`` are
    uint8 (N, 32). Without ``by``, the column of `KEYS` that matches most counts. No row of any
    image, or two rows of one that differ, are a TableError.
    """
    columns = [by] if by is not None else key_columns(table)
    if not columns:
        raise TableError(
            f"{table.source}: expected a column that names the images ({', '.join(KEYS)}), found "
            f"{listed(table.columns)}; name it with --by COLUMN"
        )
    values = {name: table[name].texts().tolist() for name in columns}
    best: _Match | None = None
    strict = partial(_strict_ways, hashes=hashes, dataset_path=dataset_path)
    for ways in (strict, _loose_ways):
        for name in columns:
            for match in ways(name, values[name], table.source, ids):
                if match.n > (best.n if best else 0):
                    best = match
                if match.n == len(ids):
                    return _join(table, ids, match)
        if best:
            return _join(table, ids, best)
    name = columns[0]
    value = next((value for value in values[name] if value is not None), "")
    raise TableError(
        f"{table.source}: expected rows of these images, found none: {name!r} has "
        f"{one_line(repr(value))} where an id here is {one_line(repr(ids[0] if ids else ''))}; "
        "name the column with --by COLUMN, or correct it"
    )


def key_columns(table: Table) -> list[str]:
    """Return the columns that may name images, the best first; case and ``-`` do not matter."""
    known = {re.sub(r"[ -]", "_", name).lower(): name for name in reversed(list(table.columns))}
    return [known[name] for name in KEYS if name in known]


@dataclass(frozen=True, eq=False)
class _Match:
    """How a column was understood: a key of each row of the table, and the row of each image."""

    column: str
    how: str
    keys: _Keys
    rows: np.ndarray
    note: str = ""

    @cached_property
    def n(self) -> int:
        """Images that have a row."""
        return int((self.rows >= 0).sum())


def _strict_ways(
    name: str,
    values: _Keys,
    source: str,
    ids: Sequence[str],
    hashes: np.ndarray | None,
    dataset_path: str | None,
) -> Iterator[_Match]:
    """Yield the ways in which a value names one image and no other."""
    first = next((value for value in values if value is not None), "")
    if _SHA256.fullmatch(first) and hashes is not None:
        lower = [value and value.lower() for value in values]
        of_images = [row.tobytes().hex() for row in hashes]
        yield _match(name, "the content hash", lower, of_images)
    yield _match(name, "equal to the id", values, ids)
    plain = [value and value.replace("\\", "/").removeprefix("./") for value in values]
    if plain != values:
        yield _match(name, "the path", plain, ids)
    if dataset_path is not None and not is_url(dataset_path):
        paths = _inside(plain, dataset_path, source)
        yield _match(name, "the path of the file", paths, ids)


def _loose_ways(name: str, values: _Keys, source: str, ids: Sequence[str]) -> Iterator[_Match]:
    """Yield comparisons of the last parts of paths, the longest first, then without suffix."""
    plain = [value and value.replace("\\", "/").rstrip("/") for value in values]
    # Longer ends than either side has are the same comparison again.
    most = min(max((it or "").count("/") for it in side) for side in (plain, ids)) + 1
    for n_parts in range(min(most, _MOST_PARTS), -1, -1):
        how = f"the last {n_parts} parts of the path"
        if n_parts < 2:
            how = "the file name" if n_parts else "the file name without suffix"
        # A row that says the same as another is a repetition; other rows of one end are not.
        keys = _alone([value and _end(value, n_parts) for value in plain], plain)
        of_images = _alone([_end(id_, n_parts) for id_ in ids], range(len(ids)))
        note = f"{source}: no value of {name!r} is an id; matched by {how}"
        yield _match(name, how, keys, of_images, note)


def _end(path: str, n_parts: int) -> str:
    """Return the last parts of a path; for 0, the file name without suffix."""
    parts = path.rsplit("/", n_parts or 1)
    end = path[len(parts[0]) + 1 :] if len(parts) > (n_parts or 1) else path
    return end if n_parts else os.path.splitext(end)[0]


def _alone(ends: _Keys, wholes: Sequence[object]) -> _Keys:
    """Return ends, None in the place of one that different paths share."""
    first: dict[str | None, object] = {}
    shared = {
        end
        for end, whole in zip(ends, wholes, strict=True)
        if first.setdefault(end, whole) != whole
    }
    return [None if end in shared else end for end in ends] if shared else ends


def _match(name: str, how: str, keys: _Keys, of_images: _Keys, note: str = "") -> _Match:
    row_of: dict[str | None, int] = {}
    for row in range(len(keys) - 1, -1, -1):  # so that the first of equal rows counts
        row_of[keys[row]] = row
    row_of[None] = -1
    rows = np.fromiter((row_of.get(key, -1) for key in of_images), np.int64, len(of_images))
    return _Match(name, how, keys, rows, note)


def _inside(values: _Keys, dataset_path: str, source: str) -> list[str | None]:
    """Return paths, absolute or relative to the table's folder, as relative to the data set's."""
    root = os.path.abspath(dataset_path).replace("\\", "/").rstrip("/") + "/"
    folder = "" if is_url(source) else os.path.abspath(Path(source).parent)
    folders: dict[str, str | None] = {}  # most images share theirs
    found: list[str | None] = []
    for value in values:
        if value is None:
            found.append(None)
            continue
        start, slash, name = value.rpartition("/")
        if start not in folders:
            place = os.path.normpath(os.path.join(folder, start + slash)).replace("\\", "/") + "/"
            folders[start] = place[len(root) :] if place.startswith(root) else None
        inside = folders[start]
        found.append(None if inside is None else inside + name)
    return found


def _join(table: Table, ids: Sequence[str], match: _Match) -> Join:
    keys, source = match.keys, table.source
    first: dict[str, int] = {}
    doubled = []
    for row, key in enumerate(keys):
        if key is not None and first.setdefault(key, row) != row:
            doubled.append(row)
    others = [column for name, column in table.columns.items() if name != match.column]
    for row in doubled:
        before = first[keys[row] or ""]
        if any(_differ(column.values[before], column.values[row]) for column in others):
            raise TableError(
                f"{table.where(row)}: expected one row per image, found another of "
                f"{one_line(repr(keys[row]))} that says something else ({_line(table, before)}); "
                "keep one of them"
            )
    used = np.zeros(len(table), bool)
    used[match.rows[match.rows >= 0]] = True
    used[doubled] = True
    missing = np.flatnonzero(match.rows < 0)
    left_over = np.flatnonzero(~used)
    notes = [match.note] if match.note else []
    if len(missing):
        named = [one_line(repr(ids[row])) for row in missing[:_SHOWN]]
        verb = "has" if len(missing) == 1 else "have"
        what = f"{len(missing):,} of {len(ids):,} images {verb} no row"
        notes.append(f"{source}: {what}: {_and_more(named, len(missing))}")
    if doubled:
        named = [_line(table, row) for row in doubled[:_SHOWN]]
        what = f"{len(doubled):,} of {len(table):,} rows repeat another"
        notes.append(f"{source}: {what}: {_and_more(named, len(doubled))}")
    if len(left_over):
        texts = table[match.column].texts()
        shown = left_over[:_SHOWN].tolist()
        named = [f"{_line(table, row)} ({one_line(repr(texts[row]))})" for row in shown]
        verb = "belongs" if len(left_over) == 1 else "belong"
        what = f"{len(left_over):,} of {len(table):,} rows {verb} to no image here"
        notes.append(f"{source}: {what}: {_and_more(named, len(left_over))}")
    return Join(
        rows=match.rows,
        column=match.column,
        key=f"{match.column}, {match.how}",
        notes=tuple(notes),
        n_missing=len(missing),
        n_doubled=len(doubled),
        n_left_over=len(left_over),
    )


def _differ(one: object, other: object) -> bool:
    return one != other and not (one != one and other != other)  # two NaN are the same


def _line(table: Table, row: int) -> str:
    return f"row {row}" if table.lines is None else f"line {table.lines[row]}"


def _and_more(named: Iterable[str], n: int) -> str:
    return ", ".join(named) + (f" and {n - _SHOWN:,} more" if n > _SHOWN else "")
