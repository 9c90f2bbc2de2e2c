"""The table that a data set came with goes beside its cache."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np

from ..datasets.dataset import Dataset
from ..remote import RemotePlace, located
from ..store.table_file import attach
from .result import ExtractResult


def attach_table(dataset: Dataset, result: ExtractResult) -> None:
    """Attach a data set's table to the cache that was made of it, in the place of any before."""
    table = dataset.table
    if table is None:
        return
    cache = result.load()
    row_of = {id_: row for row, id_ in enumerate(dataset.table_ids)}
    ids = (id_ for _, split in cache.splits() for id_ in split.ids)
    rows = np.fromiter((row_of.get(id_, -1) for id_ in ids), np.int64)
    n_missing = int((rows < 0).sum())
    facts = {
        "source": table.source,
        "sha256": table.sha256,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "key": "the images of the data set",
        "n_rows": len(table),
        "n_matched": len(rows) - n_missing,
        "n_missing": n_missing,
        "n_doubled": 0,
        "n_left_over": len(table) - (len(rows) - n_missing),
    }
    path = attach(cache.path, cache.fingerprint, table.take(rows), facts)
    place = located(result.cache)
    if isinstance(place, RemotePlace):
        place.parent.within(path.name).send(path, lambda done: None)
