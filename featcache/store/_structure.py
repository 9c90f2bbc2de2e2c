"""What verification looks at besides the arrays: every other byte of a cache, and where it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import CacheCorruptError
from ._format import Index, StoredArray
from ._index import AGAIN, HDF5_SIGNATURE, MANIFEST

__all__ = ["check_file", "check_folder"]

_SMALLEST_USER_BLOCK_BYTES = 512  # or twice, four times … as much: where libhdf5 looks
_PIECE_BYTES = 1 << 20


def check_file(index: Index) -> None:
    """Check the bytes of a packed file that lie in no array.

    Behind the sealed index there are line feeds alone up to where HDF5 begins. From
    there on, what is no array's is libhdf5's, and has a SHA-256 in the index.

    Raises
    ------
    CacheCorruptError
        They are not what was written, or an array lies where it cannot.
    """
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
    """Check what is in a folder of shards besides the arrays' bytes.

    Returns
    -------
    tuple of str
        A note on files that do no harm.

    Raises
    ------
    CacheCorruptError
        A shard does not begin as its array must, or a file is there that the manifest
        does not name.
    """
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
    if others:  # a killed writer's, or a file manager's
        return (f"{len(others)} hidden files that are no part of it ({others[0]} …)",)
    return ()


def _sealed_bytes(stream: BinaryIO) -> int:
    """Return the length of the sealed index, its first line included."""
    line = stream.readline(200)
    return len(line) + int(line.split(b" ")[2])


def _user_block_bytes(stream: BinaryIO, path: Path) -> int:
    """Return where HDF5 begins; there are line feeds alone between the index and there."""
    at, start = _sealed_bytes(stream), _SMALLEST_USER_BLOCK_BYTES
    while start < at or not _begins_at(stream, start):
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
    """Return some of the bytes that come next, one at least."""
    piece = stream.read(min(_PIECE_BYTES, size_bytes))
    if not piece:
        raise CacheCorruptError(
            f"{path}: expected {size_bytes:,} bytes more than it has: it was cut short; {AGAIN}"
        )
    return piece


def _begins_at(stream: BinaryIO, offset: int) -> bool:
    stream.seek(offset)
    return stream.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE


def _gaps(index: Index, start: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of what lies in no array, from ``start`` to the end."""
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
    """Compare what a shard says about itself with its array.

    The text is compared and not parsed: there is one way to write it.
    """
    block = array.blocks[number]
    shape = (block.n_rows, *array.row_shape)
    said = f"{{'descr': {array.dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
    with block.path.open("rb") as stream:
        header = stream.read(min(block.offset, 1 << 16))
    length = (block.offset - 10).to_bytes(2, "little") if 10 <= block.offset < 1 << 16 else b""
    # NumPy fills up with spaces to a length that differs between its releases.
    if header[:10] != b"\x93NUMPY\x01\x00" + length or (
        header[10:].rstrip(b" \n") != said.encode() or header[-1:] != b"\n"
    ):
        raise CacheCorruptError(
            f"{block.path}: expected the header of a .npy file with {said}, found "
            f"{header[:10]!r} and {header[10:110]!r}: the file was damaged; {AGAIN}"
        )
