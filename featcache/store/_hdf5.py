"""Looking at an HDF5 file from a stranger: for child processes alone, which may die of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, CacheMissError
from ._index import AGAIN

__all__ = ["block_digests", "opened", "plain_attribute", "plain_dataset"]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file with h5py, and say in our words what h5py finds in a damaged one.

    Raises
    ------
    CacheCorruptError
        It cannot be read.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except CacheError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        # h5py turns whatever libhdf5 finds in a damaged file into any of these.
        raise CacheCorruptError(
            f"{path}: expected a readable HDF5 file, found: {error}; {AGAIN}"
        ) from None


def plain_attribute(file: Any, name: str, path: Path) -> str | int | float:
    """Return an attribute of the root that is text or a number.

    Raises
    ------
    CacheCorruptError
        It is anything else.
    """
    value = file.attrs[name]
    if isinstance(value, bytes):
        value = value.decode()
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, (str, int, float)):
        raise CacheCorruptError(
            f"{path}: expected text or a number in attribute {name!r}, found "
            f"{type(value).__name__}; {AGAIN}"
        )
    return value


def plain_dataset(file: Any, name: str, path: Path) -> Any:
    """Return a data set that lies in this file, unfiltered, reached by hard links alone.

    HDF5 can be told to read any file of the machine through links, external
    storage and virtual data sets, and to decompress a few bytes into terabytes.

    Raises
    ------
    CacheMissError
        There is none.
    CacheCorruptError
        It is one of these.
    """
    import h5py

    node = file
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise CacheMissError(f"{path}: expected {name}, found none in this file; {AGAIN}")
        if not isinstance(link, h5py.HardLink):
            raise CacheCorruptError(
                f"{path}: expected {name} in the file itself, found a "
                f"{type(link).__name__} to elsewhere; do not use this file"
            )
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise CacheCorruptError(f"{path}: expected an array at {name}, found a group; {AGAIN}")
    if node.external or node.is_virtual or node.chunks or node.dtype.kind not in "fiuS":
        raise CacheCorruptError(
            f"{path}: expected {name} as plain contiguous numbers or text, found external, "
            "virtual, filtered or other storage; do not use this file"
        )
    if node.nbytes > path.stat().st_size:
        raise CacheCorruptError(
            f"{path}: expected {name} to fit into the file, found {node.nbytes:,} bytes declared "
            f"in a file of {path.stat().st_size:,}; {AGAIN}"
        )
    return node


def block_digests(file: Any, name: str, n_blocks: int, path: Path) -> list[str]:
    """Return the SHA-256 (hex) that stand beside an array, one per block of rows.

    Raises
    ------
    CacheCorruptError
        There are not so many.
    """
    digests = plain_dataset(file, f"{name}_sha256", path)
    if digests.shape != (n_blocks, 32) or digests.dtype != np.uint8:
        raise CacheCorruptError(
            f"{path}: expected {n_blocks} SHA-256 beside {name}, found {digests.dtype} "
            f"{digests.shape}; {AGAIN}"
        )
    return [digest.tobytes().hex() for digest in digests[...]]
