"""Where image files lie: a folder, or anything that can be listed and read like one."""

from __future__ import annotations

import os
import stat
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ..errors import DatasetError

__all__ = ["HIDDEN", "MAX_FILE_BYTES", "Files", "Folder"]

# No image of any use is larger; what is, by mistake or by malice, must not fill the memory.
MAX_FILE_BYTES = 1 << 30

HIDDEN = (".", "__MACOSX")  # how names begin that nobody meant


class Files(Protocol):
    """Files that are known by paths with ``/``; reading is safe from several threads."""

    @property
    def remote(self) -> bool:
        """Whether every read waits for a network, and is paid for."""

    def names(self) -> list[str]:
        """List every file, in order of the names."""

    def folders(self) -> list[str]:
        """List the folders, so that an empty one, somebody's mistake, can be told of."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes, or raise `DatasetError`."""

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""


class Folder:
    """Files below a folder, which is looked through once somebody asks for their names.

    Parameters
    ----------
    path : Path
        The folder.
    """

    remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        """Go to another machine by name alone."""
        return Folder, (self.path.absolute(),)

    def names(self) -> list[str]:
        """List every file below, but for those in hidden folders.

        Raises
        ------
        DatasetError
            A folder cannot be listed.
        """
        return self._listing[0]

    def folders(self) -> list[str]:
        """List every folder below that is not hidden; raises as `names` does."""
        return self._listing[1]

    @cached_property
    def _listing(self) -> tuple[list[str], list[str]]:
        root = str(self.path)
        found: list[str] = []
        folders: list[str] = []
        seen = set()
        # Links to folders are followed, as a person would, but into each folder once.
        for folder, below, files in os.walk(root, onerror=_cannot_be_listed, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = [name for name in below if not name.startswith(HIDDEN)]
            inside = os.path.relpath(folder, root).replace(os.sep, "/")
            prefix = "" if folder == root else f"{inside}/"
            folders += [prefix + name for name in below]
            found += [prefix + name for name in files]
        return sorted(found), sorted(folders)

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        path = self.where(name)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(None, "it is a pipe or a device")
            if found.st_size > MAX_FILE_BYTES:
                raise OSError(None, f"{found.st_size} bytes are more than an image has")
            with open(path, "rb", buffering=0) as stream:
                return stream.read()
        except OSError as error:
            raise DatasetError(
                f"{path}: cannot be read: {error.strerror}; restore or remove it"
            ) from None

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return os.path.join(self.path, name)


def _cannot_be_listed(error: OSError) -> NoReturn:
    """Stop, where `os.walk` would leave a folder out without a word."""
    raise DatasetError(
        f"{error.filename}: cannot be listed: {error.strerror}; make it readable (chmod u+rx) or "
        "take it out of the data set"
    ) from None
