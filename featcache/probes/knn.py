"""The k-nearest-neighbour probe: how good features are without training; and the search for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..errors import RecipeError, ShapeMismatchError
from ..metrics import balanced_accuracy, macro_f1, mean_interval, top1, wilson_interval
from ..notebook import Rows, ShownAsTable
from ..options import check_choice, with_options
from ..process import Stop, work_ahead
from ..progress import OnProgress, Progress, silent
from ..runs import cache_facts, new_run, runs_folder, save_predictions, save_run
from ..store.cache import Cache
from ..store.reader import check_whole
from .blocks import Features, each_block, one_blas_thread, some_rows
from .curves import FULL, check_shots, draw, sizes_of
from .outcomes import class_outcomes
from .question import Part, Question, ask, cut_names, opened

DISTANCES = ("cosine", "euclidean")
TEMPERATURE = 0.07  # of cosines, as DINOv2

_ROWS = 1024  # queries and keys per block pair: a product that keeps a core busy and fits its cache
_LEAST_ROWS = 64
_BLOCK_BYTES = 8 << 20  # of each array that a block needs
_MANY = 4  # times k candidates per row: above this a partition is cheaper
_WAIT = 16  # candidates per row that are worth a merge
_CENTRE_ROWS = 4096
_NONE = np.float32(-np.inf)  # the similarity of no neighbour
_VOTES_BYTES = 8 << 20  # of votes that are counted at once


@dataclass(frozen=True)
class KnnOptions(Question):
    """Options of `knn`, which describes them."""

    ks: Sequence[int] = (10, 20, 100, 200)
    temperature: float | None = None
    distance: str = "cosine"
    shots: Sequence[int | str] = (FULL,)
    seeds: int = 5
    cut: str | Sequence[str] | None = None
    mmap: bool = False
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shots(self.shots)
        check_choice("distance", self.distance, DISTANCES)
        if self.seeds < 1:
            raise RecipeError(f"seeds: expected at least 1, found {self.seeds}")


@dataclass(frozen=True)
class KnnResult(ShownAsTable):
    """Accuracy of the vote of k neighbours.

    Parameters
    ----------
    k : int
        Neighbours.
    top1 : float
        On the test split, in [0, 1]; the mean over draws of training images.
    top1_interval : tuple of 2 floats
        95 %: Wilson's, or Student's of the mean over several draws.
    top5 : float or None
        Fraction of labels among the five classes with the most votes; None for six classes or
        fewer.
    balanced_accuracy, macro_f1 : float
        Mean recall and mean F1 over classes.
    shots : int or None
        Training images of every class; None for all.
    scores : tuple of float
        Top-1 of each draw.
    n_train, n_test : int
        Images.
    wall_s : float
        Of all k and draws together: the similarities are computed once.
    notes : tuple of str
        Further remarks on the images, such as copies of test images among the training images.
    """

    k: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float | None
    balanced_accuracy: float
    macro_f1: float
    shots: int | None
    scores: tuple[float, ...]
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
    cosine s votes with weight exp(s / temperature). Where no image is in test, every image is
    classified by all others: by those of other groups, where a group is asked for.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    ks : sequence of int
        Numbers of neighbours, each from 1 to the number of training images.
    temperature : float, optional
        Above 0; the smaller, the more the nearest neighbours decide. ``inf`` gives every neighbour
        one vote. By default 0.07 for cosines, as DINOv2, and ``inf`` for distances, as
        scikit-learn.
    distance : str
        ``"cosine"`` or ``"euclidean"``, for which s is minus half the squared distance.
    shots : sequence of int or "full"
        Images of every class to search, drawn as by `featcache.few_shot`. Of n images of a class,
        k is at most n, and n is one of the ks, as in DINOv2's protocol.
    seeds : int
        Draws of each number of shots.
    cut : str or sequence of str, optional
        As in `featcache.probe`.
    mmap : bool
        Map the features of a path into memory instead of reading them.
    target, task, separator, labels, by, split_column, group, where
        As in `Question`; the target must be classes.
    runs : str or Path, optional
        Folder for the records, one for each size and k; ``cache/runs`` by default.
    on_progress : callable
        Called with the number of test images classified so far.

    Returns
    -------
    list of KnnResult
        In the order of ``shots``, by increasing k.

    Raises
    ------
    CacheError
        No cache, or a damaged one.
    DatasetError
        A split without labelled images, or a class with fewer than shots.
    TableError
        No such column, or one that does not fit.
    RecipeError
        An option out of range, or a target that is no classes.

    References
    ----------
    Oquab et al., "DINOv2: Learning robust visual features without supervision", TMLR 2024.
    """
    if options.weight_column is not None:
        raise RecipeError(
            "weight_column: expected none, since k-NN counts every neighbour by its similarity, "
            f"found {options.weight_column!r}; leave it out"
        )
    cuts = cut_names(options.cut)
    cache = opened(cache, mmap=options.mmap, cuts=cuts)
    asked = ask(cache, options, cuts=cuts, together=None).only_classes("k-NN")
    train, test, alone = asked.train, asked.test, not len(asked.test)
    if alone:
        every = np.arange(len(train)) if train.groups is None else train.groups
        train = test = replace(train, groups=every)
    if alone and any(count != FULL for count in options.shots):
        raise RecipeError(
            f"shots: expected test images, found none in {cache.path}; leave out shots, or name a "
            "column with --split-column"
        )
    labels, n = test.labels, len(asked.names)
    results: Rows[KnnResult] = Rows()
    for size in sizes_of(cache, asked, options.shots):
        n_train = int(size.counts.sum())
        ks = sorted(set(options.ks))
        if size.shots is not None:
            ks = sorted({size.shots, *(k for k in ks if k <= size.shots)})
        started = time.perf_counter()
        draws = []
        for seed in range(1 if n_train == len(train) else options.seeds):
            rows = draw(train.labels, size.counts, seed)
            drawn = train if isinstance(rows, slice) else train.take(rows)
            draws.append(_classify(drawn, test, n, ks, options, on_progress))
        wall_s = time.perf_counter() - started
        for k in ks:
            of_k = [one[k] for one in draws]
            measured = [
                (top1(one, labels), balanced_accuracy(one, labels, n), macro_f1(one, labels, n))
                for one, _ in of_k
            ]
            accuracy, balanced, f1 = np.mean(measured, axis=0).tolist()
            scores = tuple(one for one, _, _ in measured)
            own = wilson_interval(accuracy, len(test))
            result = KnnResult(
                k=k,
                top1=accuracy,
                top1_interval=own if len(draws) == 1 else mean_interval(scores),
                top5=float(np.mean([votes[:, 2] < 5 for _, votes in of_k])) if n > 6 else None,
                balanced_accuracy=balanced,
                macro_f1=f1,
                shots=size.shots,
                scores=scores,
                n_train=n_train,
                n_test=len(test),
                wall_s=wall_s,
                notes=asked.notes,
            )
            results.append(result)
            shown = "" if size.shots is None else f", {size.shots} of each class"
            record = {
                "kind": "knn",
                "method": f"knn, k = {k}{shown}",
                **asdict(result),
                **asked.describes,
                **({"split": "leave-one-out"} if alone else {}),
                "question": options.record(),
                **cache_facts(cache),
                "epochs": [],
                "n_epochs": 0,
                "images_per_s": len(test) * len(draws) / wall_s,
                "temperature": _temperature(options),
                "distance": options.distance,
                "seeds": options.seeds,
            }
            if math.isinf(record["temperature"]):
                record["temperature"] = None
            run = new_run(runs_folder(options.runs), f"knn{k}")
            if len(draws) == 1:
                predicted, votes = of_k[0]
                columns = class_outcomes(
                    test.ids,
                    labels,
                    predicted,
                    asked.names,
                    probability=votes[:, 0],
                    label_probability=votes[:, 1],
                    split="fold" if alone else "test",
                )
                save_predictions(run, columns)
            save_run(run, record)
    return results


