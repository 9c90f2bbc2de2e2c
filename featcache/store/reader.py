"""Reading arrays through the index: whole and verified, or mapped and left on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import FileIO
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..cores import usable_cores
from ..errors import CacheCorruptError
from ..files import open_file
from .format import Block, Checksums, Stamp, StoredArray
from .index import AGAIN, replaced

_MAX_MAPS = 4096  # of one array at a time: Linux allows a process 65,530 in all
_PIECE_BYTES = 512 << 10  # hashed while it is in the processor's cache
_THREADS = 4  # reading and hashing release Python's lock; more would wait for the memory


def reading_threads() -> int:
    """Return how many threads read and check blocks at once."""
    return min(_THREADS, usable_cores())


def read_array(array: StoredArray) -> np.ndarray:
    """Return a whole array, read-only, after a check of every block's XXH3-128."""
    whole = np.empty(array.shape, array.dtype)
    if len(array.blocks) == 1:  # a thread would take longer to start than a shard's ids to read
        if not _is_sound(array.blocks[0], whole):
            raise bad_block(array, 0)
        whole.setflags(write=False)
        return whole
    starts = np.cumsum([0, *(block.n_rows for block in array.blocks)])
    with ThreadPoolExecutor(reading_threads()) as pool:
        jobs = [
            pool.submit(_is_sound, block, whole[start : start + block.n_rows])
            for block, start in zip(array.blocks, starts[:-1], strict=True)
        ]
        try:
            for number, job in enumerate(jobs):
                if not job.result():
                    raise bad_block(array, number)
        finally:
            pool.shutdown(cancel_futures=True)
    whole.setflags(write=False)
    return whole


def bad_block(array: StoredArray, number: int) -> CacheCorruptError:
    """Return the error for a block that is not what was written."""
    block = array.blocks[number]
    first = sum(earlier.n_rows for earlier in array.blocks[:number])
    return CacheCorruptError(
        f"{block.path}: expected the checksum in its index for {array.name}, found another in "
        f"block {number} (rows {first} to {first + block.n_rows - 1}, byte {block.offset} on): the "
        f"file was damaged; {AGAIN}"
    )


def _is_sound(block: Block, rows: np.ndarray) -> bool:
    """Read a block into ``rows``, and tell whether its XXH3-128 is right."""
    digest, target = xxhash.xxh3_128(), rows.reshape(-1).view(np.uint8).data
    try:
        with _opened(block) as stream:
            for start in range(0, len(target), _PIECE_BYTES):
                piece = target[start : start + _PIECE_BYTES]
                read_into(piece, stream, block.path)
                digest.update(piece)
    except OSError as error:
        raise unreadable(block.path, error) from None
    return bool(digest.hexdigest() == block.xxh3)


@contextmanager
def _opened(block: Block) -> Iterator[FileIO]:
    """Open the file of a block at its first byte; refuse one that replaced or changed it.

    Everything is read through this descriptor. Damage is told from a change while it was read.
    """
    try:
        stream = open_file(block.path)
    except FileNotFoundError:
        if block.stamp:
            raise replaced(block.path) from None
        raise
    with stream:
        _check_same(stream, block)
        stream.seek(block.offset)
        try:
            yield stream
        except CacheCorruptError:
            _check_same(stream, block)
            raise


def _check_same(stream: FileIO, block: Block) -> None:
    if block.stamp and Stamp.of(os.fstat(stream.fileno())) != block.stamp:
        raise replaced(block.path)


def read_into(target: memoryview, stream: FileIO, path: Path) -> None:
    """Fill the target, or raise CacheCorruptError where the file ends before."""
    while target:
        count = stream.readinto(target)
        if not count:
            raise CacheCorruptError(
                f"{path}: expected {len(target):,} bytes more than it has: it was cut short; "
                f"{AGAIN}"
            )
        target = target[count:]


def unreadable(path: Path, error: Exception) -> CacheCorruptError:
    """Return the error for a file that the disk cannot read."""
    why = getattr(error, "strerror", None) or error
    return CacheCorruptError(
        f"{path}: expected a cache that can be read, found: {why}; see to the disk, or {AGAIN}"
    )


def map_array(array: StoredArray) -> Any:
    """Map an array into memory, unverified and read-only: a `ShardedArray` where it has shards."""
    if not array.size_bytes:
        return np.empty(array.shape, array.dtype)
    if len({block.path for block in array.blocks}) > 1:
        return ShardedArray(array)
    return _map(array.blocks[0], array.dtype, array.shape)


