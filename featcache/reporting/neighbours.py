"""A page of what `featcache.search` found, with pictures."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ..datasets.batches import decoded_batches
from ..datasets.dataset import Dataset
from ..errors import FeatcacheError
from ..files import write_atomically
from ..new_images import PlacedImages, find_places
from ..preprocess import Preprocess
from ..progress import OnNote, OnProgress, silent
from ..searching import Query, SearchResult
from ..store.cache import load
from .page import render_sheet
from .pictures import Place, as_picture, find_pictures

_SIDE = 128  # pixels of an image on the page
_MOST = 100  # queries on a page


def write_neighbours(
    result: SearchResult,
    page: Path,
    *,
    images: str | Path | Dataset | None = None,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> None:
    """Write the page, with the pictures of ``images``, what the cache was made from.

    Raises
    ------
    DatasetError
        ``images`` is not what the cache was made from.
    OutputError
        The page cannot be written.
    """
    cache, shown = load(result.cache), result.queries[:_MOST]
    notes: list[str] = []
    thumbs: dict[Place, str] = {}
    if images is None:
        notes.append("no pictures of the cache's images: name them with --images")
    else:
        pictures, _ = find_pictures(cache, images, data_root, on_progress)
        assert pictures is not None  # a data set that was named raises
        places = [(one.split, one.row) for query in shown for one in query.neighbours]
        places += [place for one in shown if (place := _place(one))]
        thumbs = pictures.small(places, _SIDE, on_progress)
    if len(result.queries) > _MOST:
        notes.append(f"the first {_MOST} of {len(result.queries):,} queries; --csv writes all")
    for note in notes:
        on_note(note)
    queries = [
        (one, thumbs.get(place) if (place := _place(one)) else _picture(one)) for one in shown
    ]
    write_atomically(
        page,
        render_sheet(
            "search",
            "neighbours.html.j2",
            result=result,
            dataset=str(cache.meta["dataset"]),
            queries=queries,
            thumbs=thumbs,
            notes=notes,
        ),
    )


def _place(query: Query) -> Place | None:
    """Return where in the cache a query is that is one of its ids."""
    return None if query.split is None or query.row is None else (query.split, query.row)


def _picture(query: Query) -> str | None:
    """Return the picture of a query that is an image file of its own."""
    if query.kind != "image":
        return None
    try:
        file = PlacedImages(find_places([query.name]))
    except FeatcacheError:  # a name inside an archive
        return None
    with closing(
        decoded_batches(file, [range(1)], Preprocess(_SIDE), workers=1, on_error="skip")
    ) as batches:
        return next((as_picture(pixels, _SIDE) for one in batches for pixels in one.pixels), None)
