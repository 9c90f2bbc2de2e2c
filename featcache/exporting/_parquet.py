"""Parquet: one row per image, for whatever reads tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError
from ..files import replaced_file
from ..store import decode_id, label_names
from ._reading import Reading, text_of

__all__ = ["write_parquet"]

_GROUP_BYTES = 64 << 20
_GROUP_ROWS = 1 << 16
_REPEATED = ["split", "class"]  # columns of few values; a dictionary of features helps nobody


def write_parquet(path: Path, reading: Reading) -> None:
    """Write the columns split, id, label, class, features, and one per view and cut.

    Features are fixed_size_list<float32>, flattened where they are maps. A view that a
    split lacks is null there, and a list<float32>: pyarrow up to 25 does not read nulls
    among lists of a fixed size. The schema's metadata has ``featcache``, the
    provenance as JSON.

    Raises
    ------
    EngineUnavailableError
        pyarrow is not installed.
    OutputError
        It cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise EngineUnavailableError(
            f"parquet: expected the package pyarrow, found: {error}; type: pip install "
            "'featcache[parquet]'"
        ) from None

    widths = _widths(reading)
    group = max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * sum(widths.values()))))
    schema = pyarrow.schema(
        [
            pyarrow.field("split", pyarrow.string()),
            pyarrow.field("id", pyarrow.string()),
            pyarrow.field("label", pyarrow.int64()),
            pyarrow.field("class", pyarrow.string()),
            *(
                pyarrow.field(name, _list_type(pyarrow, reading, name, width))
                for name, width in widths.items()
            ),
        ],
        metadata={"featcache": json.dumps(reading.cache.meta)},
    )
    with ExitStack() as stack:
        descriptor = stack.enter_context(replaced_file(path))
        stream = stack.enter_context(os.fdopen(os.dup(descriptor), "wb"))
        writer = stack.enter_context(
            parquet.ParquetWriter(stream, schema, use_dictionary=_REPEATED)
        )
        for role in reading.roles:
            for columns in _groups(reading, role, widths, group):
                arrays = [_column(pyarrow, columns[field.name], field.type) for field in schema]
                writer.write_table(pyarrow.table(arrays, schema=schema))


def _widths(reading: Reading) -> dict[str, int]:
    """Return the columns of features, and how many numbers each has per image."""
    return {
        name.partition("_")[2]: int(np.prod(array.row_shape))
        for name, array in reading.arrays.items()
        if array.dtype.kind == "f"
    }


def _groups(
    reading: Reading, role: str, widths: dict[str, int], n_rows: int
) -> Iterator[dict[str, Any]]:
    """Yield the columns of some rows: text, numbers, or (n, width) of features."""
    present = [name for name in ("ids", "labels", *widths) if f"{role}_{name}" in reading.arrays]
    classes = label_names(reading.cache.class_names)
    walks = [reading.batches(f"{role}_{name}", n_rows) for name in present]
    for batch in zip(*walks, strict=True):
        found: dict[str, Any] = dict(zip(present, batch, strict=True))
        labels = found.pop("labels")
        rows = len(labels)
        yield {
            "split": [role] * rows,
            "id": [text_of(decode_id(name)) for name in found.pop("ids").tolist()],
            "label": labels,
            "class": [text_of(classes[label]) for label in labels],
            **{name: (rows, found.get(name)) for name in widths},
        }


def _list_type(pyarrow: Any, reading: Reading, name: str, width: int) -> Any:
    everywhere = all(f"{role}_{name}" in reading.arrays for role in reading.roles)
    return pyarrow.list_(pyarrow.float32(), width if everywhere else -1)


def _column(pyarrow: Any, values: Any, kind: Any) -> Any:
    if not isinstance(values, tuple):
        return pyarrow.array(values, kind)
    n_rows, features = values
    if features is None:
        return pyarrow.nulls(n_rows, kind)
    numbers = pyarrow.array(features.reshape(-1).astype(np.float32, copy=False))
    if pyarrow.types.is_fixed_size_list(kind):
        return pyarrow.FixedSizeListArray.from_arrays(numbers, kind.list_size)
    starts = np.arange(0, len(numbers) + 1, len(numbers) // n_rows, np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(starts), numbers)
