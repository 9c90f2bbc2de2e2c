"""Reading tables: CSV and its relatives, Parquet, JSON lines, and frames in memory."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TableError, missing_package, one_line
from ..files import csv_line
from ..remote import located
from .table import Column, Table, listed, number_text, objects

_TEXT = (".csv", ".tsv", ".txt", "")
_LINES = (".jsonl", ".ndjson")
_FORMS = "a table as .csv, .tsv, .txt, .parquet, .jsonl or .ndjson"
_DELIMITERS = ",;\t"
# Columns of a table to which each correction appends a row: the last one of an id counts.
CORRECTIONS = ("id", "label", "corrected")
_MOST_BYTES = 1 << 32  # of a table behind a URL
_ROWS_AT_ONCE = 1 << 16
_EXACT = 1 << 53  # whole numbers beyond it are not exact as float64
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NO_NAME = re.compile(r"[+-]?[\d.]+|.*\.(png|jpe?g|bmp|gif|tiff?|webp)", re.IGNORECASE)


def read_table(source: Any) -> Table:
    """Read a table of labels, or raise a TableError.

    From a file or its URL: CSV (``.csv``, ``.tsv``, ``.txt``; comma, semicolon or tab, UTF-8),
    ``.parquet``, or one JSON object per line (``.jsonl``, ``.ndjson``); or from a
    pandas.DataFrame (its index is a column where it has a name), a pyarrow.Table, or a mapping of
    names to sequences. All of a CSV file is text, and an empty field is missing. Elsewhere
    Booleans become ``"true"`` and ``"false"``, dates ISO text, and whole numbers that float64
    cannot hold text. Of a CSV file with the columns `CORRECTIONS`, each id's last row counts, and a
    last line that a killed writer left unfinished does not.
    """
    if isinstance(source, Table):
        table = source
    elif isinstance(source, (str, Path)):
        table = _read_file(source)
        if tuple(table.columns) == CORRECTIONS:
            table = _last_rows(table)
    elif isinstance(source, Mapping):
        table = _from_mapping(source, "the table")
    elif type(source).__module__.partition(".")[0] == "pandas" and hasattr(source, "columns"):
        table = _from_pandas(source)
    elif hasattr(source, "column_names") and hasattr(source, "schema"):
        table = _from_arrow(source, "the pyarrow.Table")
    else:
        raise TableError(
            f"expected {_FORMS}, a DataFrame, a pyarrow.Table or a mapping of columns, found "
            f"{type(source).__name__}"
        )
    if not len(table):
        raise TableError(f"{table.source}: expected rows, found columns without any; add rows")
    return table


def read_corrections(path: Path) -> Table:
    """Return every row of a table of `CORRECTIONS`, the earlier ones too; none may be there."""
    table = _read_file(path)
    if tuple(table.columns) != CORRECTIONS:
        raise TableError(
            f"{path}: expected a table with the columns {', '.join(CORRECTIONS)}, found "
            f"{listed(table.columns)}; name a new file, which begins with the labels of the cache"
        )
    return table


def _last_rows(table: Table) -> Table:
    last = {id_: row for row, id_ in enumerate(table["id"].values)}
    return table.take(np.fromiter(last.values(), np.int64, len(last)))


def whole_lines(data: bytes) -> bytes:
    """Return a table of `CORRECTIONS` up to its last line feed, and any other text as it is."""
    unfinished = data.startswith(csv_line(CORRECTIONS).encode()) and not data.endswith(b"\n")
    return data[: data.rindex(b"\n") + 1] if unfinished else data


def _read_file(source: str | Path) -> Table:
    place = located(source)
    where, suffix = str(place), place.suffix.lower()
    if suffix not in (*_TEXT, *_LINES, ".parquet"):
        raise TableError(f"{where}: expected {_FORMS}, found {suffix}; save it as CSV in UTF-8")
    try:
        if isinstance(place, Path):
            data = place.read_bytes()
        else:
            data = place.parent.read(place.name, _MOST_BYTES)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no such file"
        raise TableError(f"{where}: expected {_FORMS}, found: {why}; check its name") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if suffix == ".parquet":
        return _from_parquet(data, where, sha256)
    data = whole_lines(data)
    _check_text(data, where)
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    return (_from_lines if suffix in _LINES else _from_csv)(stream, where, sha256)


def _check_text(data: bytes, where: str) -> None:
    """Refuse text that is not UTF-8, and say what it looks like."""
    if not data.strip():
        raise TableError(f"{where}: expected a table, found an empty file; check its name")
    found = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "")
    line = 1
    if not found:
        n_nul = data.count(0)
        if n_nul > len(data) // 5:
            found = "UTF-16"
        elif n_nul:
            line = data.count(b"\n", 0, data.index(0)) + 1
            raise TableError(
                f"{where}, line {line}: expected text, found a NUL byte; save it again"
            )
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = found or _encoding(data)
            line = data.count(b"\n", 0, error.start) + 1
    if found:
        raise TableError(
            f"{where}, line {line}: expected UTF-8, found text that looks like {found}; save it as "
            "UTF-8"
        )


def _encoding(data: bytes) -> str:
    """Guess an encoding with one byte per letter from whether accented letters stand alone."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data[: 1 << 20])]
    if 2 * runs.count(1) > len(runs):
        return "Latin-1 (cp1252)"
    return "another encoding, such as cp1251, GB18030 or Shift-JIS"


