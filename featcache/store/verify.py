"""Verifying a cache: read it to its last byte and compare it with its checksums."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO

import numpy as np

from ..errors import CacheCorruptError, CacheError
from ..progress import OnProgress, Progress, silent
from .format import ROLES, UNLABELLED, Index, StoredArray, decode_id
from .index import AGAIN, HDF5_SIGNATURE, MANIFEST, check_unchanged, open_index
from .reader import iterate_block, reading_threads, unreadable
from .remote_caches import cache_file

_PIECE_BYTES = 1 << 20  # hashed and looked at while it is in the processor's cache
_REPORT_EVERY_S = 0.1


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` checked in a sound cache.

    Parameters
    ----------
    path : Path
        The file, or the folder of shards.
    form : str
        ``"hdf5"`` or ``"shards"``.
    format_version : int
        Version of the cache format.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    n_train, n_test : int
        Rows of each split.
    n_arrays, n_blocks : int
        Arrays, and their blocks of rows.
    size_bytes : int
        Size of the arrays.
    wall_s : float
        Duration.
    checks : tuple of str
        The checks that passed.
    notes : tuple of str
        Observations that are no damage.
    n_val : int
        Rows of the split val.
    """

    path: Path
    form: str
    format_version: int
    fingerprint: str
    n_train: int
    n_test: int
    n_arrays: int
    n_blocks: int
    size_bytes: int
    wall_s: float
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    n_val: int = 0


def verify(path: str | Path, on_progress: OnProgress = silent) -> VerifyReport:
    """Read a whole cache and check everything about it that can be checked.

    Parameters
    ----------
    path : str or Path
        A file or a folder of shards that `featcache.extract` wrote, or its URL.
    on_progress : callable
        Called with the progress in bytes.

    Returns
    -------
    VerifyReport
        Returned only for a sound cache.

    Raises
    ------
    CacheCorruptError
        Names the first difference from what was written, such as a block of rows.
    CacheMissError, CacheMismatchError
        As `featcache.load`.
    """
    started = time.perf_counter()
    index = open_index(cache_file(path))
    try:
        checks, notes = _check_around(index)
    except (CacheError, OSError) as error:
        file = index.path / MANIFEST if index.form == "shards" else index.path
        check_unchanged(file, index.stamp)
        if isinstance(error, CacheError):
            raise
        raise unreadable(index.path, error) from None
    ids = _check_blocks(index, on_progress)
    notes += _check_ids(index, ids)
    checks += (
        "every block of rows has its checksums",
        "features are finite",
        f"labels are {_labels(len(index.meta['class_names']))}",
        "ids are unique in each split",
    )
    return VerifyReport(
        path=index.path,
        form=index.form,
        format_version=index.meta["format_version"],
        fingerprint=index.meta["fingerprint"],
        n_train=index.arrays["train/labels"].shape[0],
        n_test=index.arrays["test/labels"].shape[0],
        n_arrays=len(index.arrays),
        n_blocks=sum(len(array.blocks) for array in index.arrays.values()),
        size_bytes=sum(array.size_bytes for array in index.arrays.values()),
        wall_s=time.perf_counter() - started,
        checks=checks,
        notes=notes,
        n_val=index.arrays["val/labels"].shape[0] if "val/labels" in index.arrays else 0,
    )


