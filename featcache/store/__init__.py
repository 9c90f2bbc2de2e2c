"""The feature cache: one HDF5 file, written whole, verified when read."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CacheMissError
from ._format import (
    BLOCK_ROWS,
    FINGERPRINT_FIELDS,
    FORMAT_VERSION,
    block_checksums,
    differences,
    fingerprint,
)
from ._reader import Cache, CachedSplit, load
from ._writer import SplitArrays, write_cache

__all__ = [
    "BLOCK_ROWS",
    "FINGERPRINT_FIELDS",
    "FORMAT_VERSION",
    "Cache",
    "CachedSplit",
    "SplitArrays",
    "block_checksums",
    "default_folder",
    "differences",
    "fingerprint",
    "load",
    "newest_cache",
    "write_cache",
]


def default_folder() -> Path:
    """Return where caches and runs land: ``$FEATCACHE_DIR``, else ``cache`` here."""
    return Path(os.environ.get("FEATCACHE_DIR") or "cache")


def newest_cache(folder: Path | None = None) -> Path:
    """Return the cache that was written last.

    Raises
    ------
    CacheMissError
        The folder holds none.
    """
    folder = folder or default_folder()
    found = (path for path in folder.glob("*.h5") if path.is_file())
    caches = sorted(found, key=lambda path: path.stat().st_mtime_ns)
    if not caches:
        raise CacheMissError(
            f"{folder}: expected a feature cache (*.h5), found none; make one with featcache "
            "extract digits --weights tinyimagenet32"
        )
    return caches[-1]
