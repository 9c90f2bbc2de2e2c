"""Data sets of Hugging Face's library ``datasets``: saved folders, and those of the hub.

Both are Arrow files, which pyarrow alone reads; ``datasets`` is only asked to download.
No code of a data set is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, one_line
from ..tables.reading import read_table
from ..tables.table import Table
from .dataset import UNLABELLED
from .decoding import MAX_FILE_BYTES
from .folders import ROLE_OF
from .images import FileImages, Files
from .sources import LABELS, Asked, Source, known_roles
from .zip import opened_once

_MARKS = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes
Parts = Mapping[str, Sequence[Path]]  # split -> its Arrow files, in order


def is_saved(path: Path) -> bool:
    """Tell whether ``save_to_disk`` wrote a folder."""
    return any((path / mark).is_file() for mark in _MARKS)


def saved_source(path: Path, asked: Asked) -> tuple[Source, Asked]:
    """Open a folder that ``save_to_disk`` wrote; as `hub_source`."""
    parts: dict[str, Sequence[Path]] = {}
    names = [""]
    if (path / _MARKS[0]).is_file():
        names = _strings(path / _MARKS[0], "splits")
    for name in names:
        _check_name(path, name)
        state = path / name / "state.json"
        files = _strings(state, "_data_files")
        for file in files:
            _check_name(state, file)
        parts[name or "all"] = [path / name / file for file in files]
    return _source(path.resolve().name, str(path), parts, asked, may_have_paths=False)


def hub_source(text: str, asked: Asked) -> tuple[Source, Asked]:
    """Download ``NAME``, ``ORG/NAME`` or ``ORG/NAME:CONFIG``, if ``datasets`` has not yet.

    Returned are the arguments of `dataset_of`: columns that say what is in the source already
    are taken out of ``asked``.
    """
    name, _, config = text.partition(":")
    where = f"hf:{text}"
    if not name:
        raise DatasetError("hf: expected the name of a data set, found none; try hf:ORG/NAME")
    try:
        library = import_module("datasets")
    except ImportError as error:
        raise DatasetError(
            f"{where}: cannot be opened: {one_line(error)}; run pip install 'featcache[hf]'"
        ) from None
    try:
        loaded = library.load_dataset(name, config or None)
        parts = {
            str(split): [Path(file["filename"]) for file in part.cache_files]
            for split, part in loaded.items()
        }
    except Exception as error:  # its errors, the network's, and those of every format
        raise DatasetError(
            f"{where}: cannot be loaded: {type(error).__name__}: {one_line(error)}; check the name "
            "and the network"
        ) from None
    return _source(name.rpartition("/")[2], where, parts, asked, may_have_paths=True)


class ArrowImages(Files):
    """Files in a column of Arrow files, known by ``split/000042``."""

    def __init__(
        self, parts: Iterable[tuple[str, Sequence[Path]]], column: str, may_have_paths: bool
    ) -> None:
        self._given = tuple(parts), column, may_have_paths
        self.tables = {name: _read(files) for name, files in self._given[0]}
        self._column = column
        self._may_have_paths = may_have_paths

    def __reduce__(self) -> Any:
        parts, *others = self._given
        files = tuple((name, tuple(paths)) for name, paths in parts)
        return opened_once, (ArrowImages, files, *others)

    def names(self) -> list[str]:
        """List every image."""
        return [
            f"{split}/{row:06d}"
            for split, table in self.tables.items()
            for row in range(len(table))
        ]

    def folders(self) -> list[str]:
        """List the splits."""
        return list(self.tables)

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Safe from several threads."""
        split, _, row = name.rpartition("/")
        cell = self.tables[split][self._column][int(row)].as_py()
        if isinstance(cell, bytes):
            return cell
        data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
        if data is not None:
            return bytes(data)
        if path and self._may_have_paths:
            try:
                with open(path, "rb") as stream:
                    return stream.read(MAX_FILE_BYTES)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{name}: cannot be read: {one_line(error)}") from None
        found = f"the path {one_line(repr(path))} alone" if path else "none"
        raise DatasetError(
            f"{name}: expected the bytes of an image in {self._column!r}, found {found}; save the "
            "data set with its images embedded"
        )