def _temperature(options: KnnOptions) -> float:
    if options.temperature is not None:
        return options.temperature
    return TEMPERATURE if options.distance == "cosine" else math.inf


_Answers: TypeAlias = "tuple[np.ndarray, np.ndarray]"  # classes (M,); votes for it, label, and rank


def _classify(
    train: Part,
    test: Part,
    n_classes: int,
    ks: Sequence[int],
    options: KnnOptions,
    on_progress: OnProgress,
) -> dict[int, _Answers]:
    """Return, for each k, the classes int64 (M,), and float64 (M, 3) of the votes.

    These are the shares of the class and of the label, and how many classes have more than it.
    """
    labels, facts = test.labels, {k: np.empty((len(test), 3)) for k in ks}
    classes = np.arange(n_classes)

    def keep(k: int, rows: np.ndarray, votes: np.ndarray) -> None:
        total, own = votes.sum(axis=1), votes[np.arange(len(rows)), labels[rows], None]
        # Among equal votes the lower class ranks higher.
        above = (votes > own) | ((votes == own) & (classes < labels[rows, None]))
        shares = np.column_stack([votes.max(axis=1), own]) / total[:, None]
        facts[k][rows] = np.column_stack([shares, above.sum(axis=1)])

    predicted = knn_probe(
        train.views[0],
        train.labels,
        train.views[0] if train is test else test.views[0],
        n_classes,
        ks,
        _temperature(options),
        distance=options.distance,
        groups=train.groups if train is test else None,
        on_votes=keep,
        on_progress=on_progress,
    )
    return {k: (predicted[k], facts[k]) for k in ks}