def _map(block: Block, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with _opened(block) as stream:
            return np.memmap(stream, dtype, "r", block.offset, shape)
    except (OSError, ValueError) as error:
        raise unreadable(block.path, error) from None


def check_whole(rows: Any) -> None:
    """Refuse mapped rows whose file was cut short since; reading them would end the process.

    The system sends SIGBUS, which nobody can answer. Asked before every block, this leaves the
    time that the reading of one block takes. Rows in memory are always whole.
    """
    while isinstance(rows, np.ndarray) and isinstance(rows.base, np.ndarray):
        rows = rows.base
    source: Any = getattr(rows, "base", None)
    if not isinstance(rows, np.memmap) or not isinstance(source, mmap):
        return
    end, size = rows.offset + rows.nbytes, source.size()
    if size < end:
        raise CacheCorruptError(
            f"{rows.filename}: expected the {end:,} bytes that were mapped, found that it was cut "
            f"short to {size:,} since; {AGAIN}"
        )


class ShardedArray:
    """An array whose rows lie in several files; reading from it gives NumPy arrays.

    Indices work as NumPy's, except that ``None`` is refused and booleans choose rows only.
    ``numpy.asarray`` reads it whole.
    """

    def __init__(self, array: StoredArray) -> None:
        self.dtype = array.dtype
        self.shape = array.shape
        self._blocks = [block for block in array.blocks if block.n_rows]
        self._starts = np.cumsum([0, *(block.n_rows for block in self._blocks)])
        self._part = lru_cache(_MAX_MAPS)(self._map_part)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read what a NumPy index chooses."""
        first, *inside = self._expanded(index)
        if isinstance(first, slice):
            start, stop, step = first.indices(len(self))
            is_run = step == 1
            rows = self._range(start, stop) if is_run else self._take(np.arange(start, stop, step))
            every = (slice(None), *inside)
            return rows[every]
        numbers = self._row_numbers(first)
        rows = self._take(numbers.reshape(-1))
        if not inside:
            return rows.reshape(*numbers.shape, *self.shape[1:])
        # Index rows by position, so that further indices broadcast with them as NumPy's do.
        places = (np.arange(numbers.size).reshape(numbers.shape), *inside)
        chosen: np.ndarray = rows[places]
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything."""
        whole = self._range(0, len(self))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _expanded(self, index: Any) -> tuple[Any, ...]:
        """Return an index as a tuple that begins with the rows."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is None for part in parts):
            raise IndexError("expected no None in an index of mapped shards; read the rows first")
        for at, part in enumerate(parts):
            if part is Ellipsis:
                every = (slice(None),) * (self.ndim - len(parts) + 1)
                return self._expanded((*parts[:at], *every, *parts[at + 1 :]))
        return parts or (slice(None),)

    def _row_numbers(self, index: Any) -> np.ndarray:
        """Return numbers of rows, from 0 on, for integers or booleans."""
        rows = np.asarray(index)
        if rows.dtype == bool:
            if rows.shape != self.shape[:1]:
                raise IndexError(f"expected {len(self)} booleans, found shape {rows.shape}")
            return np.flatnonzero(rows)
        if not rows.size:
            return rows.astype(np.int64)
        if not np.issubdtype(rows.dtype, np.integer):
            raise IndexError(f"expected integers, booleans or a slice, found {rows.dtype}")
        if not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"expected rows from {-len(self)} to {len(self) - 1}")
        return np.where(rows < 0, rows + len(self), rows).astype(np.int64)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        """Copy rows by their numbers (n,)."""
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        homes = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(homes):
            here = homes == number
            taken[here] = self._whole_part(int(number))[rows[here] - self._starts[number]]
        return taken

    def _range(self, start: int, stop: int) -> np.ndarray:
        """Return rows that follow one another: a view of the file where one has them all."""
        if start >= stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        behind = int(np.searchsorted(self._starts, stop, side="left"))
        pieces = [
            self._whole_part(number)[max(0, start - begin) : stop - begin]
            for number, begin in enumerate(self._starts[first:behind].tolist(), start=first)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _whole_part(self, number: int) -> np.ndarray:
        part = self._part(number)
        check_whole(part)
        return part

    def _map_part(self, number: int) -> np.ndarray:
        block = self._blocks[number]
        return _map(block, self.dtype, (block.n_rows, *self.shape[1:]))


_WALK_BYTES = 4 << 20


def iterate_rows(array: StoredArray) -> Iterator[np.ndarray]:
    """Yield an array in pieces of some megabytes, and verify both checksums of every block.

    A bad block raises at its last piece: use no result before the iteration ends.
    """
    for number in range(len(array.blocks)):
        yield from iterate_block(array, number)


def iterate_block(
    array: StoredArray, number: int, piece_bytes: int = _WALK_BYTES
) -> Iterator[np.ndarray]:
    """Read one block of an array, as `iterate_rows` does."""
    block = array.blocks[number]
    piece_rows = max(1, piece_bytes // max(1, array.row_bytes))
    checksums = Checksums()
    try:
        with _opened(block) as stream:
            for start in range(0, max(1, block.n_rows), piece_rows):
                n_rows = min(piece_rows, block.n_rows - start)
                rows = np.empty((n_rows, *array.row_shape), array.dtype)
                data = rows.reshape(-1).view(np.uint8).data
                read_into(data, stream, block.path)
                checksums.update(data)
                is_last = start + n_rows == block.n_rows
                if is_last and checksums.hexdigests() != [block.sha256, block.xxh3]:
                    raise bad_block(array, number)
                if n_rows:
                    yield rows
    except OSError as error:
        raise unreadable(block.path, error) from None
