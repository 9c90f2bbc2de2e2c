"""The table of labels beside a cache: ``NAME.table``, sealed JSON whose rows are the cache's.

A file of its own, since labels change and features do not. Text is stored as a list of the
different values and their numbers, in the smallest type that holds them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheMismatchError, TableError, one_line
from ..files import write_atomically
from ..schema import count, text, words, wrong_fields
from ..tables.table import Column, Table, objects
from .format import seal, unseal
from .index import NOT_MEANT

SUFFIX = ".table"
_VERSION = 1
_MOST_BYTES = 1 << 29
_CODES = ("|i1", "<i2", "<i4")  # what the numbers of values are stored as; -1 is missing
_NUMBERS = "<f8"
_FACTS = {
    "source": text,
    "sha256": text,
    "created": text,
    "key": text,
    "n_rows": count(),
    "n_matched": count(),
    "n_missing": count(),
    "n_doubled": count(),
    "n_left_over": count(),
}


@dataclass(frozen=True, eq=False)
class AttachedTable:
    """A table whose rows are those of a cache: of train, val if there is one, and test.

    ``facts`` say where it came from: ``source``, its ``sha256`` (``""`` if it was no file),
    ``created``, ``key`` (how its rows found their images), ``n_rows`` of the source, and the
    images that have a row (``n_matched``) or none (``n_missing``), rows that repeat another
    (``n_doubled``) and rows without an image (``n_left_over``).
    """

    table: Table
    facts: dict[str, Any]


def table_path(cache: Path) -> Path:
    """Return where the table of a cache is, if it has one."""
    return cache.with_suffix(SUFFIX)


def attach(cache: Path, fingerprint: str, table: Table, facts: Mapping[str, Any]) -> Path:
    """Write the table of a cache, in the place of any before it, and return its path.

    ``table`` has the rows of the cache; ``facts`` are those of `AttachedTable`.
    """
    data = seal(
        {
            "version": _VERSION,
            "fingerprint": fingerprint,
            "n_rows": len(table),
            "facts": {name: facts[name] for name in _FACTS},
            "columns": [_encoded(name, column) for name, column in table.columns.items()],
        }
    )
    if len(data) > _MOST_BYTES:
        raise TableError(
            f"{table.source}: expected at most {_MOST_BYTES:,} bytes, found {len(data):,}; leave "
            "out columns that are different in every row"
        )
    path = table_path(cache)
    write_atomically(path, data)
    return path


def attached(cache: Path, fingerprint: str, n_rows: int) -> AttachedTable | None:
    """Read and check the table of a cache; return None where it has none."""
    path = table_path(cache)
    if not path.exists():
        return None
    again = f"attach one again with featcache label {cache} TABLE, or --detach this"
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _MOST_BYTES:
            raise ValueError(f"{size:,} bytes, or no file")
        content = unseal(path.read_bytes())
        if content["version"] != _VERSION:
            raise CacheMismatchError(
                f"{path}: expected version {_VERSION} of tables, found "
                f"{content['version']!r:.40}; {again}"
            )
        if content["fingerprint"] != fingerprint:
            raise CacheMismatchError(
                f"{path}: expected a table of {cache.name}, found that of another cache, which "
                f"had this name before; {again}"
            )
        if content["n_rows"] != n_rows:
            raise ValueError(f"{content['n_rows']!r:.40} rows for {n_rows:,} images")
        facts = {name: content["facts"][name] for name in _FACTS}
        for name in wrong_fields(facts, _FACTS, {}):
            raise ValueError(f"{one_line(facts[name])} as {name}")
        columns = {spec["name"]: _decoded(spec, n_rows) for spec in content["columns"]}
        if len(columns) != len(content["columns"]) or not columns:
            raise ValueError("no columns, or two of one name")
    except (*NOT_MEANT, OSError) as error:
        why = f"none of {error}" if isinstance(error, KeyError) else str(error)
        raise CacheCorruptError(
            f"{path}: expected a table that featcache label wrote, found {why}; {again}"
        ) from None
    return AttachedTable(Table(columns, str(path)), facts)


def column_facts(table: Table) -> list[dict[str, Any]]:
    """Return name, kind, number of different values and of missing ones of each column."""
    return [
        {
            "name": name,
            "kind": column.kind,
            "n_values": len(set(column.values[~column.missing].tolist())),
            "n_missing": int(column.missing.sum()),
        }
        for name, column in table.columns.items()
    ]


def _encoded(name: str, column: Column) -> dict[str, Any]:
    if column.kind == "number":
        return {"name": name, "kind": column.kind, "numbers": _packed(column.values, _NUMBERS)}
    number_of: dict[Any, int] = {}
    codes = [
        -1 if value is None else number_of.setdefault(value, len(number_of))
        for value in column.values
    ]
    dtype = next(dtype for dtype in _CODES if len(number_of) - 1 <= np.iinfo(dtype).max)
    return {
        "name": name,
        "kind": column.kind,
        "values": list(number_of),
        "dtype": dtype,
        "codes": _packed(np.array(codes, np.int64), dtype),
    }


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _decoded(spec: Mapping[str, Any], n_rows: int) -> Column:
    name, kind = spec["name"], spec["kind"]
    if not (name and words(name)) or kind not in ("text", "number", "list"):
        raise ValueError(f"a column {name!r:.80} of the kind {kind!r:.40}")
    if kind == "number":
        numbers = _array(spec["numbers"], _NUMBERS, n_rows, name)
        return Column("number", numbers.astype(np.float64))
    if spec["dtype"] not in _CODES or not isinstance(spec["values"], list):
        raise ValueError(f"{spec['dtype']!r:.40} as the type of {name!r:.80}")
    codes = _array(spec["codes"], spec["dtype"], n_rows, name)
    values = spec["values"] if kind == "text" else [tuple(value) for value in spec["values"]]
    parts = values if kind == "text" else (part for value in values for part in value)
    if not all(map(text, parts)):
        raise ValueError(f"values of {name!r:.80} that are no text")
    if n_rows and not -1 <= int(codes.min()) <= int(codes.max()) < len(values):
        raise ValueError(f"numbers beyond the {len(values):,} values of {name!r:.80}")
    return Column(kind, objects([*values, None], len(values) + 1)[codes])


def _array(packed: str, dtype: str, n_rows: int, name: str) -> np.ndarray:
    data = base64.b64decode(packed, validate=True)
    if len(data) != n_rows * np.dtype(dtype).itemsize:
        raise ValueError(f"{len(data):,} bytes of {name!r:.80} for {n_rows:,} rows")
    return np.frombuffer(data, dtype)
