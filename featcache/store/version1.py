"""Version 1 files: HDF5 without an index, described by a child process.

libhdf5 can crash the process that opens a damaged file. So a child opens it, refuses
what is rigged, and prints where the arrays lie; the parent reads them as any other
cache's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheMismatchError
from .format import BLOCK_ROWS, FINGERPRINT_FIELDS, FORMAT
from .h5py_view import (
    answer_parent,
    block_digests,
    opened,
    plain_attribute,
    plain_dataset,
    run_in_child,
)
from .index import AGAIN

# What version 1 kept as JSON text, for want of an HDF5 type.
_JSON_FIELDS = frozenset(("class_names", "preprocess", "views"))
_NAMES = ("features", "labels", "ids")


def index_in_child(path: Path) -> dict[str, Any]:
    """Return the index of a version 1 file, made by a child process.

    Raises
    ------
    CacheError
        What the child found wrong, or that it did not survive the file.
    """
    return run_in_child(__name__, path)


def describe(path: Path) -> dict[str, Any]:
    """Return the index of a version 1 file.

    Raises
    ------
    CacheCorruptError
        Not a cache, damaged, or built to read outside itself.
    """
    with opened(path) as file:
        meta = {name: _attribute(file, name, path) for name in file.attrs}
        if meta.get("format") != FORMAT:
            raise CacheCorruptError(
                f"{path}: expected a featcache file, found HDF5 without its mark (attribute "
                f"format = {FORMAT!r}); name a file that featcache extract wrote"
            )
        if meta.get("format_version") != 1:
            raise CacheMismatchError(
                f"{path}: expected format version 1 in a file without an index, found "
                f"{meta.get('format_version')!r}; {AGAIN}"
            )
        for name in ("class_names", "fingerprint", "cut", *FINGERPRINT_FIELDS):
            if name not in meta and name != "cuts":
                raise CacheCorruptError(
                    f"{path}: expected the attribute {name!r}, found none; {AGAIN}"
                )
        names = [f"{role}/{name}" for role in ("train", "test") for name in _NAMES]
        names += [f"train/views/{view}" for view in meta["views"] if view != "identity"]
        return {"meta": meta, "arrays": {name: _describe(file, name, path) for name in names}}


def _attribute(file: Any, name: str, path: Path) -> Any:
    value = plain_attribute(file, name, path)
    return json.loads(str(value)) if name in _JSON_FIELDS else value


def _describe(file: Any, name: str, path: Path) -> dict[str, Any]:
    array = plain_dataset(file, name, path)
    n_rows = array.shape[0] if array.shape else 0
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    offset = array.id.get_offset() or 0
    digests = block_digests(file, name, -(-n_rows // BLOCK_ROWS), path)
    return {
        "dtype": array.dtype.str,
        "row_shape": list(array.shape[1:]),
        "blocks": [
            [
                min(BLOCK_ROWS, n_rows - number * BLOCK_ROWS),
                offset + number * BLOCK_ROWS * row_bytes,
                digest,
                "",  # no sums yet
            ]
            for number, digest in enumerate(digests)
        ],
    }


if __name__ == "__main__":
    answer_parent(describe)
