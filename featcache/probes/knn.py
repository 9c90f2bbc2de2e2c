"""The k-nearest-neighbour probe: how good features are without training; and the search for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import RecipeError, ShapeMismatchError
from ..metrics import balanced_accuracy, macro_f1, top1, wilson_interval
from ..notebook import Rows, ShownAsTable
from ..options import with_options
from ..process import Stop, work_ahead
from ..progress import OnProgress, Progress, silent
from ..runs import cache_facts, new_run, runs_folder, save_predictions, save_run
from ..store.cache import Cache
from .blocks import Features, each_block, one_blas_thread
from .outcomes import class_outcomes
from .question import Question, ask, cut_names, opened

_ROWS = 1024  # queries and keys per block pair: a product that keeps a core busy and fits its cache
_LEAST_ROWS = 64
_BLOCK_BYTES = 8 << 20  # of each array that a block needs
_MANY = 4  # times k candidates per row: above this a partition is cheaper
_VOTES_BYTES = 8 << 20  # of votes that are counted at once


@dataclass(frozen=True)
class KnnOptions(Question):
    """Options of `knn`, which describes them."""

    ks: Sequence[int] = (10, 20, 100, 200)
    temperature: float = 0.07
    cut: str | Sequence[str] | None = None
    runs: str | Path | None = None


@dataclass(frozen=True)
class KnnResult(ShownAsTable):
    """Accuracy of the vote of k neighbours.

    Parameters
    ----------
    k : int
        Neighbours.
    top1 : float
        On the test split, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    balanced_accuracy, macro_f1 : float
        Mean recall and mean F1 over classes.
    n_train, n_test : int
        Images.
    wall_s : float
        Of all k together: the similarities are computed once.
    notes : tuple of str
        Further remarks on the images, such as copies of test images among the training images.
    """

    k: int
    top1: float
    top1_interval: tuple[float, float]
    balanced_accuracy: float
    macro_f1: float
    n_train: int
    n_test: int
    wall_s: float
    notes: tuple[str, ...] = ()


@with_options(KnnOptions)
def knn(
    cache: str | Path | Cache | None = None,
    *,
    options: KnnOptions,
    on_progress: OnProgress = silent,
) -> list[KnnResult]:
    """Classify the test split by a weighted vote of the nearest training features.

    Every k is reported and none is chosen. Images without a label are left out. A neighbour of
    cosine s votes with weight exp(s / temperature).

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    ks : sequence of int
        Numbers of neighbours, each from 1 to the number of training images.
    temperature : float
        Above 0; the smaller, the more the nearest neighbours decide.
    cut : str or sequence of str, optional
        As in `featcache.probe`.
    target, task, separator, labels, by, split_column, group, where
        As in `Question`; the target must be classes.
    runs : str or Path, optional
        Folder for the records, one for each k; ``cache/runs`` by default.
    on_progress : callable
        Called with the number of test images classified so far.

    Returns
    -------
    list of KnnResult
        By increasing k.

    Raises
    ------
    CacheError
        No cache, or a damaged one.
    DatasetError
        A split without labelled images.
    TableError
        No such column, or one that does not fit.
    RecipeError
        A k or a temperature out of range, or a target that is no classes.
    """
    if options.weight_column is not None:
        raise RecipeError(
            "weight_column: expected none, since k-NN counts every neighbour by its similarity, "
            f"found {options.weight_column!r}; leave it out"
        )
    cuts = cut_names(options.cut)
    cache = opened(cache, cuts=cuts)
    asked = ask(cache, options, cuts=cuts).only_classes("k-NN")
    train, test = asked.train, asked.test
    labels, n_classes = test.labels, len(asked.names)
    started = time.perf_counter()
    shares = {k: np.empty((len(labels), 2)) for k in options.ks}

    def keep(k: int, rows: np.ndarray, votes: np.ndarray) -> None:
        total = votes.sum(axis=1)
        own = votes[np.arange(len(rows)), labels[rows]]
        shares[k][rows] = np.column_stack([votes.max(axis=1) / total, own / total])

    predictions = knn_probe(
        train.views[0],
        train.labels,
        test.views[0],
        n_classes,
        options.ks,
        options.temperature,
        on_votes=keep,
        on_progress=on_progress,
    )
    wall_s = time.perf_counter() - started
    results: Rows[KnnResult] = Rows()
    for k, predicted in predictions.items():
        accuracy = top1(predicted, labels)
        result = KnnResult(
            k=k,
            top1=accuracy,
            top1_interval=wilson_interval(accuracy, len(labels)),
            balanced_accuracy=balanced_accuracy(predicted, labels, n_classes),
            macro_f1=macro_f1(predicted, labels, n_classes),
            n_train=len(train.labels),
            n_test=len(labels),
            wall_s=wall_s,
            notes=asked.notes,
        )
        results.append(result)
        record = {
            "kind": "knn",
            "method": f"knn, k = {k}",
            **asdict(result),
            **asked.describes,
            "question": options.record(),
            **cache_facts(cache),
            "epochs": [],
            "n_epochs": 0,
            "images_per_s": len(labels) / wall_s,
            "temperature": options.temperature,
        }
        run = new_run(runs_folder(options.runs), f"knn{k}")
        own, of_label = shares[k].T
        columns = class_outcomes(
            test.ids,
            labels,
            predicted,
            asked.names,
            probability=own,
            label_probability=of_label,
        )
        save_predictions(run, columns)
        save_run(run, record)
    return results


def knn_probe(
    train_features: Features,
    train_labels: np.ndarray,
    test_features: Features,
    n_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    *,
    on_votes: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    on_progress: OnProgress = silent,
) -> dict[int, np.ndarray]:
    """Return, for each k ascending, the class of each test image: int64 (M,).

    ``on_votes`` is called with k, test rows int64 (B,) and the votes of their neighbours (B, K).

    Features are (N, D) and (M, D), labels int64 (N,). Among equal similarities the first training
    image is the nearest; among classes with equal votes the lowest wins.
    """
    n, m = len(train_features), len(test_features)
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > n:
        raise RecipeError(
            f"k: expected numbers of neighbours from 1 to the {n} training images, found "
            f"{', '.join(map(str, ks)) or 'none'}; ask for others"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise RecipeError(f"temperature: expected a positive number, found {temperature}")
    if train_features.shape[1:] != test_features.shape[1:]:
        raise ShapeMismatchError(
            f"test features: expected (M, {train_features.shape[1]}) as in training, found "
            f"{test_features.shape}; both must come from the same backbone"
        )
    predicted = {k: np.empty(m, np.int64) for k in ks}
    rows = max(16, _VOTES_BYTES // (8 * n_classes))
    on_progress(Progress("k-NN", 0, m))
    with closing(nearest_blocks(test_features, train_features, ks[-1])) as blocks:
        for block, similarity, neighbours in blocks:
            for first in range(0, len(neighbours), rows):
                part = slice(first, first + rows)
                classes_of = train_labels[neighbours[part]]
                for k, votes in _votes(similarity[part], classes_of, n_classes, ks, temperature):
                    predicted[k][block][part] = votes.argmax(axis=1)
                    if on_votes is not None:
                        on_votes(k, np.arange(block.start, block.stop)[part], votes)
            on_progress(Progress("k-NN", block.stop, m))
    return predicted


def _votes(
    similarity: np.ndarray,
    classes: np.ndarray,
    n_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, for each k, the votes (B, K) of the first k neighbours (B, W)."""
    # Relative to the nearest: exp cannot overflow, and a common factor changes no vote.
    nearness = similarity.astype(np.float64) - similarity[:, :1]
    weights = np.exp(nearness / temperature)
    votes = np.zeros((len(classes), n_classes))
    counted = 0
    for k in ks:
        votes += _tally(classes[:, counted:k], weights[:, counted:k], n_classes)
        counted = k
        yield k, votes


