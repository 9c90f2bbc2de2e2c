"""Arrays by name out of the files of NumPy, safetensors, PyTorch and Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.pth import read_pth
from ..backbones.tensors import MAX_BYTES
from ..errors import DatasetError, WeightsError, missing_package, one_line
from ..tables.reading import read_table

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
}
_MAX_HEADER_BYTES = 1 << 26
_NUMBERED = re.compile(r"f\d+")


def read_npy(path: Path) -> dict[str, np.ndarray]:
    """Return the array of a ``.npy`` file, mapped, under the name ""."""
    try:
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except Exception as error:  # a damaged header raises even tokenize.TokenError
        raise _damaged(path, "a .npy file of numbers", error) from None


def read_npz(path: Path) -> dict[str, Any]:
    """Return the arrays of a ``.npz`` file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # of a zip archive, of zlib, or of a header
        raise _damaged(path, "a .npz file of arrays without objects", error) from None


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a ``.safetensors`` file, mapped, and its class names as a list."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as checked:  # the header, and that all tensors are inside
            names = list(checked.keys())
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "a .safetensors file", error) from None
    arrays: dict[str, Any] = {}
    for name in names:
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        start, end = header[name]["data_offsets"]
        if dtype not in _DTYPES:
            raise DatasetError(
                f"{path}: expected tensors as {', '.join(_DTYPES)}, found {one_line(name)} as "
                f"{one_line(dtype)}; convert it to float32"
            )
        if start == end:
            arrays[name] = np.empty(shape, _DTYPES[dtype])
        else:
            arrays[name] = np.memmap(path, _DTYPES[dtype], "r", 8 + length + start, shape)
    texts = header.get("__metadata__", {})
    try:
        class_names = json.loads(texts["class_names"])
    except (KeyError, TypeError, ValueError, RecursionError):
        class_names = None
    if isinstance(class_names, list):
        arrays["class_names"] = [str(name) for name in class_names]
    return arrays


def read_pt(path: Path) -> dict[str, Any]:
    """Return the tensors of what ``torch.save`` wrote, read without executing anything."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DatasetError(
                f"{path}: expected at most {MAX_BYTES:,} bytes, found "
                f"{path.stat().st_size:,}; save the tensor as .safetensors or .npy"
            )
        return dict(read_pth(path.read_bytes(), str(path), lone="features"))
    except WeightsError as error:
        raise DatasetError(
            f"{one_line(error)}; save a tensor or a dictionary of tensors, best as .safetensors"
        ) from None
    except OSError as error:
        raise _damaged(path, "a .pt file", error) from None


def read_parquet(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the columns of Parquet files one after another, and the text in their metadata.

    Numbers are arrays (N,), lists of numbers of one length (N, D), text is a list; lists of which
    some are missing are "".
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package(paths[0], "pyarrow", error, "parquet") from None
    try:
        tables = [parquet.ParquetFile(path).read() for path in paths]
        table = pyarrow.concat_tables(tables)
    except Exception as error:  # pyarrow raises OSError, ValueError, TypeError and its own
        raise _damaged(paths[0], "a .parquet file", error) from None
    facts = {
        key.decode("utf-8", "replace"): value.decode("utf-8", "replace")
        for key, value in (tables[0].schema.metadata or {}).items()
    }
    return {
        name: _column(name, table.column(name), paths[0])
        for name in dict.fromkeys(table.column_names)
        if not name.startswith("__index_level_")
    }, facts


def read_csv(path: Path) -> dict[str, Any]:
    """Return the columns of a CSV file: f0, f1, … as float32 (N,), ``label`` as int64 (N,)."""
    table = read_table(path)
    columns: dict[str, Any] = {}
    for name, column in table.columns.items():
        dtype = np.int64 if name == "label" else np.float32 if _NUMBERED.fullmatch(name) else None
        try:
            values = column.values if dtype is None else column.values.astype(dtype)
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path}: expected numbers in the column {name!r}, found: {one_line(error)}; "
                "correct it"
            ) from None
        columns[name] = values.tolist() if dtype is None else values
    return columns


def _column(name: str, column: Any, path: Path) -> Any:
    from pyarrow import types

    try:
        kind = column.type
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            inner = kind.value_type
            if not (types.is_floating(inner) or types.is_integer(inner)):
                return column.to_pylist()
            if column.null_count:
                return ""  # such as a view that test has not: it can only be left out
            parts = [_rows_of(chunk) for chunk in column.chunks if len(chunk)]
            return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
        if types.is_floating(kind) or types.is_integer(kind):
            return column.to_numpy()
        return column.to_pylist()
    except Exception as error:  # of the same kinds
        raise DatasetError(
            f"{path}: expected lists of one length or plain values in the column "
            f"{one_line(repr(name))}, found {one_line(error)}; leave the column out"
        ) from None


def _rows_of(chunk: Any) -> np.ndarray:
    from pyarrow import compute

    flat = chunk.flatten()
    if flat.null_count:
        raise ValueError("nulls in a list")
    width = len(flat) // len(chunk)
    if not (compute.list_value_length(chunk).to_numpy() == width).all():
        raise ValueError("lists of different lengths")
    rows: np.ndarray = flat.to_numpy().reshape(len(chunk), width)
    return rows


def _damaged(path: Path, expected: str, error: Exception) -> DatasetError:
    why = getattr(error, "strerror", None) or error
    return DatasetError(f"{path}: expected {expected}, found: {one_line(why)}; save it again")
