"""A table of paths: which images there are, and everything that it says about them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, TableError, one_line
from ..remote import RemotePlace, is_url, located, shown
from ..tables.joining import join, key_columns
from ..tables.reading import read_table
from ..tables.table import Column, Table, listed, objects
from .dataset import Dataset
from .decoding import HEAD_BYTES, MAX_FILE_BYTES
from .folders import ROLE_OF, common_root
from .images import FileImages, Files, Folder, images_among, shown_names
from .sources import Asked, Source, at_rows, dataset_of

_HERE = ("file", "local")  # protocols of files on this machine


def load_labelled(
    files: Files | None, path: Path | RemotePlace | None, name: str, labels: Any, asked: Asked
) -> Dataset:
    """Return the data set of the images that a table names, with all of its columns.

    Without ``files``, they are in the folder of the table, or behind its URLs. TableError as of
    `read_table` and `dataset_of`, and for a row without its image.
    """
    table = read_table(labels)
    if files is None:
        column = _path_column(table, asked)
        texts = table[column].texts().tolist()
        with_url = [row for row, text in enumerate(texts) if is_url(text)]
        if with_url:
            return _behind_urls(table, column, texts, len(with_url), name, asked)
        path = _folder_of(table, column)
        files = Folder(path)
    assert path is not None
    listed, _, notes = shown_names(files, path)
    names, _ = images_among(files, listed)
    if not names:
        raise DatasetError(f"{path}: expected images, found none; check the path")
    joined = join(table, names, by=asked.path_column, dataset_path=str(path))
    if joined.n_left_over:
        _refuse_left_over(table, joined.column, joined.rows, path, joined.notes[-1])
    kept = np.flatnonzero(joined.rows >= 0).tolist()
    ids = tuple(names[row] for row in kept)
    source = Source(
        name,
        FileImages(files, ids),
        ids,
        f"{path} and {table.source}",
        table=table.take(joined.rows[kept]),
        roles=_roles_of(ids),
        notes=(*notes, *joined.notes),
        key=joined.column,
    )
    return dataset_of(source, asked)


def _path_column(table: Table, asked: Asked) -> str:
    if asked.path_column is not None:
        table[asked.path_column]  # or the error that names the others
        return asked.path_column
    columns = [name for name in table.columns if name.lower() in ("url", "image_url")]
    columns = key_columns(table) + columns
    columns = [name for name in columns if name not in ("content_hash", "sha256")]
    if not columns:
        raise TableError(
            f"{table.source}: expected a column path or file_name, found "
            f"{listed(table.columns)}; name it with "
            "--path-column"
        )
    # An id may be any number; a path says more.
    return next((name for name in columns if name.lower() != "id"), columns[0])


def _folder_of(table: Table, column: str) -> Path:
    place = None if is_url(table.source) else Path(table.source)
    if place is None or not place.is_file():
        raise TableError(
            f"{table.source}: expected a folder for the paths in {column!r}, found none; name it: "
            "featcache extract FOLDER --labels TABLE"
        )
    return place.parent


def _refuse_left_over(
    table: Table, column: str, rows: np.ndarray, path: Path | RemotePlace, note: str
) -> None:
    """Refuse rows without their image, those that lead out of the folder first."""
    used = set(rows.tolist())
    texts = table[column].texts().tolist()
    outside = [
        row
        for row, text in enumerate(texts)
        if text and row not in used and _leads_out(text.replace("\\", "/"), table, path)
    ]
    if outside:
        raise TableError(
            f"{at_rows(table, outside)}: expected paths inside {path}, found "
            f"{one_line(repr(texts[outside[0]]))}, outside of it; name a folder that holds all "
            "images"
        )
    raise TableError(f"{note}; restore the images or remove these rows")


def _leads_out(text: str, table: Table, path: Path | RemotePlace) -> bool:
    """Tell whether a path leads out of a folder, wherever it starts."""
    if not text.startswith("/") and not posixpath.normpath(text).startswith(".."):
        return False
    start = "" if is_url(table.source) else os.path.dirname(os.path.abspath(table.source))
    whole = os.path.normpath(os.path.join(start, text))
    return not whole.startswith(os.path.abspath(str(path)).rstrip(os.sep) + os.sep)


def _roles_of(ids: Sequence[str]) -> list[str] | None:
    """Return the roles that the folders above the images have, if all have one."""
    root = len(common_root(list(ids)))
    roles = [ROLE_OF.get(id_[root:].partition("/")[0].lower()) for id_ in ids]
    known = [role for role in roles if role]
    return known if len(known) == len(ids) and {"train", "test"} <= set(known) else None


def _behind_urls(
    table: Table, column: str, texts: Sequence[str | None], n_urls: int, name: str, asked: Asked
) -> Dataset:
    if n_urls < len(texts):
        row = next(row for row, text in enumerate(texts) if not is_url(text))
        raise TableError(
            f"{table.where(row)}: expected a URL in {column!r}, as in the other rows, found "
            f"{one_line(repr(texts[row]))}; give all images as URLs or none"
        )
    urls: dict[str, str] = {}  # as it may be shown -> as it is asked for
    for row, text in enumerate(texts):
        url = text or ""
        if url.partition("://")[0].lower() in _HERE:
            raise TableError(
                f"{table.where(row)}: expected a URL of another machine in {column!r}, found "
                f"{one_line(repr(url))}; name the folder and give paths"
            )
        if shown(url) in urls:
            raise TableError(
                f"{table.where(row)}: expected each image once, found {one_line(shown(url))} "
                "again; remove the row"
            )
        urls[shown(url)] = url
    row_of = {url: row for row, url in enumerate(urls)}
    order = sorted(urls)
    source = Source(
        name,
        FileImages(UrlFiles(urls), order),
        tuple(order),
        f"{table.source}, images behind URLs",
        table=_with_shown_urls(table, column).take(np.array([row_of[url] for url in order])),
        key=column,
    )
    return dataset_of(source, asked)


def _with_shown_urls(table: Table, column: str) -> Table:
    """Return the table with URLs as they may be stored: a query may be a signature."""
    texts = (None if text is None else shown(text) for text in table[column].texts())
    return Table(
        {**table.columns, column: Column("text", objects(texts, len(table)))},
        table.source,
        table.lines,
        table.sha256,
    )


class UrlFiles(Files):
    """Files that are each behind a URL of its own; one request each."""

    remote = True

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self._folders: dict[str, RemotePlace] = {}

    def __reduce__(self) -> Any:
        return UrlFiles, (self._urls,)

    def names(self) -> list[str]:
        """List every URL."""
        return sorted(self._urls)

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file."""
        return self._read(name, HEAD_BYTES)

    def read(self, name: str) -> bytes:
        """Return a file's bytes, in one request."""
        return self._read(name, MAX_FILE_BYTES)

    def _read(self, name: str, most: int) -> bytes:
        place = located(self._urls[name])
        assert isinstance(place, RemotePlace)
        # The place of each folder is kept: one connection serves all of its images.
        parent = place.parent
        parent = self._folders.setdefault(parent.url, parent)
        try:
            return parent.read(place.name, most)
        except FileNotFoundError:
            raise DatasetError(
                f"{name}: cannot be read: nothing is there; restore it or remove its row"
            ) from None
