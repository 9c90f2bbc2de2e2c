"""Which images to label next: the ones a head is least sure of, ones unlike the others, or both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DatasetError, RecipeError, text_of
from ..files import check_writable, csv_line, user_path, write_atomically
from ..metrics import softmax
from ..notebook import ShownAsTable
from ..options import check_choice, with_options
from ..probes.blocks import Features, Rows, each_block
from ..probes.curves import fit
from ..probes.knn import nearest
from ..probes.question import Question, Unlabelled, opened, unlabelled
from ..probes.scaling import unit_length
from ..progress import OnProgress, Progress, silent
from ..store.cache import Cache

WAYS = ("uncertain", "diverse", "both")
_CANDIDATES, _PER_IMAGE = 5_000, 10  # images that are clustered: at least, and for each of n
_STEPS = 8  # of k-means
_TINY = 1e-9  # of a distance or weight: copies too are taken where nothing else is left
_ID, _SUGGESTED = "id", "suggested"  # columns of the table


@dataclass(frozen=True)
class Selected:
    """An image to label.

    Parameters
    ----------
    id : str
        The image, which is in the split train.
    suggested : str or None
        The class that a head on the labelled images gives it; None where there is no head.
    margin : float or None
        The head's probability of that class minus that of the next one, in [0, 1].
    """

    id: str
    suggested: str | None
    margin: float | None


@dataclass(frozen=True)
class SelectResult(ShownAsTable):
    """The images to label next.

    Parameters
    ----------
    cache : Path
        The features.
    by : str
        ``"uncertain"``, ``"diverse"`` or ``"both"``.
    n_labelled, n_unlabelled : int
        Training images with a label and without.
    selected : tuple of Selected
        The smallest margin first, or that of the heaviest cluster.
    csv : Path or None
        The table to fill in, where one was asked for.
    notes : tuple of str
        Further remarks.
    wall_s : float
        Duration.
    """

    cache: Path
    by: str
    n_labelled: int
    n_unlabelled: int
    selected: tuple[Selected, ...]
    csv: Path | None
    notes: tuple[str, ...]
    wall_s: float


@dataclass(frozen=True)
class SelectOptions:
    """Options of `select`, which describes them."""

    n: int = 100
    by: str = "both"
    target: str | None = None
    where: str | None = None
    seed: int = 0
    csv: str | Path | None = None
    mmap: bool = False

    def __post_init__(self) -> None:
        check_choice("by", self.by, WAYS)
        if self.n < 1:
            raise RecipeError(f"n: expected at least 1, found {self.n}")


@with_options(SelectOptions)
def select(
    cache: str | Path | Cache,
    *,
    options: SelectOptions,
    on_progress: OnProgress = silent,
) -> SelectResult:
    """Select the unlabelled training images that are most worth a label.

    ``"uncertain"`` takes the smallest margins of a head on the labelled images. ``"diverse"``
    clusters a sample of the images without a label into n clusters, beside those around the
    labelled images, and takes the middle of each. ``"both"`` weights every image by 1 - margin.
    Images of val and test are left alone, to measure by.

    Parameters
    ----------
    cache : str, Path or Cache
        The features (N, D).
    n : int
        How many images.
    by : str
        ``"uncertain"``, ``"diverse"`` or ``"both"``. Where no image has a label, ``"both"`` is
        ``"diverse"``.
    target : str, optional
        The column of the attached table that has the labels; a missing value is to be filled in.
        By default the cache's own labels.
    where : str, optional
        Only images for which this holds, such as ``'site != "B"'``.
    seed : int
        Of the sample and of the first centres.
    csv : str or Path, optional
        Write a table to this file that `featcache.label` takes back: the ids, the suggested class
        and the label, empty, of the selected images; then the images that have a label, and all
        other columns of the attached table.
    mmap : bool
        Map the features of a path into memory instead of reading them.
    on_progress : callable
        Called with the progress of clustering.

    Returns
    -------
    SelectResult

    Raises
    ------
    CacheError
        No cache, or a damaged one.
    DatasetError
        Every training image has a label, or none has where ``by`` is ``"uncertain"``.
    TableError
        No such column, or one that is no classes.
    RecipeError
        An option out of range.
    OutputError
        The table cannot be written.

    References
    ----------
    Scheffer et al., "Active hidden Markov models for information extraction", IDA 2001 (margins).
    Zhdanov, "Diverse mini-batch active learning", arXiv:1901.05954 (weighted k-means).
    """
    started = time.perf_counter()
    path = None if options.csv is None else user_path(options.csv)
    if path is not None:
        check_writable(path)
    cache = opened(cache, mmap=options.mmap)
    pool = unlabelled(cache, Question(target=options.target, where=options.where))
    known = np.unique(pool.labelled.labels)
    notes = []
    margins = guesses = None
    if options.by != "diverse" and len(known) > 1:
        labels = np.searchsorted(known, pool.labelled.labels)
        margins, guesses = _margins(pool.features, pool.labelled.views[0][:], labels, len(known))
    elif options.by == "uncertain":
        raise DatasetError(
            f"{cache.path}: expected training images of two classes to fit a head, found "
            f"{len(known)}; use --by diverse first, or name a column with --target"
        )
    elif options.by == "both":
        notes.append("fewer than two classes have a label: selected by diversity alone")
    n = min(options.n, len(pool.rows))
    if n < options.n:
        notes.append(f"only {n:,} images have no label")
    if options.by == "uncertain":
        assert margins is not None
        chosen = np.argsort(margins, kind="stable")[:n]
    else:
        chosen = _spread(pool, margins, n, options.seed, on_progress)
    ids = [name for _, split in cache.splits() for name in split.ids]
    suggested: list[str | None] = [None] * n
    shown: list[float | None] = [None] * n
    if margins is not None and guesses is not None:
        suggested = [pool.names[int(known[guess])] for guess in guesses[chosen].tolist()]
        shown = margins[chosen].tolist()
    rows = pool.rows[chosen]
    if path is not None:
        table = _table(cache, options.target, pool, rows, ids, suggested)
        write_atomically(path, text_of(table).encode())
    return SelectResult(
        cache=cache.path,
        by=options.by,
        n_labelled=len(pool.labelled),
        n_unlabelled=len(pool.rows),
        selected=tuple(
            Selected(ids[row], guess, margin)
            for row, guess, margin in zip(rows.tolist(), suggested, shown, strict=True)
        ),
        csv=path,
        notes=tuple(notes),
        wall_s=time.perf_counter() - started,
    )


def margins_of(probabilities: np.ndarray) -> np.ndarray:
    """Return the largest of probabilities (N, K) minus the next one: float64 (N,)."""
    second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
    return np.asarray(first - second, np.float64)


def _margins(
    features: Features, train: np.ndarray, labels: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the margin, float64 (n,), and the likeliest class of features (n, D)."""
    solution, _ = fit(np.asarray(train, np.float32), labels, n_classes)

    def of_block(features: Features, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        scores = np.asarray(features[rows], np.float32) @ solution.weight.T + solution.bias
        likely = softmax(scores)
        return margins_of(likely), likely.argmax(axis=1)

    blocks = each_block([features], of_block, features.shape[1] + 4 * n_classes)
    margins, guesses = zip(*blocks, strict=True)
    return np.concatenate(margins), np.concatenate(guesses)


def _spread(
    pool: Unlabelled,
    margins: np.ndarray | None,
    n: int,
    seed: int,
    on_progress: OnProgress,
) -> np.ndarray:
    """Choose n of the pool's images, int64 (n,): the middles of its clusters, the heaviest first.

    Spherical k-means, weighted by 1 - margin, on some of the images; clusters around labelled
    images are there from the start, and stay.
    """
    generator = np.random.default_rng(seed)
    count = min(len(pool.rows), max(_CANDIDATES, _PER_IMAGE * n))
    some = np.sort(generator.choice(len(pool.rows), count, replace=False))
    features = unit_length(pool.features[some])
    mean = features.mean(axis=0)

    def centred(rows: np.ndarray) -> np.ndarray:  # what all images share tells none apart
        return unit_length(unit_length(rows) - mean)

    unit = unit_length(features - mean)
    known = np.full(count, -1, np.float32)  # cosine to the nearest labelled image
    if len(pool.labelled):
        known = nearest(unit, Rows(pool.labelled.views[0], change=centred), 1)[0][:, 0]
    weight = np.ones(count) if margins is None else np.maximum(1 - margins[some], _TINY)
    close, centres = known, np.empty((n, unit.shape[1]), np.float32)
    for number in range(n):  # k-means++
        chance = np.cumsum(np.maximum(1 - close, _TINY) * weight)
        drawn = np.searchsorted(chance, generator.random() * chance[-1], "right")
        centres[number] = unit[min(int(drawn), count - 1)]
        close = np.maximum(close, unit @ centres[number])
    weighted = unit * weight[:, None].astype(np.float32)
    for step in range(_STEPS + 1):
        on_progress(Progress("clusters", step, _STEPS))
        close, of_centre = (found[:, 0] for found in nearest(unit, centres, 1))
        members = np.flatnonzero(close > known)
        members = members[np.lexsort((-close[members], of_centre[members]))]
        numbers, first = np.unique(of_centre[members], return_index=True)
        if step < _STEPS and len(first):
            centres[numbers] = unit_length(np.add.reduceat(weighted[members], first))
    middles = members[first]
    heavy = np.bincount(of_centre[members], weight[members], n)[numbers]
    middles = middles[np.argsort(-heavy, kind="stable")]
    # Where clusters are empty, the images that are furthest from all.
    value = (1 - np.maximum(close, known)) * weight
    value[middles] = -1
    rest = np.argsort(-value, kind="stable")[: n - len(middles)]
    chosen: np.ndarray = some[np.concatenate([middles, rest])]
    return chosen


def _table(
    cache: Cache,
    target: str | None,
    pool: Unlabelled,
    rows: np.ndarray,
    ids: Sequence[str],
    suggested: Sequence[str | None],
) -> str:
    """Return the CSV: the selected cache rows, then those that the table before knows."""
    labels = np.concatenate([split.labels for _, split in cache.splits()])
    names = [*cache.class_names, None]
    columns = {"label": [names[label] for label in labels.tolist()]}
    if target is not None and cache.table is not None:
        columns = {
            name: column.texts().tolist()
            for name, column in cache.table.columns.items()
            if name not in (_SUGGESTED, _ID)
        }
    known = [row for row in range(len(ids)) if any(column[row] for column in columns.values())]
    first = set(rows.tolist())
    listed = [*rows.tolist(), *(row for row in known if row not in first)]
    suggestions = [*suggested, *[None] * (len(listed) - len(rows))]
    lines = [[_ID, _SUGGESTED, *columns]]
    for row, suggestion in zip(listed, suggestions, strict=True):
        values = (column[row] or "" for column in columns.values())
        lines.append([ids[row], suggestion or "", *values])
    return "".join(csv_line(line) for line in lines)
