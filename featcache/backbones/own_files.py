"""Where the user's own checkpoints are, by the digest of their tensors.

A cache or head must not name a file of this machine, since a stranger may have made it. It has the
digest of its weights, and the user's own commands have said where weights of that digest are.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError
from ..files import user_path, write_atomically
from .pretrained import cache_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")


def remember_file(sha256: str, path: str | Path) -> None:
    """Remember a checkpoint or network that a command was given; without an error if it cannot."""
    place = os.path.abspath(user_path(path)).encode("utf-8", "surrogateescape")
    with suppress(OSError, OutputError):
        note = _note(sha256)
        if not note.is_file() or note.read_bytes() != place:
            write_atomically(note, place)


def remembered_file(sha256: object) -> str | None:
    """Return where a file of that digest was; whoever loads it compares the digest again."""
    if not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256):
        return None
    with suppress(OSError):
        path = _note(sha256).read_bytes().decode("utf-8", "surrogateescape")
        return path if os.path.exists(path) else None
    return None


def _note(sha256: str) -> Path:
    return cache_folder() / "own" / sha256