def _tally(classes: np.ndarray, weights: np.ndarray, n_classes: int) -> np.ndarray:
    """Return float64 (B, K): the sum of the weights that each class got."""
    cells = np.arange(len(classes))[:, None] * n_classes + classes
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(classes) * n_classes)
    tally: np.ndarray = votes.reshape(len(classes), n_classes)
    return tally


def nearest(
    queries: Features,
    keys: Features,
    k: int,
    *,
    exclude_self: bool = False,
    on_progress: OnProgress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k keys most similar to each query by cosine: exact, in bounded memory, in threads.

    Returns float32 (M, k) similarities in [-1, 1], the nearest first, and int64 (M, k) rows of the
    keys. Products are float32; among equal similarities the first key is the nearest. A zero
    feature has no direction: its similarity to everything is 0. With ``exclude_self`` query i and
    key i are the same image and never neighbours. Where queries and keys are the same object, each
    pair of blocks is multiplied once.
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
    """Yield queries (a slice), similarities and rows as `nearest` returns them, block by block.

    Threads compute block pairs ahead, each with the k-th best similarity it knows. An outdated
    bound lets more candidates through and never fewer, so the result does not depend on timing.
    """
    _check(queries, keys, k, exclude_self)
    dim = keys.shape[1]
    rows = min(_ROWS, max(_LEAST_ROWS, _BLOCK_BYTES // (4 * max(dim, 4 * k))))
    same = queries is keys
    key_lengths = _lengths(keys)
    lengths = key_lengths if same else _lengths(queries)
    kept: dict[int, _Nearest] = {}

    def block_pairs() -> Iterator[_BlockPair]:
        for first in range(0, len(queries), rows):
            unit = _unit(queries, lengths, slice(first, first + rows))
            of_queries = kept.setdefault(first, _Nearest(len(unit), k))
            # Row by row of the upper triangle: a block meets the others in ascending order.
            for other in range(first if same else 0, len(keys), rows):
                of_keys = None
                if same and other > first:
                    n_keys = min(rows, len(keys) - other)
                    of_keys = kept.setdefault(other, _Nearest(n_keys, k))
                yield _BlockPair(first, other, unit, of_queries, of_keys)

    def multiply(pair: _BlockPair, _: Stop) -> tuple[_BlockPair, _Candidates, _Candidates | None]:
        unit = _unit(keys, key_lengths, slice(pair.other, pair.other + rows))
        similarity = pair.unit @ unit.T
        if exclude_self and pair.first == pair.other:
            np.fill_diagonal(similarity, -np.inf)
        of_queries = _candidates(similarity, pair.of_queries.bound, k, 1)
        of_keys = _candidates(similarity, pair.of_keys.bound, k, 0) if pair.of_keys else None
        return pair, of_queries, of_keys

    n, m = -(-len(keys) // rows), -(-len(queries) // rows)
    total, done = n * (n + 1) // 2 if same else n * m, 0
    on_progress(Progress("neighbours", 0, total, "block"))
    with one_blas_thread() as workers:
        results = work_ahead(multiply, block_pairs(), workers=workers, ahead=2 * workers)
        with closing(results):
            for pair, of_queries, of_keys in results:
                pair.of_queries.add(of_queries, pair.other)
                if pair.of_keys is not None and of_keys is not None:
                    pair.of_keys.add(of_keys, pair.first)
                done += 1
                on_progress(Progress("neighbours", done, total, "block"))
                if pair.other + rows >= len(keys):
                    best = kept.pop(pair.first)
                    part = slice(pair.first, pair.first + len(best.values))
                    yield part, best.values, best.rows


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
    """Candidates for the nearest: W of them for each of the rows ``at`` (R,) of a block.

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

    def add(self, candidates: _Candidates, first: int) -> None:
        """Merge candidates among keys that all come after the ones already seen."""
        if not len(candidates.at):
            return
        # Earlier keys stand first, so a stable sort keeps them first among equals.
        values = np.hstack([self.values[candidates.at], candidates.values])
        rows = np.hstack([self.rows[candidates.at], candidates.columns + first])
        order = np.argsort(-values, axis=1, kind="stable")[:, : self._k]
        values = np.take_along_axis(values, order, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        if len(candidates.at) == len(self.values):
            self.values, self.rows = values, rows
        else:
            self.values[candidates.at], self.rows[candidates.at] = values, rows
        if self.values.shape[1] == self._k:
            self.bound = self.values[:, -1].copy()


@dataclass(frozen=True)
class _BlockPair:
    """Unit queries from row ``first`` on, and keys from row ``other`` on."""

    first: int
    other: int
    unit: np.ndarray
    of_queries: _Nearest
    of_keys: _Nearest | None  # of the keys, where they are queries too


def _candidates(similarity: np.ndarray, bound: np.ndarray | None, k: int, axis: int) -> _Candidates:
    """Return what can displace one of the k best, for the rows (axis 1) or the columns (axis 0)."""
    if bound is not None:
        # After the first blocks few candidates beat the k-th best, and picking them out is much
        # cheaper than a partition; not where many do, as when rows are sorted by class.
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
