"""What a killed run left behind: found again, and believed as far as its checksums go."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, CacheMismatchError
from ._format import Block, StoredArray, differences
from ._index import MANIFEST, read_sealed
from ._lock import single_writer
from ._walk import iterate_rows

__all__ = ["discard_unfinished", "shard_block", "unfinished_folder", "unharmed_commits"]


def unfinished_folder(path: Path) -> Path:
    """Return the hidden folder in which a cache is put together."""
    return path.with_name(f".{path.name}.parts")


def discard_unfinished(path: Path) -> None:
    """Delete the shards of a cache that is complete, left by a run killed at its very end."""
    folder = unfinished_folder(path)
    if folder.exists():
        # Somebody else may be making it anew, and then the folder is theirs.
        with suppress(CacheError), single_writer(path):
            shutil.rmtree(folder, ignore_errors=True)


def unharmed_commits(
    path: Path, meta: Mapping[str, Any], *, force: bool
) -> tuple[list[dict[str, Any]], str]:
    """Return the commits of an unfinished run up to the first whose bytes changed.

    Parameters
    ----------
    path : Path
        The ``.h5`` file that it shall become.
    meta : mapping
        The provenance that is wanted now.
    force : bool
        Take nothing but what a forced run of the same ingredients left.

    Returns
    -------
    commits : list of dict
        As `ShardWriter.commits`; empty where nothing is there.
    damaged : str
        The first shard that is not what was written; empty where all are.

    Raises
    ------
    CacheMismatchError
        The run had other ingredients.
    """
    folder = unfinished_folder(path)
    try:
        content = read_sealed(folder / MANIFEST)
        found, commits = content["meta"], content["commits"]
    except (CacheError, KeyError):
        return [], ""  # none, killed before the first shard, or damaged: begin at the start
    if force and not (content.get("forced") and found["fingerprint"] == meta["fingerprint"]):
        return [], ""
    if found["fingerprint"] != meta["fingerprint"]:
        raise CacheMismatchError(
            f"{path}: expected the rest of an unfinished run of these ingredients, found one of "
            f"others in {folder}: {'; '.join(differences(found, meta))}; use --force to start "
            "over, or name another --output"
        )
    unharmed: list[dict[str, Any]] = []
    for commit in commits:
        for name, spec in commit["arrays"].items():
            block = shard_block(folder, spec)
            array = StoredArray(name, np.dtype(spec["dtype"]), tuple(spec["row_shape"]), (block,))
            try:
                for _ in iterate_rows(array):
                    pass
            except (CacheCorruptError, OSError):
                return unharmed, block.path.name
        unharmed.append(commit)
    return unharmed, ""


def shard_block(folder: Path, spec: Mapping[str, Any]) -> Block:
    """Return where an array of a commit lies."""
    n_rows, offset, sha256, sums, file = spec["block"]
    return Block(folder / file, offset, n_rows, sha256, sums)
