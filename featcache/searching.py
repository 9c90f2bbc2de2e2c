"""The images of a cache that are most similar to others, by the cosine of their features."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .backbones.text import encode_texts
from .errors import DatasetError, RecipeError, text_of
from .files import csv_line, user_path
from .importing.tensors import read_npy
from .notebook import ShownAsTable
from .options import with_options
from .prediction import PredictOptions, new_features
from .probes.blocks import Rows, Stacked
from .probes.ingredients import feature_ingredients
from .probes.knn import nearest
from .probes.question import check_finite
from .probes.zero_shot import vectors_at
from .progress import OnNote, OnProgress, silent
from .remote import is_url
from .store.cache import Cache, load


@dataclass(frozen=True)
class Neighbour:
    """One of the images that are most similar to a query.

    Parameters
    ----------
    id, split : str
        The image, and the split of the cache that it is in.
    row : int
        Its row there.
    label : str or None
        Its class by the cache's own labels.
    similarity : float
        Cosine of the two features, in [-1, 1].
    """

    id: str
    split: str
    row: int
    label: str | None
    similarity: float


@dataclass(frozen=True)
class Query:
    """What was searched for, and what was found.

    Parameters
    ----------
    name : str
        The image file, the id, the text, or the place in the vectors.
    kind : str
        ``"image"``, ``"id"``, ``"text"`` or ``"vector"``.
    split, row : str and int, or None
        Of an id: where in the cache it is.
    neighbours : tuple of Neighbour
        The nearest first; among equal similarities in the order train, val, test.
    """

    name: str
    kind: str
    split: str | None
    row: int | None
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class SearchResult(ShownAsTable):
    """The nearest images of every query.

    Parameters
    ----------
    cache : Path
        The features.
    n_images : int
        Images that were compared with each query: those of all splits.
    queries : tuple of Query
        Ids first, then images, texts and vectors; each in the order in which they were given.
    wall_s : float
        Duration.
    """

    cache: Path
    n_images: int
    queries: tuple[Query, ...]
    wall_s: float


@dataclass(frozen=True)
class SearchOptions:
    """Options of `search`, which describes them."""

    k: int = 10
    text: str | Sequence[str] = ()
    vectors: Any = None
    weights: str | Path | None = None
    backbone: str | Path | None = None
    device: str = "auto"
    mmap: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RecipeError(f"k: expected at least 1, found {self.k}")


@dataclass(frozen=True)
class _Wanted:
    """A query before the search: its feature (D,), and its cache row, -1 for none."""

    name: str
    kind: str
    feature: np.ndarray
    cache_row: int = -1


@with_options(SearchOptions)
def search(
    cache: str | Path | Cache,
    queries: str | Path | Sequence[str | Path] = (),
    *,
    options: SearchOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> SearchResult:
    """Find the images of a cache that are most similar to images, ids, texts or vectors.

    The search is exact and covers all splits, labelled or not. It needs memory for the features of
    the cache (with ``mmap`` none of them), for a block of 8 MB and the like per core, and for
    D + k numbers per query.

    Parameters
    ----------
    cache : str, Path or Cache
        The features (N, D).
    queries : str, Path or sequence of them
        Ids of the cache; else image files, folders, ``.zip`` and ``.tar`` archives, or URLs. An id
        is no neighbour of itself. Images get features as the cache records, as by
        `featcache.predict`.
    k : int
        Neighbours of each query; fewer where the cache has fewer images.
    text : str or sequence of str
        More queries in words, such as ``"a red car"``, as `text_features` takes them.
    vectors : numpy.ndarray, str or Path, optional
        More queries: numbers (M, D) or (D,), or a ``.npy`` file of them, such as features of text
        in the same space. With text or vectors, all is compared in the cut of D numbers:
        ``projected``, else the first that fits.
    weights : str or Path, optional
        The backbone's checkpoint, where the cache does not name one that is here.
    backbone : str or Path, optional
        The backbone that the cache records, where that is a file or a function.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``, for images.
    mmap : bool
        Map the features of a path into memory instead of reading them; they are not verified.
    on_progress, on_note : callable
        Called with the progress of images and of the search, and with one-line notes.

    Returns
    -------
    SearchResult

    Raises
    ------
    CacheError
        No cache, a damaged one, or one of feature maps.
    DatasetError
        A query is neither an id nor a path, or an image cannot be read.
    WeightsError
        The backbone of the cache is not available, or it has none, since it was imported; or, for
        text, it has no text tower.
    ShapeMismatchError
        Vectors of another length than the features.
    RecipeError
        No query, an option out of range, or text without the cut that it needs.
    """
    started = time.perf_counter()
    if not isinstance(cache, Cache):
        cache = load(cache, mmap=options.mmap)
    given = [queries] if isinstance(queries, (str, Path)) else list(queries)
    if not given and options.vectors is None and not options.text:
        raise RecipeError(
            "queries: expected an image, a folder, an id of the cache, a text or vectors, found "
            "none"
        )
    vectors, cut = _vectors(cache, options, on_progress)
    cache.check_vectors((cut,))
    splits = cache.splits()
    arrays = [split.cut(cut) for _, split in splits]
    for (role, _), array in zip(splits, arrays, strict=True):
        check_finite(cache, role, [array])
    keys = Rows(Stacked(arrays))
    ids = [name for _, split in splits for name in split.ids]
    rows_of: dict[str, list[int]] = {str(name): [] for name in given}
    for row, name in enumerate(ids):
        if name in rows_of:
            rows_of[name].append(row)
    wanted = [
        _Wanted(name, "id", keys[np.array([row])][0], row)
        for name, rows in rows_of.items()
        for row in rows
    ]
    paths = [name for name in dict.fromkeys(given) if not rows_of[str(name)]]
    wanted += _images(cache, paths, cut, options, on_progress, on_note) + vectors
    own = np.array([one.cache_row for one in wanted])
    # An id may be its own nearest neighbour, or have k copies that are as near: one more will do.
    k = min(options.k + bool((own >= 0).any()), len(keys))
    features = np.stack([one.feature for one in wanted]).astype(np.float32)
    similarity, rows = nearest(features, keys, k, on_progress=on_progress)
    places = [(role, row) for role, split in splits for row in range(len(split))]
    labels = np.concatenate([split.labels for _, split in splits]).tolist()

    def neighbour(row: int, cosine: float) -> Neighbour:
        label = cache.class_names[labels[row]] if labels[row] >= 0 else None
        return Neighbour(ids[row], *places[row], label, cosine)

    found = []
    for one, near, cosines in zip(wanted, rows.tolist(), similarity.tolist(), strict=True):
        pairs = [pair for pair in zip(near, cosines, strict=True) if pair[0] != one.cache_row]
        split, at = places[one.cache_row] if one.cache_row >= 0 else (None, None)
        neighbours = tuple(neighbour(*pair) for pair in pairs[: options.k])
        found.append(Query(one.name, one.kind, split, at, neighbours))
    return SearchResult(cache.path, len(keys), tuple(found), time.perf_counter() - started)


def _images(
    cache: Cache,
    paths: Sequence[str | Path],
    cut: str,
    options: SearchOptions,
    on_progress: OnProgress,
    on_note: OnNote,
) -> list[_Wanted]:
    """Return the images at paths, whose features are computed together."""
    for path in paths:
        if not is_url(path) and not os.path.exists(path):
            raise DatasetError(
                f"{path}: expected an id of {cache.path}, or the path of an image, a folder or an "
                "archive, found neither; featcache export lists the ids"
            )
    if not paths:
        return []
    batches = new_features(
        paths,
        {**feature_ingredients(cache.meta), "head_cuts": [cut]},
        str(cache.path),
        PredictOptions(weights=options.weights, backbone=options.backbone, device=options.device),
        mine="cache",
        again="give features with --vectors",
        on_progress=on_progress,
        on_note=on_note,
    )
    with closing(batches):
        return [
            _Wanted(name, "image", feature)
            for names, features in batches
            for name, feature in zip(names, features, strict=True)
        ]


def _vectors(
    cache: Cache, options: SearchOptions, on_progress: OnProgress
) -> tuple[list[_Wanted], str]:
    """Return the queries that are texts or vectors, and the cut to compare."""
    wanted: list[_Wanted] = []
    cut = cache.cuts[0]
    if options.text:
        texts = [options.text] if isinstance(options.text, str) else options.text
        made = text_features(cache, texts, backbone=options.backbone, on_progress=on_progress)
        rows, cut = vectors_at(cache, made, "text")
        wanted += [_Wanted(name, "text", one) for name, one in zip(texts, rows, strict=True)]
    if options.vectors is not None:
        where, given = "vectors", options.vectors
        if isinstance(given, (str, Path)):
            path = user_path(given)
            where, given = path.name, read_npy(path)[""]
        rows, cut = vectors_at(cache, given, where, [cut] if options.text else [])
        wanted += [_Wanted(f"{where}[{row}]", "vector", one) for row, one in enumerate(rows)]
    return wanted, cut


def text_features(
    cache: str | Path | Cache,
    texts: Sequence[str],
    *,
    backbone: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> np.ndarray:
    """Return vectors of texts in the space of a cache's features.

    They are made by the text tower of the model that made the features, with the same weights: a
    CLIP or SigLIP model of open_clip or transformers. Its library is needed, with PyTorch.

    Parameters
    ----------
    cache : str, Path or Cache
        The features, among them those of the cut ``projected`` (``pooled`` of a model that pools
        and projects in one layer, such as SigLIP).
    texts : sequence of str
        M of them; one that is longer than the tower takes is cut off.
    backbone : str or Path, optional
        The model that the cache records, where that is a folder.
    on_progress : callable
        Called with the number of texts so far.

    Returns
    -------
    numpy.ndarray
        float32 (M, D), not normalised.

    Raises
    ------
    CacheError
        No cache, or a damaged one.
    WeightsError
        A model without a text tower, other weights than made the features, or no tokenizer.
    RecipeError
        Another cut than that of the texts, or an empty text.
    EngineUnavailableError
        The library is not installed.
    """
    cache = cache if isinstance(cache, Cache) else load(cache)
    return encode_texts(
        cache.meta, texts, str(cache.path), backbone=backbone, on_progress=on_progress
    )


def as_csv(result: SearchResult) -> str:
    """Return a CSV table, a line per neighbour; the rank of the nearest is 1."""
    lines = [["query", "kind", "rank", "id", "split", "row", "label", "similarity"]]
    for query in result.queries:
        for rank, one in enumerate(query.neighbours, 1):
            place = [str(rank), one.id, one.split, str(one.row), one.label or ""]
            lines.append([query.name, query.kind, *place, f"{one.similarity:.6f}"])
    return text_of("".join(csv_line(line) for line in lines))