def _from_csv(stream: io.TextIOWrapper, where: str, sha256: str) -> Table:
    first = re.sub(r'"[^"]*"', "", stream.readline())
    delimiter = max(_DELIMITERS, key=first.count)
    stream.seek(0)
    reader = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=True)
    line = 1
    try:
        header: list[str] = []
        while not header:
            line = reader.line_num + 1
            header = next(reader)
        names = _names(header, f"{where}, line {line}")
        lines: list[np.ndarray] = []
        columns: list[list[str]] = [[] for _ in names]
        known: list[dict[str, str]] = [{} for _ in names]  # equal texts share their memory
        ended = False
        while not ended:
            rows: list[list[str]] = []
            starts: list[int] = []
            ended = True
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(names):
                    rows.append(row)
                    starts.append(line)
                elif row:
                    raise TableError(
                        f"{where}, line {line}: expected {len(names)} fields as in the header, "
                        f"found {len(row)}; correct the line, or quote a field that holds the "
                        "delimiter"
                    )
                line = reader.line_num + 1
                if len(rows) == _ROWS_AT_ONCE:
                    ended = False
                    break
            for column, seen, values in zip(columns, known, zip(*rows, strict=True), strict=False):
                column.extend(map(seen.setdefault, values, values))
            lines.append(np.array(starts, np.int64))
    except csv.Error as error:
        raise TableError(
            f"{where}, line {line}: expected fields separated by {delimiter!r}, found {error}; "
            "correct the quotes in this line"
        ) from None
    del known
    read = {}
    for name, column in zip(names, columns, strict=True):
        texts = np.array(column, object)
        texts[texts == ""] = None
        read[name] = Column("text", texts)
    return Table(read, where, np.concatenate(lines), sha256)


def _names(header: Sequence[str], where: str) -> list[str]:
    """Return the names of columns; one without a name gets its number."""
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, start=1)]
    if all(_NO_NAME.fullmatch(name) for name in names) or any(
        name.lower().endswith((".png", ".jpg", ".jpeg")) for name in names
    ):
        raise TableError(
            f"{where}: expected a header with the names of the columns, found "
            f"{one_line(', '.join(names))}; add one, such as path,label"
        )
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise TableError(
            f"{where}: expected columns of different names, found {doubled[0]!r:.120} twice; "
            "rename one"
        )
    return names


def _from_lines(stream: io.TextIOWrapper, where: str, sha256: str) -> Table:
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = str(error) or "nested too deeply"
        if not isinstance(row, dict):
            found = row if isinstance(row, str) else f"{type(row).__name__}"
            raise TableError(
                f"{where}, line {number}: expected one JSON object per line, found "
                f"{one_line(found)}; correct the line"
            )
        for name in row.keys() - columns.keys():
            columns[name] = [None] * len(lines)
        for name, column in columns.items():
            column.append(row.get(name))
        lines.append(number)

    def place(row: int) -> str:
        return f"{where}, line {lines[row]}"

    if not lines or not columns:
        raise TableError(f"{where}: expected JSON objects with values, found none; check its name")
    read = {name: _column(name, columns[name], place) for name in columns}
    return Table(read, where, np.array(lines, np.int64), sha256)


def _from_mapping(source: Mapping[Any, Any], where: str) -> Table:
    names = _names([str(name) for name in source], where) if source else []
    columns = {}
    for name, values in zip(names, source.values(), strict=True):
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TableError(
                f"{where}: expected a sequence in the column {name!r}, found "
                f"{type(values).__name__}"
            )
        columns[name] = _column(name, list(values), lambda row: f"{where}, row {row}")
    return Table(columns, where)


def _from_pandas(frame: Any) -> Table:
    where = "the DataFrame"
    names = [str(name) for name in frame.columns]
    if any(name is not None and str(name) not in names for name in frame.index.names):
        frame = frame.reset_index()
        names = [str(name) for name in frame.columns]
    _names(names, where)
    # By position, since names may be of any type.
    columns = [frame.iloc[:, number].tolist() for number in range(len(names))]
    return _from_mapping(dict(zip(names, columns, strict=True)), where)


