"""One writer per cache, and the others are told who it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CacheError, OutputError

__all__ = ["single_writer"]


@contextmanager
def single_writer(path: Path) -> Iterator[None]:
    """Let one process at a time make a cache.

    Raises
    ------
    CacheError
        Another one is at it; the message names the process and its machine.
    OutputError
        The lock cannot be written, or the file system knows none.
    """
    from filelock import FileLock, Timeout

    # The holder's name is beside the lock: on Windows a locked file cannot be read.
    lock, holder = (path.with_name(f".{path.name}.{end}") for end in ("lock", "holder"))
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
    except Timeout:
        raise CacheError(
            f"{path}: is being written by {_named_in(holder)}; wait for it, or name another "
            "--output"
        ) from None
    except (OSError, NotImplementedError) as error:
        held.release()
        raise OutputError(
            f"{lock}: cannot be locked: {getattr(error, 'strerror', None) or error}; free space, "
            "or name an --output on a local disk and copy the cache when it is done"
        ) from None
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def _named_in(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):  # it has just begun, or just ended
        return "another process"
