"""The last step of an extraction: its shards become a cache, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..files import replace_folder, write_atomically
from ._format import StoredArray, seal
from ._index import COMMITS, MANIFEST, is_shards
from ._pack import pack
from ._sources import Source
from ._unfinished import remove_unfinished, shard_block
from ._walk import iterate_rows

__all__ = ["PACK_LIMIT_BYTES", "finish", "shards_path"]

PACK_LIMIT_BYTES = 8 << 30  # packing doubles the space on the disk for a while


def shards_path(path: Path) -> Path:
    """Return the folder that stands for a cache too large to be packed into ``path``."""
    return path.with_suffix(".shards")


def finish(
    folder: Path,
    commits: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    path: Path,
    pack_limit: int,
) -> Path:
    """Turn shards into a cache, and return its path.

    Parameters
    ----------
    folder : Path
        Where they lie; it goes.
    commits : sequence of mapping
        As `ShardWriter.commits`.
    meta : mapping
        The whole provenance.
    path : Path
        The ``.h5`` file.
    pack_limit : int
        Bytes up to which shards are packed into one file.

    Raises
    ------
    OutputError
        The disk is full; the shards stay.
    CacheCorruptError
        A shard was damaged since it was written.
    """
    arrays = _arrays(folder, commits)
    final, other = path, shards_path(path)
    if sum(array.size_bytes for array in arrays.values()) <= pack_limit:
        sources = {
            name: Source(array.dtype, array.shape, partial(iterate_rows, array))
            for name, array in arrays.items()
        }
        pack(final, sources, meta)
        remove_unfinished(folder)
    else:
        final, other = other, final
        described = {name: _described(array) for name, array in arrays.items()}
        write_atomically(folder / MANIFEST, seal({"meta": meta, "arrays": described}))
        _replace_folder(folder, final)
        # Until here a killed run could go on from them.
        shutil.rmtree(final / COMMITS, ignore_errors=True)
    # One of the two forms is the cache; what --force replaced may have been the other.
    if is_shards(other):
        shutil.rmtree(other)
    elif other.is_file():
        other.unlink()
    return final


def _arrays(folder: Path, commits: Sequence[Mapping[str, Any]]) -> dict[str, StoredArray]:
    """Return every array, its shards in the order of the rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for commit in commits:
        for name, spec in commit["arrays"].items():
            found.setdefault(f"{commit['role']}/{name}", []).append(spec)
    return {
        name: StoredArray(
            name,
            np.dtype(specs[0]["dtype"]),
            tuple(specs[0]["row_shape"]),
            tuple(shard_block(folder, spec) for spec in specs),
        )
        for name, specs in found.items()
    }


def _described(array: StoredArray) -> dict[str, Any]:
    """Return what the manifest says of an array."""
    return {
        "dtype": array.dtype.str,
        "row_shape": list(array.row_shape),
        "blocks": [
            [block.n_rows, block.offset, block.sha256, block.sums, block.path.name]
            for block in array.blocks
        ],
    }


def _replace_folder(folder: Path, final: Path) -> None:
    try:
        if final.exists() and not is_shards(final):
            raise FileExistsError(None, "something else has that name")
        replace_folder(folder, final)
    except OSError as error:
        raise OutputError(
            f"{final}: cannot be put in place: {error.strerror}; the shards are in {folder}"
        ) from None
