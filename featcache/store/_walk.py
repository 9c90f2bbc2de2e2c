"""Walking through arrays larger than the memory: a few rows at a time, every block verified."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ._arrays import bad_block, read_into, unreadable
from ._format import Block, StoredArray
from ._sums import Digests

__all__ = ["iterate_block", "iterate_rows"]

PIECE_BYTES = 4 << 20


def iterate_rows(array: StoredArray, piece_bytes: int = PIECE_BYTES) -> Iterator[np.ndarray]:
    """Read an array from its first row to its last, in pieces.

    Whatever is made of the rows must not count before the walk is over: a block's
    checksums are known, and compared, when its last piece is at hand.

    Parameters
    ----------
    array : StoredArray
        Where its blocks lie.
    piece_bytes : int
        About how much is in memory at a time; a row at least.

    Yields
    ------
    numpy.ndarray
        (rows of the piece, …), of the array's dtype; the memory is the caller's.

    Raises
    ------
    CacheCorruptError
        A block is not what was written, or cannot be read.
    """
    for number in range(len(array.blocks)):
        yield from iterate_block(array, number, piece_bytes)


def iterate_block(
    array: StoredArray, number: int, piece_bytes: int = PIECE_BYTES
) -> Iterator[np.ndarray]:
    """Read one block of an array, as `iterate_rows` does."""
    block = array.blocks[number]
    piece_rows = max(1, piece_bytes // max(1, array.row_bytes))
    digests = Digests()
    try:
        with open(block.path, "rb", buffering=0) as stream:
            stream.seek(block.offset)
            for start in range(0, max(1, block.n_rows), piece_rows):
                n_rows = min(piece_rows, block.n_rows - start)
                rows = np.empty((n_rows, *array.row_shape), array.dtype)
                data = rows.reshape(-1).view(np.uint8).data
                read_into(data, stream, block.path)
                digests.update(data)
                if start + n_rows == block.n_rows and not _is_right(block, digests):
                    raise bad_block(array, number)
                if n_rows:
                    yield rows
    except OSError as error:
        raise unreadable(block.path, error) from None


def _is_right(block: Block, digests: Digests) -> bool:
    sha256, sums = digests.hexdigests()
    return sha256 == block.sha256 and block.sums in ("", sums)
