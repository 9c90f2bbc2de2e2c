"""Altered tables of labels: CSV, TSV, JSON lines, Parquet; read, joined, and asked."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from featcache.errors import FeatcacheError, visible
from featcache.tables.joining import join
from featcache.tables.reading import read_table
from featcache.tables.target import read_target
from featcache.tables.where import rows_where

IDS = [f"train/{'cat' if n % 2 else 'dog'}/{n:02d}.png" for n in range(24)]
COLUMNS = {
    "path": IDS,
    "label": ["cat" if n % 2 else "dog" for n in range(24)],
    "age": [n / 3 for n in range(24)],
    "split": ["test" if n % 4 == 0 else "train" for n in range(24)],
    "tags": ["a|b" if n % 3 else "b" for n in range(24)],
}
TASKS = ("auto", "classification", "multilabel", "regression")
ODD = [
    *("", " ", "\0", "\n", "\r", '"', "'", ",", "\t", "\ufeff", "\u202e", "\x1b[31m", "\ud800"),
    *("nan", "inf", "-inf", "1e999", "9" * 401, "0x1F", "1_000", "true", "None", "NaT", "é" * 3000),
    *(None, True, 0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), 0.1),
    *([], {}, [[]], ["a", None], ["a", 1], {"a": {"b": []}}, ["\0"], [float("nan")], [10**400]),
]
CONDITIONS = [
    *("label == 'cat'", "age > 3", "missing(tags)", "'a' in tags", "label in ['cat', 1]"),
    *("(" * 300, "not " * 900 + "age > 1", "age > 10**9**9", "age > 1e999", "`label` == ''"),
    *("1 < age < 5 and not missing(age)", "age == label", "lable == 1", "", "\0", "age > -True"),
    "label == '\ud800'",
]


def _as_csv(rows: list[list[object]], delimiter: str = ",") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, escapechar="\\").writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _as_lines(rows: list[list[object]]) -> bytes:
    names = [str(name) for name in rows[0]]
    lines = (json.dumps(dict(zip(names, row, strict=False))) for row in rows[1:])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _rows() -> list[list[object]]:
    return [list(COLUMNS), *map(list, zip(*COLUMNS.values(), strict=True))]


def _seed(name: str, data: bytes):
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    return write


def _as_parquet(columns: dict[str, object]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


SEEDS = {
    "empty": _seed("t.csv", b""),
    "nul": _seed("t.csv", b"path,label\n\0,\0\n"),
    "utf-16": _seed("t.csv", _as_csv(_rows()).decode().encode("utf-16")),
    "one field of a megabyte": _seed("t.csv", b"path,label\n" + b"a" * 1_000_000 + b",x\n"),
    "10,000 columns": _seed("t.csv", b",".join(b"c%d" % n for n in range(10_000)) + b"\n1\n"),
    "deep json": _seed("t.jsonl", b'{"path":' + b"[" * 100_000 + b"\n"),
    "json of many digits": _seed("t.jsonl", b'{"path": "a", "label": ' + b"9" * 5000 + b"}\n"),
    "json that is no object": _seed("t.jsonl", b'["path"]\n3\nnull\n'),
    "json of one name twice": _seed("t.jsonl", b'{"path": "a", "path": "b"}\n'),
    "no parquet": _seed("t.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1"),
    "huge footer": _seed("t.parquet", b"PAR1" + b"\0" * 8 + b"\xff\xff\xff\x7fPAR1"),
    "binary column": _seed(
        "t.parquet", _as_parquet({"path": IDS, "label": [b"\xff\0"] * len(IDS)})
    ),
    "nested column": _seed("t.parquet", _as_parquet({"path": IDS, "label": [{"a": [1]}] * 24})),
    "all null": _seed("t.parquet", _as_parquet({"path": IDS, "label": pa.nulls(24)})),
}


def alter(rng: random.Random, folder: Path) -> Path:
    """Write a table with some names, values, rows or bytes changed."""
    rows = _rows()
    for _ in range(rng.randint(0, 4)):
        row = rng.choice(rows[:3] if rng.random() < 0.3 else rows)
        what = rng.random()
        if what < 0.6 and row:
            row[rng.randrange(len(row))] = rng.choice(ODD)
        elif what < 0.7:
            row.append(rng.choice(ODD))
        elif what < 0.8 and row:
            row.pop()
        elif what < 0.9:
            rows.append(list(rng.choice(rows)))
        else:
            column = rng.randrange(5)
            value = rng.choice(ODD)
            for one in rows[1:]:
                one[column : column + 1] = [value]
    form = rng.choice(("csv", "tsv", "jsonl", "parquet"))
    if form == "parquet":
        data = _altered_parquet(rng)
    else:
        data = _as_lines(rows) if form == "jsonl" else _as_csv(rows, "\t" if form == "tsv" else ",")
    if rng.random() < (0.5 if form == "parquet" else 0.2):
        data = _damaged(rng, data)
    path = folder / f"table.{form}"
    path.write_bytes(data)
    return path


def _altered_parquet(rng: random.Random) -> bytes:
    columns: dict[str, object] = dict(COLUMNS)
    types = [pa.int8(), pa.float16(), pa.bool_(), pa.binary(), pa.date32(), pa.duration("ns")]
    types += [pa.timestamp("us", "Asia/Kolkata"), pa.time64("ns"), pa.decimal128(38, 10)]
    types += [pa.list_(pa.string()), pa.map_(pa.string(), pa.int8()), pa.large_string()]
    types += [pa.dictionary(pa.int8(), pa.string()), pa.struct([("a", pa.int64())])]
    for name in rng.sample(list(columns), rng.randint(0, 2)):
        kind = rng.choice(types)
        value = rng.choice([None, 1, "x", b"\xff", True, 0.5, ["a"], [("a", 1)], {"a": 3}])
        try:
            array = pa.array([value] * 24, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError):
            array = pa.nulls(24, kind)
        columns[name] = array
    if rng.random() < 0.2:
        columns[rng.choice(["", "path ", "\0", "x" * 4000, "\x1b[2J"])] = ["1"] * 24
    try:
        return _as_parquet(columns)
    except pa.ArrowException:
        return _as_parquet(dict(COLUMNS))


def _damaged(rng: random.Random, data: bytes) -> bytes:
    altered = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        altered[rng.randrange(len(altered))] = rng.randrange(256)
    return bytes(altered[: rng.randrange(len(altered))] if rng.random() < 0.3 else altered)


def read(path: Path) -> None:
    """Read a table, join it to images, and ask for targets and conditions."""
    table = read_table(path)
    for condition in CONDITIONS:
        try:
            rows_where(table, condition)
        except FeatcacheError as error:
            assert_one_line(error)
    for name in list(table.columns)[:6]:
        for task in TASKS:
            try:
                read_target(table, [name], task=task, separator="|" if name == "tags" else None)
            except FeatcacheError as error:
                assert_one_line(error)
    rows = join(table, IDS).rows
    read_target(table.take(rows), ["label"])


def assert_one_line(error: FeatcacheError) -> None:
    """Check a message as a terminal shows it."""
    text = visible(" ".join(str(error).splitlines()))
    assert len(text) < 2_000 and text.isprintable(), text[:300]