def _source(
    name: str, where: str, parts: Parts, asked: Asked, *, may_have_paths: bool
) -> tuple[Source, Asked]:
    notes: list[str] = []
    other = [split for split in parts if split != "all" and split.lower() not in ROLE_OF]
    kept = {split: files for split, files in parts.items() if split not in other}
    if not kept:  # a set that has no split of ours
        kept, other = {split: parts[split] for split in other[:1]}, other[1:]
    if other:
        notes.append(f"{where}: splits left out: {', '.join(map(one_line, other))}")
    if not kept:
        raise DatasetError(f"{where}: expected a split with images, found none")
    features = _features(next(iter(kept.values())))
    column = asked.path_column or _image_column(where, features)
    files = ArrowImages(kept.items(), column, may_have_paths)
    for split, table in files.tables.items():
        if column not in table.column_names:
            raise DatasetError(
                f"{where}: expected a column {column!r} with images in {one_line(split)}, found "
                f"{', '.join(one_line(repr(one)) for one in table.column_names)}; name it with "
                "--path-column"
            )
    label = asked.target or _label_column(features, notes, where)
    ids = tuple(files.names())
    splits = [id_.rpartition("/")[0] for id_ in ids]
    table = _table(files, column, features, where, notes)
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    names = features.get(label, {}).get("names") if label else None
    if isinstance(names, list) and names:
        parts_of = [one[label].to_numpy() for one in files.tables.values()]
        values = np.nan_to_num(np.concatenate(parts_of).astype(float), nan=UNLABELLED)
        labels, class_names = values.astype(np.int64), tuple(map(str, names))
        labels[(labels < 0) | (labels >= len(names))] = UNLABELLED
        asked = replace(asked, target=None)
    roles: list[str | None] = [ROLE_OF.get(split.lower()) for split in splits]
    is_test = np.array([role == "test" for role in roles])
    if (
        labels is not None
        and is_test.any()
        and "val" in roles
        and (labels[is_test] == UNLABELLED).all()
    ):  # as competitions have it
        notes.append(f"{where}: the test split has no labels and is left out")
        rows = np.flatnonzero(~is_test)
        roles, ids = [roles[row] for row in rows], tuple(ids[row] for row in rows)
        labels, table = labels[rows], None if table is None else table.take(rows)
    given, note = known_roles(roles, where)
    notes += [note] if note else []
    source = Source(
        name,
        FileImages(files, ids),
        ids,
        where,
        table=table,
        roles=given,
        labels=labels,
        class_names=class_names,
        notes=tuple(notes),
    )
    return source, replace(asked, path_column=None)


def _image_column(where: str, features: Mapping[str, Any]) -> str:
    columns = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    if len(columns) == 1:
        return columns[0]
    listed = ", ".join(one_line(repr(name)) for name in columns or features)
    found = f"{len(columns)}" if columns else "none"
    raise DatasetError(
        f"{where}: expected one column of images, found {found} ({listed}); name it with "
        "--path-column"
    )


def _label_column(features: Mapping[str, Any], notes: list[str], where: str) -> str | None:
    columns = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    columns.sort(key=lambda name: LABELS.index(name) if name in LABELS else len(LABELS))
    if len(columns) > 1:
        others = ", ".join(map(repr, map(one_line, columns[1:])))
        notes.append(f"{where}: labels from {columns[0]!r}; there are also {others}")
    return columns[0] if columns else None


def _table(
    files: ArrowImages,
    column: str,
    features: Mapping[str, Any],
    where: str,
    notes: list[str],
) -> Table | None:
    """Return the other columns, classes by name; those of images, lists of lists and so on go."""
    import pyarrow as pa

    tables = list(files.tables.values())
    kept: dict[str, Any] = {}
    dropped = []
    for name in tables[0].column_names:
        if name == column:
            continue
        kind = tables[0].schema.field(name).type
        plain = kind.value_type if pa.types.is_list(kind) else kind
        unfit = pa.types.is_nested(plain) or pa.types.is_binary(plain) or pa.types.is_null(plain)
        if unfit or any(name not in one.column_names for one in tables):
            dropped.append(name)
            continue
        values = pa.chunked_array([chunk for one in tables for chunk in one[name].chunks], kind)
        names = features.get(name, {}).get("names")
        if isinstance(names, list) and pa.types.is_integer(kind):
            texts = [str(one) for one in names]
            values = [
                texts[value] if value is not None and 0 <= value < len(texts) else None
                for value in values.to_pylist()
            ]
        kept[name] = values
    if dropped:
        notes.append(f"{where}: columns not kept: {', '.join(map(one_line, dropped))}")
    return replace(read_table(pa.table(kept)), source=where) if kept else None


def _features(files: Sequence[Path]) -> Mapping[str, Any]:
    """Return what the library notes of each column: its type, and the names of classes."""
    schema = _read(files).schema
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted.get("info", {}).get("features") or {}
        found = {name: one for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, AttributeError, RecursionError):
        found = {}
    return {name: found.get(name, {}) for name in schema.names}


def _read(files: Sequence[Path]) -> Any:
    """Map Arrow files, whatever their size, and check them."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DatasetError(
            f"{files[0] if files else 'data set'}: expected pyarrow to read it, found none; run "
            "pip install 'featcache[hf]'"
        ) from None
    tables = []
    for file in files:
        try:
            with pa.memory_map(str(file)) as stream:
                tables.append(pa.ipc.open_stream(stream).read_all())
            tables[-1].validate(full=True)
        except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise DatasetError(
                f"{file}: expected an Arrow stream as datasets writes it, found none "
                f"({one_line(error)}); save the data set again"
            ) from None
    try:
        return pa.concat_tables(tables)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{files[0] if files else 'data set'}: expected Arrow files of the same columns, found "
            f"others ({one_line(error)}); save the data set again"
        ) from None


def _strings(path: Path, field: str) -> list[str]:
    """Return a list of names from one of the library's JSON files."""
    try:
        values = json.loads(path.read_bytes())[field]
        names = [value["filename"] if isinstance(value, dict) else value for value in values]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("no names")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{path}: expected {field!r} as datasets writes it, found something else "
            f"({one_line(error)}); save the data set again"
        ) from None
    return names


def _check_name(where: Path, name: str) -> None:
    if "/" in name or "\\" in name or name in (".", ".."):
        raise DatasetError(
            f"{where}: expected the name of a file or folder in it, found {one_line(repr(name))}; "
            "save the data set again"
        )