def knn_probe(
    train_features: Features,
    train_labels: np.ndarray,
    test_features: Features,
    n_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    *,
    distance: str = "cosine",
    groups: np.ndarray | None = None,
    on_votes: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    on_progress: OnProgress = silent,
) -> dict[int, np.ndarray]:
    """Return, for each k ascending, the class of each test image: int64 (M,).

    ``on_votes`` is called with k, test rows int64 (B,) and the votes of their neighbours (B, K).

    Features are (N, D) and (M, D), labels int64 (N,). Images of one of the ``groups`` int64 (N,),
    where test and training features are the same, are never neighbours. Among equal similarities
    the first training image is the nearest; among classes with equal votes the lowest wins.
    """
    m, ks = len(test_features), sorted(set(ks))
    n = len(train_features)
    if groups is not None:
        n -= int(np.unique(groups, return_counts=True)[1].max())
    if not ks or ks[0] < 1 or ks[-1] > n:
        raise RecipeError(
            f"k: expected numbers of neighbours from 1 to the {n} training images, found "
            f"{', '.join(map(str, ks)) or 'none'}; ask for others"
        )
    if not temperature > 0:
        raise RecipeError(f"temperature: expected a positive number, found {temperature}")
    if train_features.shape[1:] != test_features.shape[1:]:
        raise ShapeMismatchError(
            f"test features: expected (M, {train_features.shape[1]}) as in training, found "
            f"{test_features.shape}; both must come from the same backbone"
        )
    predicted = {k: np.empty(m, np.int64) for k in ks}
    rows = max(16, _VOTES_BYTES // (8 * n_classes))
    on_progress(Progress("k-NN", 0, m))
    space = Space(test_features, train_features, distance)
    # The squares of the space's unit could overflow.
    scale = temperature / space.unit / space.unit
    with closing(nearest_blocks(space, ks[-1], groups=groups)) as blocks:
        for block, similarity, neighbours in blocks:
            for first in range(0, len(neighbours), rows):
                part = slice(first, first + rows)
                classes_of = train_labels[neighbours[part]]
                for k, votes in _votes(similarity[part], classes_of, n_classes, ks, scale):
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
    weights = np.exp(nearness / max(temperature, np.finfo(float).tiny))
    votes = np.zeros((len(classes), n_classes))
    counted = 0
    for k in ks:
        cells = np.arange(len(classes))[:, None] * n_classes + classes[:, counted:k]
        shares = weights[:, counted:k].ravel()
        votes += np.bincount(cells.ravel(), shares, minlength=votes.size).reshape(votes.shape)
        counted = k
        yield k, votes


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
    space = Space(queries, keys)
    similarity = np.empty((len(queries), k), np.float32)
    rows = np.empty(similarity.shape, np.int64)
    blocks = nearest_blocks(space, k, exclude_self=exclude_self, on_progress=on_progress)
    with closing(blocks):
        for part, values, numbers in blocks:
            similarity[part], rows[part] = values, numbers
    return similarity, rows


def nearest_blocks(
    space: Space,
    k: int,
    *,
    exclude_self: bool = False,
    groups: np.ndarray | None = None,
    on_progress: OnProgress = silent,
) -> Generator[tuple[slice, np.ndarray, np.ndarray], None, None]:
    """Yield queries (a slice), similarities and rows as `nearest` does, block by block.

    Where queries and keys are the same images, those of one of the ``groups`` int64 (N,) are never
    neighbours.

    Threads compute block pairs ahead, each with a bound that it knows of the k-th best similarity,
    at first that of a few keys. A lower bound lets more candidates through and never fewer, so the
    result does not depend on timing.
    """
    queries, keys, same = space.queries, space.keys, space.same
    rows = min(_ROWS, max(_LEAST_ROWS, _BLOCK_BYTES // (4 * max(keys.shape[1], 4 * k))))
    kept: dict[int, _Nearest] = {}
    apart = np.arange(len(keys)) if exclude_self and groups is None else groups
    # Keys are often sorted by class: the first block would say little about the others.
    n_few = min(4 * rows, len(keys) // 16)
    few = some_rows(len(keys), n_few) if n_few >= k else None

    def similar(queries: np.ndarray, at: slice, of_keys: slice | np.ndarray) -> np.ndarray:
        similarity = space.similarity(queries, of_keys)
        if apart is not None:
            one, other = apart[at], apart[of_keys]
            if one.max() >= other.min() and one.min() <= other.max():
                similarity[one[:, None] == other] = _NONE
        return similarity

    def block_pairs() -> Iterator[_BlockPair]:
        for first in range(0, len(queries), rows):
            unit = space.query(slice(first, first + rows))
            of_queries = kept.setdefault(first, _Nearest(len(unit), k))
            # Row by row of the upper triangle: a block meets the others in ascending order.
            for other in range(first if same else 0, len(keys), rows):
                of_keys = None
                if same and other > first:
                    n_keys = min(rows, len(keys) - other)
                    of_keys = kept.setdefault(other, _Nearest(n_keys, k))
                yield _BlockPair(first, other, unit, of_queries, of_keys)

    def multiply(pair: _BlockPair, _: Stop) -> tuple[_BlockPair, _Candidates, _Candidates | None]:
        at = slice(pair.first, pair.first + rows)
        with pair.of_queries.lock:
            if few is not None and pair.of_queries.bound is None:
                pair.of_queries.limit(similar(pair.unit, at, few))
        similarity = similar(pair.unit, at, slice(pair.other, pair.other + rows))
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
                    part = slice(pair.first, pair.first + len(pair.unit))
                    yield part, *kept.pop(pair.first).ranked()


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


class Space:
    """Queries (M, D) and keys (N, D) in coordinates in which their similarity is a product.

    It is the cosine, or for ``"euclidean"`` minus half the squared distance, in units of the square
    of ``unit``, the largest length: no square overflows.
    """

    def __init__(self, queries: Features, keys: Features, distance: str = "cosine") -> None:
        check_choice("distance", distance, DISTANCES)
        self.queries, self.keys, self.same = queries, keys, queries is keys
        self._key_lengths = _lengths(keys)
        self._lengths = self._key_lengths if self.same else _lengths(queries)
        self._centre: np.ndarray | None = None
        self.unit = 1.0
        if distance == "euclidean":
            largest = (float(one.max(initial=0)) for one in (self._lengths, self._key_lengths))
            self.unit = max(largest) or 1.0
            self._lengths, self._key_lengths = (
                np.full_like(one, self.unit) for one in (self._lengths, self._key_lengths)
            )
            # A common offset would cost precision. Any point near the keys serves.
            some = self._at(keys, self._key_lengths, some_rows(len(keys), _CENTRE_ROWS))
            self._centre = some.mean(axis=0, dtype=np.float64).astype(np.float32)

    def query(self, rows: slice) -> np.ndarray:
        """Return float32 (n, D): queries in these coordinates."""
        return self._at(self.queries, self._lengths, rows)

    def similarity(self, queries: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        """Return float32 (n, m): of queries in these coordinates and some of the keys."""
        keys = self._at(self.keys, self._key_lengths, rows)
        similarity: np.ndarray = queries @ keys.T
        if self._centre is None:
            return similarity
        similarity -= np.einsum("nd,nd->n", keys, keys) / 2
        similarity -= np.einsum("nd,nd->n", queries, queries)[:, None] / 2
        return np.minimum(similarity, 0, out=similarity)

    def _at(self, features: Features, lengths: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        check_whole(features)
        of_rows = lengths[rows]
        unit: np.ndarray = np.asarray(features[rows], np.float32) / np.where(of_rows, of_rows, 1)
        if self._centre is not None:
            unit -= self._centre
        return unit


def _lengths(features: Features) -> np.ndarray:
    """Return float32 (N, 1): Euclidean lengths, 0 for a feature of zeros alone."""

    def of_block(features: Features, rows: slice) -> np.ndarray:
        x = np.asarray(features[rows], np.float64)  # whose squares neither overflow nor vanish
        lengths: np.ndarray = np.sqrt(np.einsum("nd,nd->n", x, x))
        return lengths

    parts = each_block([features], of_block, 2 * features.shape[1])
    lengths = np.concatenate([np.empty(0), *parts])
    limits = np.finfo(np.float32)
    least = np.where(lengths > 0, limits.tiny, 0)
    return np.clip(lengths, least, limits.max).astype(np.float32)[:, None]


# Candidates for the nearest, sorted by key within each query (C,): the query's place in its block,
# the similarity and the key's place.
_Candidates: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray]"


class _Nearest:
    """The nearest so far of a block of queries.

    Sorting is dear, so candidates wait until there are about k of them for each query.
    """

    def __init__(self, n: int, k: int) -> None:
        self._n, self._k = n, k
        self._values = np.full((n, k), _NONE, np.float32)
        self._rows = np.zeros((n, k), np.int64)
        self._waiting: list[_Candidates] = []
        self._n_waiting = 0
        self.bound: np.ndarray | None = None  # float32 (n,): what is above it may be among the k
        self.lock = threading.Lock()

    def limit(self, similarity: np.ndarray) -> None:
        """Bound the k-th best by that of a few keys (n, m)."""
        least = np.partition(similarity, -self._k, axis=1)[:, -self._k]
        # Others that are equal to it may come first.
        self.bound = np.nextafter(np.minimum(least, 1), _NONE)

    def add(self, candidates: _Candidates, first: int) -> None:
        """Add candidates among keys, from row ``first`` on, that come after those already seen."""
        at, values, places = candidates
        self._waiting.append((at, values, places.astype(np.int64) + first))
        self._n_waiting += len(at)
        if self.bound is None or self._n_waiting > self._n * max(self._k, _WAIT):
            self._merge()

    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Return similarities and rows (n, k), the nearest first."""
        self._merge()
        order = np.argsort(-self._values, axis=1, kind="stable")
        values = np.take_along_axis(self._values, order, axis=1)
        return values, np.take_along_axis(self._rows, order, axis=1)

    def _merge(self) -> None:
        if not self._waiting:
            return
        at, found, rows = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        order = np.argsort(at, kind="stable")
        found, rows = found[order], rows[order]
        counts = np.bincount(at, minlength=self._n)
        ends = np.cumsum(counts)
        # Side by side for each query, by ascending key: of equals the first counts. Queries with
        # about as many candidates are merged together.
        sizes = np.frexp(counts)[1]
        for size in np.unique(sizes[counts > 0]):
            of_size = np.flatnonzero(sizes == size)
            width = int(counts[of_size].max())
            places = (ends - counts)[of_size, None] + np.arange(width)
            beyond = places >= ends[of_size, None]
            places[beyond] = 0
            values = np.hstack([self._values[of_size], np.where(beyond, _NONE, found[places])])
            numbers = np.hstack([self._rows[of_size], rows[places]])
            chosen = _largest(values, self._k)
            self._values[of_size] = np.take_along_axis(values, chosen, axis=1)
            self._rows[of_size] = np.take_along_axis(numbers, chosen, axis=1)
        least = self._values.min(axis=1)
        self.bound = least if self.bound is None else np.maximum(self.bound, least)


@dataclass(frozen=True)
class _BlockPair:
    """Queries in the space's coordinates from row ``first`` on, and keys from row ``other`` on."""

    first: int
    other: int
    unit: np.ndarray
    of_queries: _Nearest
    of_keys: _Nearest | None  # of the keys, where they are queries too


def _candidates(similarity: np.ndarray, bound: np.ndarray | None, k: int, axis: int) -> _Candidates:
    """Return what can displace one of the k best, for the rows (axis 1) or the columns (axis 0)."""
    width = similarity.shape[1]
    if bound is not None:
        # After the first blocks few candidates beat the k-th best, and picking them out is much
        # cheaper than a partition; not where many do, as when rows are sorted by class.
        closer = similarity > (bound[:, None] if axis else bound)
        flat = np.flatnonzero(closer)
        if len(flat) <= _MANY * k * len(bound):
            # Within a block two bytes are enough; beyond it they are not.
            rows, columns = (one.astype(np.uint16) for one in np.divmod(flat, width))
            values = np.minimum(similarity.reshape(-1)[flat], 1)
            return (rows, values, columns) if axis else (columns, values, rows)
    whole = np.minimum(similarity if axis else similarity.T, 1, order="C")
    columns = _largest(whole, k)
    values = np.take_along_axis(whole, columns, axis=1)
    at = np.repeat(np.arange(len(whole), dtype=np.uint16), columns.shape[1])
    return at, values.ravel(), columns.ravel()


def _largest(similarity: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k largest of each row, ascending; of equals the first."""
    n = similarity.shape[1]
    if k >= n:
        return np.tile(np.arange(n), (len(similarity), 1))
    # Selecting values is several times faster than selecting their places.
    least = np.partition(similarity, n - k, axis=1)[:, n - k, None]
    chosen = similarity >= least
    surplus = np.count_nonzero(chosen, axis=1) - k
    for row in np.flatnonzero(surplus):
        equal = np.flatnonzero(similarity[row] == least[row])
        chosen[row, equal[-surplus[row] :]] = False
    return np.nonzero(chosen)[1].reshape(-1, k)
