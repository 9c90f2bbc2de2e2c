"""Atomic writes, and small file formats: CSV lines, safetensors."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FeatcacheError, OutputError, one_line, visible_line
from .options import nearest


def did_you_mean_path(path: Path, otherwise: str, names: Iterable[str] = ()) -> str:
    """Return the end of a message about a missing path: a name like it, or other advice."""
    known = {name: name for name in names}
    with suppress(OSError, ValueError):
        beside = (name for name in os.listdir(path.parent) if name[:1] != ".")
        beside = (name for name in beside if name != path.name)  # a link that leads nowhere
        known = {name: str(path.parent / name) for name in beside} | known
    name = nearest(path.name, known)
    return f"; did you mean {visible_line(known[name])}?" if name else f"; {otherwise}"


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of these bytes, whole or not at all."""
    with replaced_file(path) as descriptor:
        write_all(descriptor, *parts)


def write_all(descriptor: int, *parts: bytes | memoryview) -> None:
    """Write all these bytes where an open file stands."""
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]


@contextmanager
def replaced_file(path: Path) -> Iterator[int]:
    """Show a file under its final name only when every byte is on the disk.

    What is written goes to a temporary file in the same folder, which is flushed to the disk
    and then renamed; a reader sees the old file or the new one. Killed part-way, nothing but a
    hidden temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with told_if_unwritable(path):
            _refuse_other_than_files(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not by tempfile, whose files are private to their owner: a result is a new file.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags, 0o666)
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def told_if_unwritable(
    path: Path, advice: str = "free space or name another output"
) -> Iterator[None]:
    """Turn an error of the system into an OutputError."""
    try:
        yield
    except FeatcacheError:
        raise
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{path}: cannot be written: {why}; {advice}") from None


def replace_folder(new: Path, final: Path) -> None:
    """Give a folder its final name; the one that has it goes when the new one is in its place."""
    old = final.with_name(f".{final.name}.replaced")
    discard(old)  # of a process that was killed between the renames
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(new, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    discard(old)


# Anybody can foresee the names of hidden files and folders of ours, and a stranger's folder may
# bring links with these names. No link is followed to what is written or deleted there.


def discard(path: Path) -> None:
    """Delete a file or folder of ours, if it can be; of a link with its name, the link alone."""
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def refuse_links(*paths: Path) -> None:
    """Raise OutputError where a file or folder of ours, which is to be written, is a link."""
    for path in paths:
        if path.is_symlink():
            raise OutputError(
                f"{path}: expected a file or folder that featcache made, found a symbolic link, "
                "which could lead to other files; remove it"
            )


@contextmanager
def own_folder(path: Path, *inside: str) -> Iterator[int]:
    """Open a folder of ours, or one inside it, to delete files there; a link is an OSError."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    try:
        for name in inside:
            outer, descriptor = descriptor, os.open(name, flags, dir_fd=descriptor)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Delete the hidden files that killed writers of a file left; there must be no other writer."""
    half_written = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.part")
    with suppress(OSError):
        for other in path.parent.iterdir():
            if half_written.fullmatch(other.name):
                other.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Fail before hours of work if a file cannot be written."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)) and not os.path.isdir(path.parts[0]):
        raise OutputError(
            f"{path}: expected a path, found a URL; featcache extract alone takes one as its "
            "output: name a path, and upload what is written there"
        )
    try:
        _refuse_other_than_files(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".test"):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: expected a file that can be written, found: {error.strerror or error}; "
            "name another place"
        ) from None


def csv_line(fields: Sequence[str]) -> str:
    """Return one line of comma-separated values, which ends in a line feed.

    Text is quoted where it holds a comma, a quote or a line break.
    """
    # csv quotes the characters that end its own lines: both halves of "\r\n", not "\n" alone.
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\r\n").writerow(fields)
    return stream.getvalue().removesuffix("\r\n") + "\n"


def split_safetensors(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the header of a valid safetensors file, and the numbers after it.

    https://huggingface.co/docs/safetensors/index#format: the header's length in 8 bytes, the
    header, which is JSON and has texts under ``"__metadata__"``, and the numbers.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), memoryview(data)[end:]


def open_file(path: str | Path, folder: int | None = None) -> FileIO:
    """Open a regular file for reading, inside an open folder where one is given.

    What is none, such as a pipe that nobody writes to, is an OSError, and nothing waits for it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "no regular file")
    return FileIO(str(path), opener=lambda *_: descriptor)  # this way it has a name


_MAX_HEADER_BYTES = 1 << 24  # of safetensors: the names of 100,000 classes fit
_MAX_DIMS = 8
MAX_NUMBERS = 1 << 30  # of a tensor


def check_shape(shape: Sequence[object]) -> int:
    """Return how many numbers a tensor of this shape holds; ValueError for an impossible one."""
    dims = [dim for dim in shape if type(dim) is int and 0 <= dim <= MAX_NUMBERS]
    # NumPy multiplies the dimensions of 1 and more of an empty array too, and overflows.
    most = math.prod(max(dim, 1) for dim in dims)
    if len(dims) < len(shape) or len(dims) > _MAX_DIMS or most > MAX_NUMBERS:
        raise ValueError("a tensor has an impossible shape")
    return math.prod(dims)


class Tensor(NamedTuple):
    """A tensor of a safetensors file: its type in the format's words, and its numbers' bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def parse_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file; ValueError says what is wrong with it."""
    from safetensors import SafetensorError, deserialize

    if not 0 < int.from_bytes(data[:8], "little") <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError("no safetensors file, or the header of a damaged one")
    try:
        entries = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"a damaged safetensors file ({one_line(error)})") from None
    for name, entry in entries:
        try:
            check_shape(entry["shape"])
        except ValueError as error:
            raise ValueError(f"'{one_line(name)}': {error}") from None
    header, _ = split_safetensors(data)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), memoryview(entry["data"]))
        for name, entry in entries
    }, header.get("__metadata__") or {}


def user_path(text: str | Path) -> Path:
    """Return a path with ``~`` resolved; of a user who is not there it stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _refuse_other_than_files(path: Path) -> None:
    """Raise OSError at what a file must not replace: /dev/null would be gone for everybody."""
    if path.is_dir():
        raise IsADirectoryError(None, "a folder has that name")
    if path.exists() and not path.is_file():
        raise FileExistsError(None, "a device, a pipe or a socket has that name")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be flushed (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder: the file in it is complete all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
