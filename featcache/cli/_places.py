"""Arguments that may be URLs: a path type would make one slash of their two."""

from __future__ import annotations

from pathlib import Path

from ..remote import is_url
from . import _output as out

__all__ = ["cache_place", "place"]


def place(text: str) -> str | Path:
    """Return a URL as it is, and anything else as a path."""
    return text if is_url(text) else Path(text)


def cache_place(text: str) -> Path:
    """Return the path of a cache; of one behind a URL, that of a copy, taken if need be."""
    if not is_url(text):
        return Path(text)
    from ..frameworks import import_numpy

    import_numpy()  # with its threads, before the store does
    from ..store import cache_file

    with out.progress() as report:
        return cache_file(text, report, out.note)
