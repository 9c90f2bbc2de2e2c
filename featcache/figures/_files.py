"""Figures as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import check_writable, user_path, write_atomically
from ._style import our_settings, require_matplotlib
from ._svg import as_svg

__all__ = ["check_plot", "save_figure"]

_DPI = 200
_SUFFIXES = (".png", ".svg")


def check_plot(path: str | Path) -> None:
    """Find out before the long work that a figure can be drawn and saved.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    OutputError
        The suffix is of no format, or the place cannot be written.
    """
    require_matplotlib()
    for place in _places(path):
        check_writable(place)


def save_figure(figure: Any, path: str | Path) -> tuple[Path, ...]:
    """Write a figure, whole or not at all; the same figure gives the same bytes.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        What to write.
    path : str or Path
        Ends in ``.png`` or ``.svg``; without a suffix both are written. Missing folders
        are made.

    Returns
    -------
    tuple of Path
        What was written.

    Raises
    ------
    OutputError
        Another suffix, or a place that cannot be written.
    """
    places = _places(path)
    for place in places:
        write_atomically(
            place, as_svg(figure) if place.suffix.lower() == ".svg" else _as_png(figure)
        )
    return places


def _places(path: str | Path) -> tuple[Path, ...]:
    path = user_path(path)
    if path.is_dir():
        raise OutputError(
            f"{path}: expected the name of a file, found a folder; name a file in it, such as "
            f"{path / 'figure.png'}"
        )
    if path.suffix.lower() in _SUFFIXES:
        return (path,)
    if path.suffix and not path.suffix[1:].isdigit():
        raise OutputError(
            f"{path}: expected a name that ends in .png or .svg, or in neither for both, found "
            f"{path.suffix!r}; rename it"
        )
    return tuple(path.with_name(path.name + suffix) for suffix in _SUFFIXES)


def _as_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with our_settings():
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
