"""What is being made: which shards are there, put down so that many writers need no lock.

In the hidden folder of an extraction lie the shards, and in ``.commits`` inside it what
is known of them: ``ingredients.json``, written once by whoever comes first, and one sealed
file per shard, written when the shard is on the disk. Nobody ever changes a file that
somebody else writes, so that any number of jobs can commit different shards at once.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, CacheMismatchError, OutputError
from ..files import write_atomically
from ._format import Block, StoredArray, differences, seal
from ._index import COMMITS, read_sealed
from ._lock import single_writer
from ._walk import iterate_rows

__all__ = [
    "INGREDIENTS",
    "ShardRange",
    "check_same",
    "claim",
    "commit_array",
    "commit_path",
    "committed",
    "discard_unfinished",
    "first_harmed",
    "read_commit",
    "read_ingredients",
    "remove_unfinished",
    "shard_block",
    "unfinished_folder",
]

INGREDIENTS = "ingredients.json"
_COMMIT = re.compile(r"(train|test)-([0-9]{12})\.json")


@dataclass(frozen=True)
class ShardRange:
    """The images of one shard.

    Parameters
    ----------
    role : str
        ``"train"`` or ``"test"``.
    start, stop : int
        The first image of the split, and the one behind the last.
    """

    role: str
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.stop - self.start

    def __str__(self) -> str:
        """Name it as a person would."""
        return f"{self.role} images {self.start} to {self.stop - 1}"


def unfinished_folder(path: Path) -> Path:
    """Return the hidden folder in which a cache is put together."""
    return path.with_name(f".{path.name}.parts")


def discard_unfinished(path: Path) -> None:
    """Delete the shards of a cache that is complete, left by a run killed at its very end."""
    folder = unfinished_folder(path)
    if folder.exists():
        # Somebody else may be making it anew, and then the folder is theirs.
        with suppress(CacheError), single_writer(path):
            remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Delete a folder of shards; killed on the way, what is left is nobody's."""
    with suppress(OSError):
        (folder / COMMITS / INGREDIENTS).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def read_ingredients(folder: Path) -> dict[str, Any] | None:
    """Return what is being made in a folder; None where nothing is, or nobody can tell.

    Returns
    -------
    dict or None
        ``meta``, the provenance; ``forced``; and ``jobs`` where many writers share the work.
    """
    try:
        content = read_sealed(folder / COMMITS / INGREDIENTS)
    except CacheError:
        return None
    meta = content.get("meta")
    return content if isinstance(meta, dict) and "fingerprint" in meta else None


def claim(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Put down what is to be made in a folder, unless somebody has; return what stands there.

    Of several at once one succeeds, and all get the same answer: a file is linked to its
    name whole, and never over another.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    target = folder / COMMITS / INGREDIENTS
    mine = target.with_name(f".{os.urandom(8).hex()}.json")
    try:
        write_atomically(mine, seal(content))
        try:
            os.link(mine, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if read_ingredients(folder) is None:
                os.replace(mine, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{target}: cannot be written: {error.strerror}; name another output"
        ) from None
    finally:
        mine.unlink(missing_ok=True)
    found = read_ingredients(folder)
    if found is None:
        raise OutputError(
            f"{target}: expected to read what was just written, found something else; remove "
            f"{folder}, or name another output"
        )
    return found


def check_same(
    path: Path, folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Refuse to write shards among those of other ingredients, as `claim` gives them.

    Raises
    ------
    CacheMismatchError
        The fields that differ are in the text.
    """
    by_jobs = "jobs" in found
    again = f"remove {folder} to start over" if "jobs" in wanted else "use --force to start over"
    if by_jobs is not ("jobs" in wanted):
        kind = (
            "jobs (--shard, --executor ray, or images behind a URL)"
            if by_jobs
            else "a run on one machine"
        )
        end = f"featcache pack {path}" if by_jobs else "the same command without --shard"
        raise CacheMismatchError(
            f"{path}: expected nothing that is being made, found the shards of {kind} in {folder}; "
            f"finish them with {end}, or {again}"
        )
    differing = differences(found["meta"], wanted["meta"])
    if by_jobs:
        agreed = found["jobs"]["agreed"], wanted["jobs"]["agreed"]
        differing += differences(*agreed, sorted({*agreed[0], *agreed[1]}))
    if differing:
        raise CacheMismatchError(
            f"{path}: expected the rest of an unfinished run of these ingredients, found one of "
            f"others in {folder}: {'; '.join(differing)}; {again}, or name another --output"
        )


def commit_path(folder: Path, role: str, start: int) -> Path:
    """Return the file that says that a shard is there."""
    return folder / COMMITS / f"{role}-{start:012d}.json"


def committed(folder: Path) -> set[tuple[str, int]]:
    """Return (role, first image) of every shard that somebody says is there."""
    try:
        names = os.listdir(folder / COMMITS)
    except OSError:
        return set()
    found = (_COMMIT.fullmatch(name) for name in names)
    return {(match[1], int(match[2])) for match in found if match}


def read_commit(folder: Path, role: str, start: int, fingerprint: str) -> dict[str, Any] | None:
    """Return what was put down of a shard; None where nothing sound of these ingredients is."""
    try:
        commit = read_sealed(commit_path(folder, role, start))
        same = (commit["role"], commit["start"], commit["fingerprint"]) == (
            role,
            start,
            fingerprint,
        )
    except (CacheError, KeyError):
        return None
    return commit if same else None


def first_harmed(folder: Path, commit: Mapping[str, Any]) -> str:
    """Read a shard whole; return its first file that is not what was written, else ""."""
    for name in (*commit["arrays"], *(("hashes",) if "hashes" in commit else ())):
        array = commit_array(folder, commit, name)
        try:
            for _ in iterate_rows(array):
                pass
        except (CacheCorruptError, OSError):
            return array.blocks[0].path.name
    return ""


def commit_array(folder: Path, commit: Mapping[str, Any], name: str) -> StoredArray:
    """Return where an array of a shard, or its ``"hashes"``, lies."""
    spec = commit["hashes"] if name == "hashes" else commit["arrays"][name]
    dtype, row_shape = np.dtype(spec["dtype"]), tuple(spec["row_shape"])
    return StoredArray(name, dtype, row_shape, (shard_block(folder, spec),))


def shard_block(folder: Path, spec: Mapping[str, Any]) -> Block:
    """Return where the rows of one file of a shard lie."""
    n_rows, offset, sha256, sums, file = spec["block"]
    return Block(folder / file, offset, n_rows, sha256, sums)