def _column(name: str, values: list[Any], place: Callable[[int], str]) -> Column:
    """Return a column of values of any type, or raise TableError at one that has no place."""
    kinds = Counter(map(_kind, values))
    del kinds["missing"]
    if kinds.keys() <= {"text"}:
        seen: dict[str, str] = {}
        texts = (seen.setdefault(it, it) if isinstance(it, str) else None for it in values)
        return Column("text", objects(texts, len(values)))
    if kinds.keys() == {"number"} and all(
        _kind(it) == "missing" or _is_exact_as_float(it) for it in values
    ):
        plain = (np.nan if _kind(it) == "missing" else float(it) for it in values)
        return Column("number", np.fromiter(plain, np.float64, len(values)))
    for row, value in enumerate(values):
        kind = _kind(value)
        if kind == "other" or ("list" in kinds and kind not in ("list", "missing")):
            raise _no_place(name, repr(value), place(row))
    if "list" in kinds:
        lists = (
            None if _kind(it) == "missing" else tuple(_texts(it, name, place(row)))
            for row, it in enumerate(values)
        )
        return Column("list", objects(lists, len(values)))
    texts = (None if _kind(it) == "missing" else _text(it) for it in values)
    return Column("text", objects(texts, len(values)))


def _is_exact_as_float(value: Any) -> bool:
    """Tell whether a number is no whole number that float64 cannot hold."""
    if isinstance(value, (int, np.integer)):
        return abs(int(value)) <= _EXACT
    return abs(value) <= _EXACT or not float(value).is_integer()


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if value is None or value is np.nan or type(value).__name__ in ("NAType", "NaTType"):
        return "missing"
    if isinstance(value, (bool, np.bool_)):
        return "flag"
    if isinstance(value, (int, float, np.integer, np.floating)):
        return "missing" if value != value else "number"
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return "list"
    return "date" if hasattr(value, "isoformat") else "other"


def _text(value: Any) -> str:
    """Return text for a value that `_kind` knows."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if isinstance(value, (int, np.integer)) or not math.isfinite(value):
        return str(value)
    return str(number_text(float(value)))


def _texts(values: Iterable[Any], name: str, where: str) -> Iterator[str]:
    for value in values:
        if _kind(value) in ("list", "other", "missing"):
            raise _no_place(name, repr([value]), where)
        yield _text(value)


def _no_place(name: str, found: object, where: str) -> TableError:
    return TableError(
        f"{where}: expected text, numbers, or lists of text in the column {name!r:.120}, found "
        f"{one_line(found)}; leave the column out, or flatten it"
    )


def _from_parquet(data: bytes, where: str, sha256: str) -> Table:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package(where, "pyarrow", error, "parquet") from None
    try:
        frame = parquet.ParquetFile(pa.BufferReader(data)).read()
    except Exception as error:  # pyarrow raises OSError, ValueError, TypeError and its own
        raise TableError(
            f"{where}: expected a Parquet file, found {one_line(error)}; write it again"
        ) from None
    return _from_arrow(frame, where, sha256)


def _from_arrow(frame: Any, where: str, sha256: str = "") -> Table:
    names = _names(frame.column_names, where)
    columns = {
        name: _from_arrow_column(name, frame.column(number), where)
        for number, name in enumerate(names)
        if not re.fullmatch(r"__index_level_\d+__", name)  # of a DataFrame, without a name
    }
    return Table(columns, where, None, sha256)


def _from_arrow_column(name: str, column: Any, where: str) -> Column:
    import pyarrow as pa
    from pyarrow import compute, types

    def place(row: int) -> str:
        return f"{where}, row {row}"

    kind = column.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    try:
        if types.is_integer(kind):
            column = column.cast(kind)
            limits = compute.min_max(column).as_py()
            if any(abs(limit) > _EXACT for limit in limits.values() if limit is not None):
                kind = pa.string()
        if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
            numbers = column.cast(pa.float64(), safe=False).to_numpy()
            return Column("number", np.array(numbers, np.float64))
        if types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind):
            texts = column.cast(kind).cast(pa.large_string()).to_numpy()
            known: dict[str, str] = {}
            shared = (None if it is None else known.setdefault(it, it) for it in texts)
            return Column("text", objects((it or None for it in shared), len(texts)))
        inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
        if not (types.is_temporal(inner) or types.is_null(inner)) and inner is kind:
            raise _no_place(name, kind, where)
        return _column(name, column.to_pylist(), place)
    except TableError:
        raise
    except Exception as error:  # as of the file: whatever pyarrow raises
        raise TableError(
            f"{where}: cannot read the column {name!r:.120}: {one_line(error)}; leave it out"
        ) from None
