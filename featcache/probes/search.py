"""The nearest features by cosine: exact, in bounded memory, on every core.

Blocks of queries meet blocks of keys, and of each meeting only what comes closer than
the k-th best so far is kept. Where queries and keys are the same array, each pair of
blocks meets once and serves both sides, which halves the work. Threads compute the
meetings ahead, each with the k-th best that it knows of: one that is out of date lets
more through, and never less than is needed. So the answer depends neither on their
number nor on their timing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError, ShapeMismatchError
from ..process import Stop, work_ahead
from ..progress import OnProgress, Progress, silent
from .blocks import Features, each_block, one_blas_thread

_ROWS = 1024  # that meet as many: a product that keeps a core busy and fits its cache
_LEAST_ROWS = 64
_BLOCK_BYTES = 8 << 20  # of each array that a block needs
_MANY = 4  # times k candidates per row, from where on a partition is the cheaper way


def nearest(
    queries: Features,
    keys: Features,
    k: int,
    *,
    exclude_self: bool = False,
    on_progress: OnProgress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k keys that are most similar to each query, by the cosine.

    Products are float32. Of keys equally similar, as float32 has it, the one that comes
    first is nearer. A feature of zeros has no direction: its similarity to everything is 0.

    Parameters
    ----------
    queries : numpy.ndarray or Rows
        (M, D), finite; float16, float32 or float64, memory-mapped or not.
    keys : numpy.ndarray or Rows
        (N, D), as the queries. The same object as the queries takes half the time.
    k : int
        From 1 to N, or to N - 1 with ``exclude_self``.
    exclude_self : bool
        Query i and key i are the same image, for every i, and no neighbour of each other.
    on_progress : callable
        Hears of pairs of blocks.

    Returns
    -------
    similarity : numpy.ndarray
        float32 (M, k), in [-1, 1], the nearest first.
    rows : numpy.ndarray
        int64 (M, k), which keys.

    Raises
    ------
    RecipeError
        A k out of its range.
    ShapeMismatchError
        Features of different lengths, or with ``exclude_self`` of different numbers.
    """
    _check(queries, keys, k, exclude_self)
    similarity = np.empty((len(queries), k), np.float32)
    rows = np.empty(similarity.shape, np.int64)
    blocks = nearest_blocks(queries, keys, k, exclude_self=exclude_self, on_progress=on_progress)
    with closing(blocks):
        for part, values, numbers in blocks:
            similarity[part], rows[part] = values, numbers
    return similarity, rows


