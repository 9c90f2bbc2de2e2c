"""Writing one HDF5 file of any size in little memory, whole or not at all.

On a full disk libhdf5 crashes the interpreter, and a file that it was killed in is
lost; so it never touches the disk here. It lays out an empty file in memory and says
where the arrays' bytes would lie. Then the file is written beside its final name with
plain calls: arrays, structure, and the index in front; flushed, and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ShapeMismatchError
from ..files import replaced_file
from ._format import BLOCK_ROWS, FORMAT, FORMAT_VERSION, fingerprint
from ._layout import Layout
from ._sources import Source, SplitArrays, split_sources
from ._sums import Digests

__all__ = ["complete_meta", "pack", "write_cache"]


def pack(path: Path, sources: Mapping[str, Source], meta: Mapping[str, Any]) -> None:
    """Write one file under its final name, when every byte of it is on the disk.

    Parameters
    ----------
    path : Path
        The ``.h5`` file; replaced if it exists.
    sources : mapping of str to Source
        By the array's name in the file.
    meta : mapping
        Every field of the provenance.

    Raises
    ------
    OutputError
        The file cannot be written; the old one, if any, is untouched.
    """
    meta = complete_meta(meta)
    with replaced_file(path) as descriptor:
        layout = Layout(sources, meta)
        blocks = {
            name: _write_array(descriptor, layout.offsets[name], source)
            for name, source in sources.items()
        }
        layout.put_checksums(blocks)
        for offset, piece in layout.structure():
            _write(descriptor, memoryview(piece), offset)
        os.truncate(descriptor, layout.size_bytes)
        _write(descriptor, memoryview(layout.user_block(blocks)), 0)


def write_cache(path: Path, splits: Mapping[str, SplitArrays], meta: Mapping[str, Any]) -> None:
    """Write a cache of arrays in memory.

    Parameters
    ----------
    path : Path
        The ``.h5`` file; replaced if it exists.
    splits : mapping of str to SplitArrays
        ``"train"`` and ``"test"``.
    meta : mapping
        Every field of the provenance; those of the fingerprint must be there.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    sources = {
        name: source
        for role, split in splits.items()
        for name, source in split_sources(role, split).items()
    }
    pack(path, sources, meta)


def complete_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance with the fields that belong to the format, in front."""
    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint({**meta, "format_version": FORMAT_VERSION}),
    }
    return {**own, **{name: value for name, value in meta.items() if name not in own}}


def _write_array(descriptor: int, offset: int, source: Source) -> list[list[Any]]:
    """Write an array's rows and return its blocks: rows, offset, SHA-256 and sums of each."""
    row_bytes = int(np.prod(source.shape[1:], dtype=np.int64)) * source.dtype.itemsize
    blocks: list[list[Any]] = []
    digests, filled, at = Digests(), 0, offset
    for part in source.blocks():
        if part.dtype != source.dtype or part.shape[1:] != source.shape[1:]:
            raise ShapeMismatchError(
                f"expected rows of {source.dtype} {source.shape[1:]}, found {part.dtype} "
                f"{part.shape[1:]}"
            )
        start = 0
        while start < len(part):
            rows = np.ascontiguousarray(part[start : start + BLOCK_ROWS - filled])
            data = rows.reshape(-1).view(np.uint8).data
            digests.update(data)
            _write(descriptor, data, at)
            at += len(data)
            start += len(rows)
            filled += len(rows)
            if filled == BLOCK_ROWS:
                blocks.append([filled, at - filled * row_bytes, *digests.hexdigests()])
                digests, filled = Digests(), 0
    if filled:
        blocks.append([filled, at - filled * row_bytes, *digests.hexdigests()])
    if sum(block[0] for block in blocks) != source.shape[0]:
        raise ShapeMismatchError(f"expected {source.shape[0]} rows, found another number")
    return blocks


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
