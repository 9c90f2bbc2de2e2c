"""Figures as SVG: the same bytes every time, in colours that follow the page's.

What matplotlib writes is made fit to stand within HTML: its style sheet, which would
hold for the whole page, becomes attributes; ids become the figure's own; names of
fonts give way to the reader's; and nothing refers to anything outside.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors import OutputError
from ..files import check_writable, user_path, write_atomically
from .style import COLOURS, our_settings, require_matplotlib

_SVG = "http://www.w3.org/2000/svg"
_LINKS = "{http://www.w3.org/1999/xlink}href"
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_SALT = "featcache"  # else matplotlib's ids are random
_PIXELS = 96 / 72  # CSS pixels to the point
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT_STYLE = re.compile(r"font: ((?:[\w.-]+ )*[\d.]+px) [^;]*")
_VARIABLES = {value: name for name, value in COLOURS["light"].items()}


def svg(figure: Any) -> str:
    """Return a figure as SVG to stand within a page.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Of one of this room's functions; others will do.

    Returns
    -------
    str
        An ``<svg>`` element that shrinks to its column. Its colours are the CSS custom
        properties of `stylesheet`, or where the page sets none, those for light pages; it
        has no background. Text is text, in the page's fonts; title and description are
        there for screen readers. Ids begin with a digest of the content, so that figures
        in one page do not meet.
    """
    return _finished(_written(figure), _words(figure), variables=True)


def as_svg(figure: Any) -> bytes:
    """Return a figure as an SVG file that stands by itself."""
    return _finished(_written(figure), _words(figure), variables=False).encode() + b"\n"


def _written(figure: Any) -> ElementTree.Element:
    """Return matplotlib's SVG, with the names as they are instead of as they can be drawn."""
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": _SALT}
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with our_settings(), matplotlib.rc_context(settings), _tagged(figure) as names:
        figure.savefig(buffer, format="svg", metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for group in root.iter(f"{{{_SVG}}}g"):
        name = names.get(group.get("id", ""))
        texts = list(group.iter(f"{{{_SVG}}}text"))
        if name is not None and texts:
            texts[0].text = name.short.strip()
            if name.whole != name.short:
                title = ElementTree.Element(f"{{{_SVG}}}title")
                title.text = name.whole
                group.insert(0, title)
    return root


@contextmanager
def _tagged(figure: Any) -> Iterator[dict[str, Any]]:
    """Give an id to each text that shows a name, for as long as it is written."""
    shown = figure.findobj(lambda artist: hasattr(artist, "featcache_name"))
    tags = {f"name-{number}": artist for number, artist in enumerate(shown)}
    for tag, artist in tags.items():
        artist.set_gid(tag)
    try:
        yield {tag: artist.featcache_name for tag, artist in tags.items()}
    finally:
        for artist in tags.values():
            artist.set_gid(None)


def _words(figure: Any) -> tuple[str, str]:
    """Return title and description."""
    words = getattr(figure, "featcache_words", ())
    title = "; ".join(title for title, _ in words) or "figure"
    return title, " ".join(said for _, said in words if said)


def _finished(root: ElementTree.Element, words: tuple[str, str], *, variables: bool) -> str:
    """Return the text of an SVG of ours from matplotlib's."""
    referred = _referred(root)
    for element in list(root.iter()):
        element.tag = str(element.tag).removeprefix(f"{{{_SVG}}}")
        if _LINKS in element.attrib:
            element.set("href", element.attrib.pop(_LINKS))
        if element.get("id") not in referred:
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("style", _restyled(element.get("style", ""), variables))
    _prune(root)
    width, height = (float(side) for side in root.get("viewBox", "").split()[2:])
    root.attrib.clear()
    digest = hashlib.sha256(ElementTree.tostring(root) + repr(words).encode()).hexdigest()[:10]
    prefix = f"fc-{digest}-"
    _rename(root, referred, prefix)
    if variables:
        _drop_background(root)
    for number, (tag, text) in enumerate(zip(("title", "desc"), words, strict=True)):
        element = ElementTree.Element(tag, {"id": prefix + tag})
        element.text = text
        root.insert(number, element)
    root.attrib.update(
        {
            "xmlns": _SVG,
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{_PIXELS * width:.0f}",
            "height": f"{_PIXELS * height:.0f}",
            "role": "img",
            "aria-labelledby": f"{prefix}title {prefix}desc",
            "style": "max-width:100%;height:auto;stroke-linejoin:round;stroke-linecap:butt",
            "font-family": _FONTS,
        }
    )
    return ElementTree.tostring(root, encoding="unicode")


def _referred(root: ElementTree.Element) -> set[str]:
    """Return the ids that something in the SVG refers to."""
    found: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            found |= set(_REFERENCE.findall(value))
            if name == _LINKS:
                found.add(value.removeprefix("#"))
    return found


def _rename(root: ElementTree.Element, ids: set[str], prefix: str) -> None:
    short = {name: f"{prefix}{number}" for number, name in enumerate(sorted(ids))}
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, short[value])
            elif name == "href":
                element.set(name, f"#{short[value.removeprefix('#')]}")
            else:
                element.set(name, _REFERENCE.sub(lambda found: f"url(#{short[found[1]]})", value))


def _restyled(style: str, variables: bool) -> str:
    """Return a style with the reader's fonts, and with the page's colours."""
    style = _FONT_STYLE.sub(lambda found: f"font: {found[1]} {_FONTS}", style)
    if variables:
        for value, name in _VARIABLES.items():
            style = re.sub(rf"{value}\b", f"var({name}, {value})", style)
    return style


def _prune(root: ElementTree.Element) -> None:
    """Take out what shows nothing: matplotlib's style sheet, metadata, empty lines and groups."""
    for parent in list(root.iter()):
        for child in list(parent):
            empty = child.tag in ("text", "g", "defs") and not len(child) and not child.text
            if child.tag in ("style", "metadata") or empty:
                parent.remove(child)


def _drop_background(root: ElementTree.Element) -> None:
    """Take out the figure's own patch, the first path of all: the page has a background."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag == "path":
                parent.remove(child)
                return


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
