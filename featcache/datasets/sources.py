"""Images of any source, with the table that says what is in them, become a data set."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import DatasetError, TableError, one_line
from ..sampling import drawn_sides, text_hashes
from ..tables.table import Table
from ..tables.target import read_target
from .dataset import UNLABELLED, Dataset, Split, undivided_dataset
from .folders import ROLE_OF
from .images import Images

LABELS = ("label", "class", "class_name", "target", "cls")  # columns, the best first
_SHOWN = 3  # rows that a message names


@dataclass(frozen=True)
class Asked:
    """Which columns of a table are what; None where their names tell."""

    path_column: str | None = None  # names the images, or has them
    target: str | None = None  # their classes
    split_column: str | None = None  # ``train``, ``val`` or ``test``
    group: str | None = None  # what must not be on both sides, such as the patient


@dataclass(frozen=True, eq=False)
class Source:
    """N images, and what their source says about them."""

    name: str  # characters that a `Dataset` cannot have in its name are replaced
    images: Images
    ids: tuple[str, ...]
    source: str  # for a person
    table: Table | None = None  # N rows
    roles: Sequence[str] | None = None  # ``train``, ``val`` or ``test``
    labels: np.ndarray | None = None  # int64 (N,), -1 where missing
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    key: str | None = None  # the column of the table that names the images, as the ids do


def dataset_of(source: Source, asked: Asked) -> Dataset:
    """Return the data set of a source: its labels, and its sides.

    The sides are those of the split column, else of the source, else drawn from the groups,
    else from the content of the images. TableError where a column is missing, a split is none
    of the three, or a group is in two.
    """
    table = source.table
    labels, class_names, notes = _labels(source, asked)
    roles, said = _roles(source, asked)
    divided_by = "given"
    groups = None if asked.group is None or table is None else table[asked.group].texts()
    if groups is not None and table is not None:
        if roles is None:
            # An image without a group is one of its own.
            texts = [
                id_ if text is None else text for text, id_ in zip(groups, source.ids, strict=True)
            ]
            is_test = drawn_sides(text_hashes(texts))
            roles = ["test" if drawn else "train" for drawn in is_test.tolist()]
            said, divided_by = f"divided by {asked.group}", "group"
        else:
            _check_groups(table, str(asked.group), groups.tolist(), roles)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip("-.")[:100] or "images"
    whole = Split(source.images, labels, class_names, source.ids)
    notes = (*source.notes, *notes)
    if roles is None:
        dataset = undivided_dataset(name, whole, f"{source.source}, divided by content", notes)
    else:
        rows = {role: np.flatnonzero(np.array(roles) == role) for role in ("train", "val", "test")}
        parts = {role: whole.take(taken) for role, taken in rows.items()}
        val = parts["val"] if len(rows["val"]) else None
        dataset = Dataset(
            name,
            parts["train"],
            parts["test"],
            f"{source.source}, {said}",
            notes,
            val=val,
            divided_by=divided_by,
        )
    if table is None or set(table.columns) == {source.key}:
        return dataset
    kept = table.without([source.key] if source.key is not None else [])
    return replace(dataset, table=kept, table_ids=source.ids)


def _labels(source: Source, asked: Asked) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Return labels (N,), class names, and notes."""
    table, none = source.table, np.full(len(source.ids), UNLABELLED)
    column = asked.target
    if column is None and source.labels is not None:
        return source.labels, source.class_names, ()
    if column is None and table is not None:
        known = {name.lower(): name for name in reversed(list(table.columns))}
        column = next((known[name] for name in LABELS if name in known), None)
    if column is None or table is None:
        _check_has_table(table, "--target", column, source)
        columns = "" if table is None else f" (the table has {_listed(table.columns)})"
        return none, (), (f"{source.source}: the images have no labels{columns}",)
    try:
        target = read_target(table, (column,))
        if target.task == "numbers" and not np.any(target.values % 1 > 0):
            # Whole numbers may be classes; a probe that asks for the column decides anew.
            target = read_target(table, (column,), task="classification")
    except TableError as error:
        if asked.target is not None:
            raise
        return none, (), (f"{error}; so the images have no labels",)
    if target.task != "classes":
        found = "numbers" if target.task == "numbers" else "several labels per image"
        note = f"{source.source}: {column!r} has {found}, so the cache keeps it in its table alone"
        return none, (), (f"{note}; ask for it with featcache probe --target",)
    notes = [target.note] if target.note else []
    if asked.target is None:
        notes.append(f"{source.source}: labels from the column {column!r}")
    missing = int(target.missing.sum())
    if missing:
        notes.append(f"{source.source}: {missing:,} images without a label in {column!r}")
    return target.values, target.names, tuple(notes)


def _roles(source: Source, asked: Asked) -> tuple[Sequence[str] | None, str]:
    """Return the role of each image, None where it is to be drawn, and who gave them."""
    table, column = source.table, asked.split_column
    if column is None and table is not None and source.roles is None and "split" in table.columns:
        column = "split"
    if column is None or table is None:
        _check_has_table(table, "--split-column", column, source)
        return source.roles, "as given"
    texts = table[column].texts().tolist()
    roles = [ROLE_OF.get(text.strip().lower()) if text else None for text in texts]
    wrong = [row for row, role in enumerate(roles) if role is None]
    if wrong:
        found = "nothing" if texts[wrong[0]] is None else one_line(repr(texts[wrong[0]]))
        raise TableError(
            f"{at_rows(table, wrong)}: expected train, val or test in {column!r}, found {found}; "
            "correct it, or name another --split-column"
        )
    return [role or "" for role in roles], f"as {column} says"


def _check_groups(
    table: Table, column: str, groups: Sequence[str | None], roles: Sequence[str]
) -> None:
    """Refuse a group in two splits."""
    seen: dict[str, dict[str, int]] = defaultdict(dict)
    for row, (group, role) in enumerate(zip(groups, roles, strict=True)):
        if group is not None:
            seen[group].setdefault(role, row)
    both = [group for group, rows in seen.items() if len(rows) > 1]
    if both:
        (one, first), (other, second), *_ = seen[both[0]].items()
        raise TableError(
            f"{at_rows(table, [first, second])}: expected each {column!r} in one split, found "
            f"{one_line(repr(both[0]))} in {one} and {other} ({len(both):,} such groups); correct "
            "the split, or leave --group out"
        )


def _check_has_table(table: Table | None, option: str, column: str | None, source: Source) -> None:
    if column is not None and table is None:
        raise DatasetError(
            f"{source.source}: expected a table for {option} {one_line(column)}, found none; name "
            "it with --labels"
        )


def known_roles(roles: Sequence[str | None], path: str) -> tuple[list[str] | None, str]:
    """Return the roles where all are known and there is something to test on; and a note.

    Many data sets come as train and val alone, and are reported on val.
    """
    found = set(roles)
    if None in found or "train" not in found or len(found) < 2:
        return None, ""
    if "test" in found:
        return [role or "" for role in roles], ""
    note = f"{path}: no test split, so the validation split is taken for it: choose nothing by it"
    return ["test" if role == "val" else "train" for role in roles], note


def at_rows(table: Table, rows: Sequence[int]) -> str:
    """Name the first few rows of a table, for a message."""
    named = [row if table.lines is None else int(table.lines[row]) for row in rows[:_SHOWN]]
    what = "row" if table.lines is None else "line"
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return f"{table.source}, {what}{'s' * (len(rows) > 1)} {', '.join(map(str, named))}{more}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(one_line(repr(name)) for name in list(names)[:8])
