"""The feature cache: one HDF5 file, written whole, verified when read."""

from __future__ import annotations

from pathlib import Path

from ..errors import CacheMissError
from ..files import user_path
from ._cache import Cache, CachedSplit, load
from ._diff import DiffReport, FieldDiff, SplitDiff, diff
from ._finishing import PACK_LIMIT_BYTES, shards_path
from ._format import (
    BLOCK_ROWS,
    DTYPES,
    FINGERPRINT_FIELDS,
    FORMAT_VERSION,
    StoredArray,
    array_name,
    decode_id,
    differences,
    fingerprint,
    fingerprint_fields,
    label_names,
)
from ._gap import FeatureDiff
from ._index import COMMITS, is_shards
from ._lock import single_writer
from ._merge import MergeResult, merge
from ._pack import write_cache
from ._places import default_folder
from ._remote import (
    RemoteCache,
    cache_file,
    copies_folder,
    find_remote_cache,
    send_cache,
)
from ._remote_parts import MirroredWriter, RemoteParts
from ._shards import SHARD_ROWS, ShardWriter
from ._sources import SplitArrays, encoded_ids
from ._unfinished import (
    ShardRange,
    committed,
    discard_unfinished,
    read_ingredients,
    unfinished_folder,
)
from ._verify import VerifyReport, verify
from ._walk import iterate_rows

__all__ = [
    "BLOCK_ROWS",
    "COMMITS",
    "DTYPES",
    "FINGERPRINT_FIELDS",
    "FORMAT_VERSION",
    "PACK_LIMIT_BYTES",
    "SHARD_ROWS",
    "Cache",
    "CachedSplit",
    "DiffReport",
    "FeatureDiff",
    "FieldDiff",
    "MergeResult",
    "MirroredWriter",
    "RemoteCache",
    "RemoteParts",
    "ShardRange",
    "ShardWriter",
    "SplitArrays",
    "SplitDiff",
    "StoredArray",
    "VerifyReport",
    "array_name",
    "cache_file",
    "committed",
    "copies_folder",
    "decode_id",
    "default_folder",
    "diff",
    "differences",
    "discard_unfinished",
    "encoded_ids",
    "find_remote_cache",
    "fingerprint",
    "fingerprint_fields",
    "is_shards",
    "iterate_rows",
    "label_names",
    "load",
    "merge",
    "newest_cache",
    "read_ingredients",
    "send_cache",
    "shards_path",
    "single_writer",
    "unfinished_folder",
    "verify",
    "write_cache",
]


def newest_cache(folder: str | Path | None = None) -> Path:
    """Return the cache that was written last.

    Raises
    ------
    CacheMissError
        The folder holds none.
    """
    folder = default_folder() if folder is None else user_path(folder)
    found = (
        path
        for path in folder.glob("*")
        # What is hidden is not finished.
        if not path.name.startswith(".") and (path.suffix == ".h5" or is_shards(path))
    )
    caches = sorted(found, key=lambda path: path.stat().st_mtime_ns)
    if not caches:
        raise CacheMissError(
            f"{folder}: expected a feature cache (*.h5 or *.shards), found none; make one with "
            "featcache extract digits --weights tinyimagenet32"
        )
    return caches[-1]
