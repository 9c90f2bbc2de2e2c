"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .errors import OutputError

__all__ = ["check_writable", "user_path", "write_atomically"]


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file under its final name only when every byte is on the disk.

    The bytes go to a temporary file in the same folder, which is flushed to the
    disk and then renamed; a reader sees the old file or the new one. Killed
    part-way, nothing but a hidden temporary file is left.

    Raises
    ------
    OutputError
        The folder cannot be made or written, or the disk is full; the old file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as stream:
            temporary = Path(stream.name)
            _write_all(stream.fileno(), parts)
            os.fsync(stream.fileno())
        # NamedTemporaryFile is private to its owner; a result is as readable as any new file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; free space or name another "
            "output"
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Find out before hours of work, not after, that a file cannot be written.

    Raises
    ------
    OutputError
        Its folder cannot be made, nothing can be written there under such a name, or a
        folder has its name.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "a folder has that name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part"):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: expected a file that can be written, found: {error.strerror or error}; "
            "name another place"
        ) from None


def user_path(text: str | Path) -> Path:
    """Return a path with ``~`` resolved; of a user who is not there it stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _write_all(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]


def _umask() -> int:
    # The only portable way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be flushed (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
