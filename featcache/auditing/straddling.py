"""Copies and groups that stand in several splits, whatever divided the data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import TableError
from ..store.cache import Cache
from ..store.copies import content_numbers, role_spans
from ..store.format import ROLES


def cache_roles(cache: Cache) -> np.ndarray:
    """Return the number in `ROLES` of the split of each row of a cache, int64 (N,)."""
    splits = cache.splits()
    return np.repeat([ROLES.index(role) for role, _ in splits], [len(part) for _, part in splits])


def straddling_copies(cache: Cache) -> list[np.ndarray] | None:
    """Return the rows of each image with exact copies in several splits; None without hashes."""
    hashes = [split.content_hashes for _, split in cache.splits() if len(split)]
    known = [one for one in hashes if one is not None]
    if len(known) < len(hashes) or not known:
        return None
    return _straddling(content_numbers(np.concatenate(known)), cache_roles(cache))


def straddling_groups(cache: Cache, column: str) -> tuple[int, list[tuple[str, Sequence[int]]]]:
    """Return how many groups a column has, and (name, images by role) of the straddling ones.

    Raises
    ------
    TableError
        The cache has no table, or no such column.
    """
    if cache.table is None:
        raise TableError(
            f"{cache.path}: expected an attached table with the column {column!r}, found none; "
            f"attach one with featcache label {cache.path} TABLE"
        )
    names = cache.table[column].texts()
    known = np.array([name is not None for name in names], bool)
    groups = np.full(len(names), -1)
    values, groups[known] = np.unique(names[known].astype(str), return_inverse=True)
    roles = cache_roles(cache)
    found = [
        (str(values[groups[rows[0]]]), np.bincount(roles[rows], minlength=len(ROLES)).tolist())
        for rows in _straddling(groups, roles)
    ]
    return len(values), sorted(found, key=lambda item: (-sum(item[1]), item[0]))


def _straddling(groups: np.ndarray, roles: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each group that stands in several splits, in the order of the rows."""
    first, last = role_spans(groups, roles)
    torn = np.flatnonzero(first != last)
    order = torn[np.argsort(groups[torn], kind="stable")]
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    found = np.split(order, ends) if len(order) else []
    return sorted(found, key=lambda rows: int(rows[0]))