def _check_around(index: Index) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Check everything except the arrays; return the checks that passed, and notes."""
    if index.form == "shards":
        notes = check_folder(index)
        return ("manifest", "header of every shard", "no other file"), notes
    from .h5py_view import check_view

    check_file(index)
    check_view(index)
    return ("index", "HDF5's own bytes", "h5py sees what the index says"), ()


def _check_blocks(index: Index, on_progress: OnProgress) -> dict[str, list[np.ndarray]]:
    """Check all blocks in threads, name the first bad one in index order; return the ids."""
    total = sum(array.size_bytes for array in index.arrays.values())
    stop = Event()
    done: list[int] = []  # bytes that the threads have read; appending needs no lock
    ids: dict[str, list[np.ndarray]] = {f"{role}/ids": [] for role in ROLES}
    on_progress(Progress("verifying", 0, total, "B"))
    with ThreadPoolExecutor(reading_threads(), "featcache-verify") as pool:
        try:
            jobs = []
            for array in index.arrays.values():
                first = 0
                for number, block in enumerate(array.blocks):
                    job = pool.submit(_check_block, index, array, number, first, stop, done)
                    jobs.append((array.name, job))
                    first += block.n_rows
            for name, job in jobs:
                while not wait([job], _REPORT_EVERY_S).done:
                    on_progress(Progress("verifying", sum(done), total, "B"))
                if name in ids:
                    ids[name] += job.result()
                job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    on_progress(Progress("verifying", total, total, "B"))
    return ids


def _check_block(
    index: Index, array: StoredArray, number: int, first: int, stop: Event, done: list[int]
) -> list[np.ndarray]:
    """Check the bytes and values of a block; return it in pieces if it has ids."""
    kind = array.name.rpartition("/")[2]
    n_classes = len(index.meta["class_names"])
    kept, wrong, row = [], [], first
    for piece in iterate_block(array, number, _PIECE_BYTES):
        if stop.is_set():
            break
        if kind == "ids":
            kept.append(piece)
        elif kind == "labels":
            outside = (piece < UNLABELLED) | (piece >= n_classes)
            wrong += (row + np.flatnonzero(outside)[:1]).tolist()
        elif piece.dtype.kind == "f" and not np.isfinite(piece).all():
            finite = np.isfinite(piece).reshape(len(piece), -1).all(axis=1)
            wrong.append(row + int(finite.argmin()))
        row += len(piece)
        done.append(piece.nbytes)
    # The last piece was read, so the checksum is right: the file was written with this.
    if wrong:
        what = f"labels {_labels(n_classes)}," if kind == "labels" else "finite numbers"
        raise CacheCorruptError(
            f"{index.path}: expected {what} in {array.name}, found others in block {number}, row "
            f"{wrong[0]}; {AGAIN}"
        )
    return kept


def _labels(n_classes: int) -> str:
    """Say which labels there may be."""
    return f"from 0 to {n_classes - 1}, or -1 for none" if n_classes else "-1, for none"


def _check_ids(index: Index, pieces: dict[str, list[np.ndarray]]) -> tuple[str, ...]:
    """Check that ids are unique in each split; return a note on ids in several splits."""
    unique = {}
    for name, parts in pieces.items():
        ids = np.concatenate(parts) if parts else np.empty(0, "S1")
        unique[name], counts = np.unique(ids, return_counts=True)
        if len(unique[name]) < len(ids):
            twice = unique[name][counts > 1]
            raise CacheCorruptError(
                f"{index.path}: expected an id of its own for every image, found "
                f"{decode_id(twice[0])!r} {counts.max()} times in {name} ({len(twice)} such); "
                f"{AGAIN}"
            )
    everywhere, counts = np.unique(np.concatenate(list(unique.values())), return_counts=True)
    both = everywhere[counts > 1]
    if not len(both):
        return ()
    where = "several" if len(unique["val/ids"]) else "both"
    return (
        f"{len(both):,} ids are in {where} splits ({decode_id(both[0])!r} …): the same images?",
    )


_SMALLEST_USER_BLOCK_BYTES = 512  # libhdf5 looks there, then at twice, four times … as much


def check_file(index: Index) -> None:
    """Check the bytes of a packed file outside its arrays: line feeds, then HDF5's own bytes."""
    with index.path.open("rb") as stream:
        start = _user_block_bytes(stream, index.path)
        digest = hashlib.sha256()
        for offset, size_bytes in _gaps(index, start):
            stream.seek(offset)
            while size_bytes:
                piece = _read(stream, size_bytes, index.path)
                digest.update(piece)
                size_bytes -= len(piece)
    if digest.hexdigest() != index.structure_sha256:
        raise CacheCorruptError(
            f"{index.path}: expected the structure_sha256 of its index for HDF5's own bytes, found "
            f"another (they lie between the arrays, from byte {start} on): the file was damaged; "
            f"{AGAIN}"
        )


