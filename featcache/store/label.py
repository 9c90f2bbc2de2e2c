"""Attaching a table of labels to a cache: features stay, labels can be replaced."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheMissError, OutputError, TableError
from ..progress import OnNote, silent
from ..tables.joining import join
from ..tables.reading import read_table
from .cache import Cache, load
from .remote_caches import original
from .table_file import attach, column_facts, table_path

_SHOWN = 5  # columns named in a note


@dataclass(frozen=True)
class LabelResult:
    """The result of `label`.

    Parameters
    ----------
    cache : Path
        The cache, or the local copy of one behind a URL.
    table : Path
        The file that holds the table now.
    source : str
        The table that was read.
    key : str
        How its rows found their images, such as ``"path, equal to the id"``.
    columns : list of dict
        ``name``, ``kind`` (text, number or list), ``n_values`` and ``n_missing`` of each column.
    n_images, n_rows : int
        Images of the cache, and rows of the table.
    n_matched, n_missing : int
        Images with a row, and without.
    n_doubled, n_left_over : int
        Rows that repeat another, and rows that belong to no image.
    notes : tuple of str
        One line each on these, and on columns with missing values.
    wall_s : float
        Duration.
    """

    cache: Path
    table: Path
    source: str
    key: str
    columns: list[dict[str, Any]]
    n_images: int
    n_rows: int
    n_matched: int
    n_missing: int
    n_doubled: int
    n_left_over: int
    notes: tuple[str, ...]
    wall_s: float


def label(
    cache: str | Path | Cache, table: Any, *, by: str | None = None, on_note: OnNote = silent
) -> LabelResult:
    """Attach a table of labels to a cache, in the place of any before it.

    The features are not touched. ``featcache.load(cache).table`` then has every column but the
    one that names the images, with a row per image.

    Parameters
    ----------
    cache : str, Path or Cache
        A path, or the URL of a cache in a store, where the table is then written too.
    table : str, Path, pandas.DataFrame, pyarrow.Table or mapping
        A file or its URL (CSV, TSV, Parquet, JSON lines), or columns in memory.
    by : str, optional
        The column that names the images, by id, path or content hash (SHA-256 of the file). By
        default ``id``, ``path``, ``file_name`` or the like, whichever matches most.
    on_note : callable
        Called with the notes of the result.

    Raises
    ------
    TableError
        The table cannot be read, no row belongs to an image, or two rows of one image differ.
    CacheError
        There is no such cache, or it is damaged.
    OutputError, RemoteError
        The table cannot be written.
    """
    started = time.perf_counter()
    opened = cache if isinstance(cache, Cache) else load(cache)
    place = original(opened.path)
    if place is not None:
        place.check_writable()
    given = read_table(table)
    splits = [split for _, split in opened.splits()]
    ids = [id_ for split in splits for id_ in split.ids]
    place_of_images = opened.meta.get("dataset_path")
    known = [one for split in splits if (one := split.content_hashes) is not None]
    hashes = np.concatenate(known) if len(known) == len(splits) else None
    joined = join(given, ids, hashes, by=by, dataset_path=place_of_images)
    if len(given.columns) == 1:
        raise TableError(
            f"{given.source}: expected columns besides {joined.column!r}, which names the images, "
            "found none; add one"
        )
    aligned = given.without([joined.column]).take(joined.rows)
    facts: dict[str, Any] = {
        "source": given.source,
        "sha256": given.sha256,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "key": joined.key,
        "n_rows": len(given),
        "n_matched": len(aligned) - joined.n_missing,
        "n_missing": joined.n_missing,
        "n_doubled": joined.n_doubled,
        "n_left_over": joined.n_left_over,
    }
    path = attach(opened.path, opened.fingerprint, aligned, facts)
    opened.__dict__.pop("attached_table", None)  # what it read before
    if place is not None:
        place.parent.within(path.name).send(path, silent)
    columns = column_facts(aligned)
    notes = (*joined.notes, *_gaps(given.source, columns, joined.n_missing))
    for note in notes:
        on_note(note)
    return LabelResult(
        cache=opened.path,
        table=path,
        columns=columns,
        n_images=len(aligned),
        notes=notes,
        wall_s=time.perf_counter() - started,
        **{name: facts[name] for name in facts.keys() - {"sha256", "created"}},
    )


def detach(cache: str | Path | Cache) -> Path:
    """Remove the table of a cache, damaged or not, and return the path where it was.

    Raises
    ------
    CacheMissError
        There is no such cache, or it has no table.
    OutputError, RemoteError
        It cannot be removed.
    """
    opened = cache if isinstance(cache, Cache) else load(cache)
    path = table_path(opened.path)
    try:
        path.unlink()
    except FileNotFoundError:
        raise CacheMissError(f"{path}: expected a table of this cache, found none") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror}") from None
    opened.__dict__.pop("attached_table", None)
    if (place := original(opened.path)) is not None:
        place.parent.within(path.name).remove()
    return path


def _gaps(source: str, columns: Sequence[dict[str, Any]], n_without_row: int) -> list[str]:
    """Note the columns that lack a value in rows that are there."""
    gaps = [
        f"{column['name']!r:.80} in {column['n_missing'] - n_without_row:,}"
        for column in columns
        if column["n_missing"] > n_without_row
    ]
    if not gaps:
        return []
    more = f" and {len(gaps) - _SHOWN:,} more" if len(gaps) > _SHOWN else ""
    return [f"{source}: values are missing of {', '.join(gaps[:_SHOWN])} images{more}"]
