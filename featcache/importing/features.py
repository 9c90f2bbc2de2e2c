"""`featcache.import_features`: features that were made elsewhere become a cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, ShapeMismatchError, TableError, one_line
from ..files import user_path
from ..progress import OnNote, OnProgress, silent
from ..remote import is_url
from ..store.arrays import Rows, as_classes, write_rows
from ..store.cache import Cache, load
from ..store.label import label
from ..tables.joining import join
from ..tables.reading import read_table
from ..tables.table import Table
from ..tables.target import read_target
from .layouts import Found, read_lines, recognise


@dataclass(frozen=True)
class ImportResult:
    """The result of `import_features`.

    Parameters
    ----------
    cache : Path
        The file.
    layout : str
        What the features were recognised as.
    n_train, n_val, n_test : int
        Rows of each split.
    feature_dim, n_classes : int
        Numbers per feature, and classes; no classes without labels.
    split : str
        How the splits were made: ``"given"``, or drawn from ``"content"``, ``"group"`` or
        ``"id"``.
    existed : bool
        Whether the cache was there already, with the same content.
    size_bytes : int
        Size of the file.
    wall_s : float
        Duration.
    fingerprint : str
        SHA-256 (hex) of the cache's ingredients, the features among them.
    notes : tuple of str
        What was converted or left out.
    """

    cache: Path
    layout: str
    n_train: int
    n_val: int
    n_test: int
    feature_dim: int
    n_classes: int
    split: str
    existed: bool
    size_bytes: int
    wall_s: float
    fingerprint: str
    notes: tuple[str, ...]

    def load(self) -> Cache:
        """Open the cache."""
        return load(self.cache)


def import_features(
    source: str | Path,
    output: str | Path | None = None,
    *,
    labels: Any = None,
    by: str | None = None,
    target: str | None = None,
    split_column: str | None = None,
    ids: str | Path | Sequence[str] | None = None,
    array: str | None = None,
    made_by: str | None = None,
    name: str | None = None,
    force: bool = False,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ImportResult:
    """Make a cache of features that another program computed.

    Everything but extraction works on it. Its provenance says that the features were imported,
    and which: ``weights_sha256`` is the SHA-256 of their numbers.

    Parameters
    ----------
    source : str or Path
        A ``.npy``, ``.npz``, ``.h5``, ``.h5ad``, ``.parquet``, ``.safetensors`` or ``.pt`` file,
        or a folder. Recognised are plain arrays (N, D), named arrays with labels and ids beside
        the features, the exports of featcache, thingsvision, clip-retrieval, patches of CLAM and
        TRIDENT, AnnData, and a file for each image.
    output : str or Path, optional
        A ``.h5`` file or a folder for it; the cache folder by default.
    labels : table, optional
        A table of the images, which is attached to the cache as `featcache.label` does. By
        default further columns of the source are attached.
    by : str, optional
        Its column with the ids.
    target : str, optional
        Its column that becomes the labels of the cache.
    split_column : str, optional
        Its column that says train, val or test. By default what the source says, or else a fifth
        of the images is drawn for test from their hashes, slides or ids.
    ids : str, Path or sequence of str, optional
        The names of the rows, or a text file with one a line. By default those of the source, or
        else the numbers of the rows.
    array : str, optional
        The array or column with the features, where there are several.
    made_by : str, optional
        What made the features. Caches of one name can be merged, and a head of one tested on
        another; without it they are taken as of different backbones.
    name : str, optional
        Name of the data set; by default that of the source.
    force : bool
        Replace the output if it exists with other content.
    on_progress, on_note : callable
        Called with progress in rows, and with one-line notes.

    Returns
    -------
    ImportResult

    Raises
    ------
    DatasetError
        No such source, an unknown layout, no rows, an id that occurs twice, or a feature that is
        NaN or infinite.
    ShapeMismatchError
        Arrays, ids or labels that do not fit together.
    TableError
        The table cannot be read, or does not fit the features.
    OutputError
        The output exists with other content, or cannot be written.
    """
    started = time.perf_counter()
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        on_note(text)

    if is_url(str(source)):
        raise DatasetError(f"{source}: expected a path, found a URL; download it first")
    path = user_path(source)
    if labels is None and (by, target, split_column) != (None, None, None):
        raise TableError("by, target, split_column: expected a table in labels, found none")
    with tempfile.TemporaryDirectory(prefix="featcache-import-") as scratch:
        try:
            found = recognise(path, array, Path(scratch))
        except OSError as error:
            raise DatasetError(
                f"{path}: expected features that can be read, found: {error.strerror or error}; "
                "see to its permissions, or free space for temporary files"
            ) from None
        for text in found.notes:
            note(text)
        first = found.features[0]
        _name_rows(found, ids, path, note)
        if labels is not None:
            labels = read_table(labels)
            _label_rows(found, labels, by, target, split_column, note)
        key = next(name for name in ("id", "image", "row id") if name not in found.columns)
        beside = {} if labels is not None else _columns_beside(found, key, note)
        numbers = None
        class_names: list[str] = []
        if found.labels is not None:
            numbers, class_names = as_classes(found.labels, found.class_names)
        imported_from = {
            "file": path.name,
            "layout": found.layout,
            "shape": [found.n_rows, *first.shape[1:]],
            "dtype": str(first.dtype),
        }
        rows = Rows(
            features=found.features,
            ids=found.ids,
            labels=numbers,
            class_names=class_names,
            roles=found.roles,
            groups=found.groups,
            hashes=found.hashes,
            made_by=made_by,
            facts={"imported_from": imported_from},
        )
        cache, existed = write_rows(
            rows,
            output,
            name=name or path.stem or "features",
            source=str(path),
            force=force,
            on_progress=on_progress,
            on_note=note,
        )
    made = load(cache)
    if labels is not None:
        label(made, labels, by=by, on_note=note)
    elif beside and made.attached_table is None:
        label(made, {key: found.ids, **beside}, by=key)
        note(f"attached as a table: {one_line(', '.join(beside))}")
    return ImportResult(
        cache=cache,
        layout=found.layout,
        n_train=len(made.train),
        n_val=0 if made.val is None else len(made.val),
        n_test=len(made.test),
        feature_dim=made.feature_dim,
        n_classes=len(made.class_names),
        split=str(made.meta["split"]),
        existed=existed,
        size_bytes=made.size_bytes,
        wall_s=time.perf_counter() - started,
        fingerprint=made.fingerprint,
        notes=tuple(notes),
    )


def _name_rows(
    found: Found, ids: str | Path | Sequence[str] | None, path: Path, note: OnNote
) -> None:
    """Give every row an id: the ones asked for, the layout's, or its number."""
    if ids is not None:
        where = ids if isinstance(ids, (str, Path)) else "ids"
        found.ids = read_lines(user_path(ids)) if isinstance(ids, (str, Path)) else [*map(str, ids)]
        if len(found.ids) != found.n_rows:
            raise ShapeMismatchError(
                f"{where}: expected {found.n_rows:,} ids, one per row of {path}, found "
                f"{len(found.ids):,}; give the file that belongs to these features"
            )
    elif not found.ids:
        found.ids = [str(row) for row in range(found.n_rows)]
        note("ids are the numbers of the rows; name them with --ids")


def _columns_beside(found: Found, key: str, note: OnNote) -> dict[str, Sequence[Any]]:
    """Return the further columns of the source that a table can hold; note the others."""
    able = {}
    for name, values in found.columns.items():
        try:
            column = read_table({key: found.ids, name: values})[name]
        except TableError as error:
            note(f"left out: {one_line(error)}")
        else:
            if not column.missing.all():
                able[name] = values
    return able


def _label_rows(
    found: Found,
    table: Table,
    by: str | None,
    target: str | None,
    split_column: str | None,
    note: OnNote,
) -> None:
    """Take labels and splits from a table of the images."""
    aligned = table.take(join(table, found.ids, found.hashes, by=by).rows)
    if target is not None:
        answer = read_target(aligned, [target], task="classification")
        found.labels, found.class_names = answer.values, list(answer.names)
        if answer.note:
            note(answer.note)
    if split_column is not None:
        column = aligned[split_column]
        if column.missing.any():
            row = int(np.flatnonzero(column.missing)[0])
            raise TableError(
                f"{table.source}: expected train, val or test in {split_column!r} for every row of "
                f"the features, found none for {one_line(repr(found.ids[row]))}"
            )
        found.roles = [str(value) for value in column.texts().tolist()]