def check_folder(index: Index) -> tuple[str, ...]:
    """Check the headers of shards, and refuse other files; return a note on hidden ones."""
    manifest = index.path / MANIFEST
    with manifest.open("rb") as stream:
        sealed = _sealed_bytes(stream)
    if manifest.stat().st_size != sealed:
        raise CacheCorruptError(
            f"{manifest}: expected {sealed:,} bytes, found {manifest.stat().st_size:,}: it was "
            f"added to; {AGAIN}"
        )
    named = {MANIFEST}
    for array in index.arrays.values():
        for number, block in enumerate(array.blocks):
            named.add(block.path.name)
            _check_header(array, number)
    others = sorted(path.name for path in index.path.iterdir() if path.name not in named)
    strangers = [name for name in others if not name.startswith(".")]
    if strangers:
        raise CacheCorruptError(
            f"{index.path}: expected the shards that its {MANIFEST} names, found {strangers[0]!r} "
            f"besides; move it out of the folder, or {AGAIN}"
        )
    if others:  # left by a killed writer or a file manager
        return (f"{len(others)} hidden files that are no part of it ({others[0]} …)",)
    return ()


def _sealed_bytes(stream: BinaryIO) -> int:
    """Return the length of the sealed index, including its first line."""
    line = stream.readline(200)
    return len(line) + int(line.split(b" ")[2])


def _user_block_bytes(stream: BinaryIO, path: Path) -> int:
    """Return where HDF5 begins; only line feeds may precede it after the index."""
    at, start = _sealed_bytes(stream), _SMALLEST_USER_BLOCK_BYTES
    while start < at or _read_at(stream, start, len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
        start *= 2
        if start > path.stat().st_size:
            raise CacheCorruptError(
                f"{path}: expected HDF5 behind its index, found none: the file was damaged; {AGAIN}"
            )
    stream.seek(at)
    while at < start:
        padding = _read(stream, start - at, path)
        wrong = len(padding) - len(padding.lstrip(b"\n"))
        if wrong < len(padding):
            raise CacheCorruptError(
                f"{path}: expected a line feed at byte {at + wrong}, behind its index, found "
                f"{padding[wrong : wrong + 1]!r}: the file was damaged; {AGAIN}"
            )
        at += len(padding)
    return start


def _read(stream: BinaryIO, size_bytes: int, path: Path) -> bytes:
    """Return some of the next bytes, at least one."""
    piece = stream.read(min(_PIECE_BYTES, size_bytes))
    if not piece:
        raise CacheCorruptError(
            f"{path}: expected {size_bytes:,} bytes more than it has: it was cut short; {AGAIN}"
        )
    return piece


def _read_at(stream: BinaryIO, offset: int, size_bytes: int) -> bytes:
    stream.seek(offset)
    return stream.read(size_bytes)


def _gaps(index: Index, start: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of the gaps between arrays, from ``start`` to the end."""
    at = start
    arrays = [array for array in index.arrays.values() if array.size_bytes]
    for array in sorted(arrays, key=lambda array: array.blocks[0].offset):
        offset = array.blocks[0].offset
        if offset < at:
            raise CacheCorruptError(
                f"{index.path}: expected {array.name} at byte {at} or later, found it at "
                f"{offset}, where something else lies; do not use this file"
            )
        yield at, offset - at
        at = offset + array.size_bytes
    yield at, index.path.stat().st_size - at


def _check_header(array: StoredArray, number: int) -> None:
    """Compare the header of a shard with its array, as text: NumPy writes it in one way only."""
    block = array.blocks[number]
    shape = (block.n_rows, *array.row_shape)
    expected = f"{{'descr': {array.dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
    with block.path.open("rb") as stream:
        header = stream.read(min(block.offset, 1 << 16))
    length = (block.offset - 10).to_bytes(2, "little") if 10 <= block.offset < 1 << 16 else b""
    # NumPy pads with spaces to a length that depends on its release.
    if header[:10] != b"\x93NUMPY\x01\x00" + length or (
        header[10:].rstrip(b" \n") != expected.encode() or header[-1:] != b"\n"
    ):
        raise CacheCorruptError(
            f"{block.path}: expected the header of a .npy file with {expected}, found "
            f"{header[:10]!r} and {header[10:110]!r}: the file was damaged; {AGAIN}"
        )