def nearest_blocks(
    queries: Features,
    keys: Features,
    k: int,
    *,
    exclude_self: bool = False,
    on_progress: OnProgress = silent,
) -> Generator[tuple[slice, np.ndarray, np.ndarray], None, None]:
    """Yield what `nearest` returns, for one block of queries after the other.

    Yields
    ------
    part : slice
        Of the queries.
    similarity, rows : numpy.ndarray
        float32 and int64 (B, k).
    """
    _check(queries, keys, k, exclude_self)
    dim = keys.shape[1]
    rows = min(_ROWS, max(_LEAST_ROWS, _BLOCK_BYTES // (4 * max(dim, 4 * k))))
    same = queries is keys
    key_lengths = _lengths(keys)
    lengths = key_lengths if same else _lengths(queries)
    kept: dict[int, _Nearest] = {}

    def meetings() -> Iterator[_Meeting]:
        for first in range(0, len(queries), rows):
            unit = _unit(queries, lengths, slice(first, first + rows))
            mine = kept.setdefault(first, _Nearest(len(unit), k))
            # Row by row of the upper triangle, every block meets the others in ascending order.
            for other in range(first if same else 0, len(keys), rows):
                theirs = None
                if same and other > first:
                    n_theirs = min(rows, len(keys) - other)
                    theirs = kept.setdefault(other, _Nearest(n_theirs, k))
                yield _Meeting(first, other, unit, mine, theirs)

    def meet(meeting: _Meeting, _: Stop) -> tuple[_Meeting, _Candidates, _Candidates | None]:
        unit = _unit(keys, key_lengths, slice(meeting.other, meeting.other + rows))
        similarity = meeting.unit @ unit.T
        if exclude_self and meeting.first == meeting.other:
            np.fill_diagonal(similarity, -np.inf)
        mine = _candidates(similarity, meeting.mine.bound, k, 1)
        theirs = _candidates(similarity, meeting.theirs.bound, k, 0) if meeting.theirs else None
        return meeting, mine, theirs

    n, m = -(-len(keys) // rows), -(-len(queries) // rows)
    total, done = n * (n + 1) // 2 if same else n * m, 0
    on_progress(Progress("neighbours", 0, total, "block"))
    with one_blas_thread() as workers:
        results = work_ahead(meet, meetings(), workers=workers, ahead=2 * workers)
        with closing(results):
            for meeting, mine, theirs in results:
                meeting.mine.add(mine, meeting.other)
                if meeting.theirs is not None and theirs is not None:
                    meeting.theirs.add(theirs, meeting.first)
                done += 1
                on_progress(Progress("neighbours", done, total, "block"))
                if meeting.other + rows >= len(keys):
                    found = kept.pop(meeting.first)
                    part = slice(meeting.first, meeting.first + len(found.values))
                    yield part, found.values, found.rows


def _check(queries: Features, keys: Features, k: int, exclude_self: bool) -> None:
    if len(queries.shape) != 2 or queries.shape[1:] != keys.shape[1:]:
        raise ShapeMismatchError(
            f"queries: expected (M, {keys.shape[-1]}) as the keys, found {queries.shape}; "
            "both must come from the same backbone"
        )
    if exclude_self and len(queries) != len(keys):
        raise ShapeMismatchError(
            f"exclude_self: expected as many queries as keys, found {len(queries)} and {len(keys)}"
        )
    most = len(keys) - exclude_self
    if not 1 <= k <= most:
        raise RecipeError(f"k: expected a number of neighbours from 1 to {most}, found {k}")


def _lengths(features: Features) -> np.ndarray:
    """Return float32 (N, 1): Euclidean lengths, 1 for a feature of zeros."""

    def of_block(features: Features, rows: slice) -> np.ndarray:
        x = np.asarray(features[rows], np.float64)  # whose squares neither overflow nor vanish
        lengths: np.ndarray = np.sqrt(np.einsum("nd,nd->n", x, x))
        return lengths

    parts = each_block([features], of_block, 2 * features.shape[1])
    lengths = np.concatenate([np.empty(0), *parts])
    lengths[lengths == 0] = 1
    limits = np.finfo(np.float32)
    return np.clip(lengths, limits.tiny, limits.max).astype(np.float32)[:, None]


def _unit(features: Features, lengths: np.ndarray, rows: slice) -> np.ndarray:
    unit: np.ndarray = np.asarray(features[rows], np.float32) / lengths[rows]
    return unit


@dataclass(frozen=True)
class _Candidates:
    """What may be among the nearest: rows ``at`` of a block, (R,), and for each of them W.

    ``columns`` ascend; where there are fewer than W, ``values`` end in minus infinity.
    """

    at: np.ndarray
    values: np.ndarray
    columns: np.ndarray


class _Nearest:
    """The nearest so far of a block of queries, the nearest first."""

    def __init__(self, n: int, k: int) -> None:
        self._k = k
        self.values = np.empty((n, 0), np.float32)
        self.rows = np.empty((n, 0), np.int64)
        self.bound: np.ndarray | None = None  # the k-th best, (n,), once there are k

    def add(self, found: _Candidates, first: int) -> None:
        """Take in candidates from keys that all come after those seen before."""
        if not len(found.at):
            return
        # What is there comes from earlier rows: a stable sort leaves it first among equals.
        values = np.hstack([self.values[found.at], found.values])
        rows = np.hstack([self.rows[found.at], found.columns + first])
        order = np.argsort(-values, axis=1, kind="stable")[:, : self._k]
        values = np.take_along_axis(values, order, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        if len(found.at) == len(self.values):
            self.values, self.rows = values, rows
        else:
            self.values[found.at], self.rows[found.at] = values, rows
        if self.values.shape[1] == self._k:
            self.bound = self.values[:, -1].copy()


@dataclass(frozen=True)
class _Meeting:
    """Queries from row ``first`` on, of length 1, and keys from row ``other`` on."""

    first: int
    other: int
    unit: np.ndarray
    mine: _Nearest
    theirs: _Nearest | None  # the keys' own, where they are queries too


def _candidates(similarity: np.ndarray, bound: np.ndarray | None, k: int, axis: int) -> _Candidates:
    """Return what can displace one of the k best, for the rows (axis 1) or the columns (axis 0)."""
    if bound is not None:
        # After the first blocks few come closer than the k-th, and picking these out costs
        # far less than a partition. Only where many do, as when rows are sorted by class, not.
        closer = similarity > (bound[:, None] if axis else bound)
        flat = np.flatnonzero(closer)
        if len(flat) <= _MANY * k * len(bound):
            at, columns = np.divmod(flat, similarity.shape[1])
            values = similarity.reshape(-1)[flat]
            if not axis:
                order = np.argsort(columns, kind="stable")
                at, columns, values = columns[order], at[order], values[order]
            return _packed(at, columns, np.minimum(values, 1))
    whole = np.minimum(similarity if axis else similarity.T, 1, order="C")
    columns = _largest(whole, k)
    values = np.take_along_axis(whole, columns, axis=1)
    return _Candidates(np.arange(len(whole)), values, columns)


def _packed(at: np.ndarray, columns: np.ndarray, values: np.ndarray) -> _Candidates:
    """Put candidates (C,), sorted by row and column, side by side for each row."""
    rows, first, counts = np.unique(at, return_index=True, return_counts=True)
    width = int(counts.max(initial=0))
    place = np.arange(len(at)) - np.repeat(first, counts)
    line = np.repeat(np.arange(len(rows)), counts)
    packed = np.full((len(rows), width), -np.inf, np.float32)
    numbers = np.zeros(packed.shape, np.int64)
    packed[line, place], numbers[line, place] = values, columns
    return _Candidates(rows, packed, numbers)


def _largest(similarity: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k largest of each row, ascending; of equals the first."""
    n = similarity.shape[1]
    if k >= n:
        return np.tile(np.arange(n), (len(similarity), 1))
    columns = np.argpartition(similarity, n - k, axis=1)[:, n - k :]
    least = np.take_along_axis(similarity, columns, axis=1).min(axis=1)
    # argpartition takes any of those that equal the k-th: where some were left out, choose.
    left_out = (similarity >= least[:, None]).sum(axis=1) > k
    for row in np.flatnonzero(left_out):
        candidates = np.flatnonzero(similarity[row] >= least[row])
        order = np.argsort(-similarity[row, candidates], kind="stable")
        columns[row] = candidates[order[:k]]
    columns.sort(axis=1)
    return columns
