"""The look of the figures, their labels, and their files.

matplotlib lays out, draws and writes. Colours are Okabe and Ito's eight, which people with any
colour blindness can tell apart (https://jfly.uni-koeln.de/color/, 2008). On the page each is a CSS
custom property, so that figures follow the page into dark mode.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from math import ceil, log
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..errors import EngineUnavailableError, OutputError
from ..files import check_writable, user_path, write_atomically

WIDTH = 5.2  # inches
NARROW = 3.4  # as wide as a phone's screen
POINTS = 72  # to the inch
SMALL = 8.5  # points, the size of labels
STEP = 1.35 * SMALL  # points from one label to the next

COLOURS: Mapping[str, Mapping[str, str]] = {
    "light": {
        "--fc-text": "#1f2328",
        "--fc-muted": "#5f6770",
        "--fc-grid": "#e2e5e9",
        "--fc-surface": "#ffffff",
        "--fc-1": "#0072b2",
        "--fc-2": "#d55e00",
        "--fc-3": "#009e73",
        "--fc-4": "#cc79a7",
        "--fc-5": "#e69f00",
        "--fc-6": "#56b4e9",
        "--fc-7": "#000000",
        "--fc-8": "#f0e442",  # too faint on white to come earlier
    },
    # The same hues, lighter where they would be too dark; the two blues are further apart.
    "dark": {
        "--fc-text": "#e6e8eb",
        "--fc-muted": "#9aa4af",
        "--fc-grid": "#30363d",
        "--fc-surface": "#15181c",
        "--fc-1": "#3f93e6",
        "--fc-2": "#f0834a",
        "--fc-3": "#2fbf95",
        "--fc-4": "#e3a3c7",
        "--fc-5": "#f0b53c",
        "--fc-6": "#aeeaf2",
        "--fc-7": "#ffffff",
        "--fc-8": "#f0e442",
    },
}
_LIGHT = COLOURS["light"]
TEXT, MUTED, GRID, SURFACE = (
    _LIGHT[f"--fc-{name}"] for name in ("text", "muted", "grid", "surface")
)
SERIES = tuple(_LIGHT[f"--fc-{number}"] for number in range(1, 9))

_DPI = 200
_SETTINGS: Mapping[str, Any] = {
    # DejaVu Sans comes with matplotlib, so a figure does not depend on the machine's fonts.
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": TEXT,
    "text.parse_math": False,  # names come from users
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 0,
    "figure.facecolor": SURFACE,
    "figure.constrained_layout.w_pad": 5 / POINTS,
    "figure.constrained_layout.h_pad": 5 / POINTS,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: a browser has fonts for every script
}


def stylesheet() -> str:
    """Return the CSS of the figures' colours, for light and dark screens; paper is light."""

    def rule(scheme: str) -> str:
        values = "".join(f"{name}:{value};" for name, value in COLOURS[scheme].items())
        return f":root{{{values}}}"

    return f"{rule('light')}\n@media screen and (prefers-color-scheme:dark){{{rule('dark')}}}\n"


def require(expected: str, *modules: str) -> None:
    """Raise EngineUnavailableError, which says what was expected, unless all are installed."""
    try:
        for module in modules:
            import_module(module)
    except ImportError as error:
        raise EngineUnavailableError(
            f"{expected}, found: {error}; type: pip install 'featcache[report]'"
        ) from None


def _require_matplotlib() -> None:
    require("figures: expected the package matplotlib", "matplotlib.figure")


@contextmanager
def our_settings(**more: Any) -> Iterator[None]:
    """Draw with our settings and no others; the user's come back afterwards.

    A character that DejaVu Sans lacks becomes its box for missing glyphs, without a warning.
    """
    from matplotlib import style

    with style.context(["default", {**_SETTINGS, **more}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


@contextmanager
def sheet(width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure of so many inches; lay it out when the block ends."""
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with our_settings():
        figure = Figure(figsize=(width, height), dpi=2 * POINTS, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out again, everything would move by a hair
        for axes in figure.axes:
            _spread_labels(axes)


# ---- words


def percent(fraction: float, digits: int = 1) -> str:
    """Return ``76.9 %``, with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\u00a0%"


def short(name: str, columns: int = 24) -> str:
    """Return a user's name on one line, its middle left out where it is too long.

    A column is the width of a Latin letter; East Asian letters take two.
    """
    # The joiner holds emoji together; everything else that is invisible is spelt out.
    whole = "".join(c if c.isprintable() or c == "\u200d" else ascii(c)[1:-1] for c in name)
    if not whole.strip(" \u200d"):
        return "(no name)"
    if _fitting(whole, columns) == whole:
        return whole
    # The end often tells a name from the next.
    start, end = (columns - 1) * 2 // 3, (columns - 1) // 3
    return f"{_fitting(whole, start)}…{_fitting(whole[::-1], end)[::-1]}"


def scaled(panel: Any, columns: int) -> int:
    """Return how many columns of a name a panel has room for that is narrower than `WIDTH`."""
    return int(columns * min(1.0, panel.bbox.width / panel.figure.dpi / WIDTH))


def _fitting(text: str, columns: int) -> str:
    widths = (1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
    return text[: sum(width <= columns for width in accumulate(widths))]


def head(panel: Any, title: str, words: str = "") -> None:
    """Write a title and an explanation above a figure or subfigure; both describe its SVG."""
    width, height = (side / panel.figure.dpi * POINTS for side in panel.bbox.size)
    lines = textwrap.wrap(words, int(width / (0.56 * SMALL)))
    # matplotlib makes room for one text of one size: blank lines are room for the words.
    room = "\n" * ceil(len(lines) * SMALL / 11)
    place = {"x": 5 / width, "ha": "left", "va": "top"}
    panel.suptitle(title + room, size=11, weight="bold", **place)
    y = 1 - (5 + 1.35 * 11) / height
    panel.text(y=y, s="\n".join(lines), size=SMALL, color=MUTED, linespacing=1.3, **place)
    described = getattr(panel.figure, "featcache_words", "")
    panel.figure.featcache_words = f"{described} {title}. {words}".strip()


def percent_axis(axis: Any, words: str) -> None:
    """Show the fractions along an axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1))
    axis.set_label_text(words)


def log_ticks(axes: Any, ticks: Sequence[tuple[float, str]], gap: float = 0.1) -> None:
    """Label a logarithmic x at these places, the first ones first, ``gap`` of it apart."""
    low, high = axes.get_xlim()
    kept: dict[float, str] = {}
    for place, words in ticks:
        if low <= place <= high and all(
            abs(log(place / other)) > gap * log(high / low) for other in kept
        ):
            kept[place] = words
    axes.set_xticks(sorted(kept), [kept[place] for place in sorted(kept)])
    axes.set_xticks([], minor=True)


def label_beside(axes: Any, x: float, y: float, words: str, colour: str = MUTED) -> None:
    """Write words to the right of the axes, with a line to a point in them."""
    label = axes.annotate(
        words,
        (x, y),
        (1.04, y),
        textcoords=axes.get_yaxis_transform(),
        va="center",
        size=SMALL,
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.6,
            "shrinkB": 5,
            "relpos": (0, 0.5),
        },
        zorder=1,
    )
    label.set_gid("beside")


def _spread_labels(axes: Any) -> None:
    """Move the labels beside axes apart, as little as possible."""
    labels = [text for text in axes.texts if text.get_gid() == "beside"]
    step = STEP * axes.figure.dpi / POINTS / axes.bbox.height  # as a fraction of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    places = spread([to_axes.transform(label.xy)[1] for label in labels], step)
    for label, place in zip(labels, places, strict=True):
        label.set_position((1.04, to_axes.inverted().transform((0, place))[1]))


def spread(wanted: Sequence[float], step: float) -> np.ndarray:
    """Return the places in [0, 1] nearest to those wanted that are ``step`` apart.

    The sum of squared moves is least: with ``step`` times its rank taken off, no place may be
    below the one before it, which is isotonic regression.
    """
    from sklearn.isotonic import isotonic_regression

    places = np.array(wanted, np.float64)
    if len(places):
        order = np.argsort(places, kind="stable")
        ranks = step * np.arange(len(places))
        fitted = isotonic_regression(places[order] - ranks)
        places[order] = np.clip(fitted, 0, max(0, 1 - ranks[-1])) + ranks
    return places


# ---- files


def svg(figure: Any, kind: str = "plain") -> str:
    """Return a figure as an ``<svg>`` element for a page, in the colours of `stylesheet`.

    Of what matplotlib writes, the style sheet goes, which would apply to the whole page, and so
    do ids that nothing refers to; colours become custom properties. ``kind`` is its class: a page
    shows one of several widths.
    """
    words = getattr(figure, "featcache_words", "figure")
    # The salt makes ids of clip paths and markers those of this figure alone.
    root = ElementTree.fromstring(_written(figure, "svg", f"{kind} {words}", facecolor="none"))
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}style", "}metadata")):
                element.remove(child)
        element.tag = element.tag.partition("}")[2]
        attributes = {name.partition("}")[2] or name: v for name, v in element.attrib.items()}
        if "_" in attributes.get("id", "") or attributes.get("id") == "beside":
            del attributes["id"]
        for name, value in _LIGHT.items():
            if "style" in attributes:
                attributes["style"] = attributes["style"].replace(value, f"var({name})")
        element.attrib = attributes
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-label": words,
        "class": kind,
    }
    return ElementTree.tostring(root, encoding="unicode")


def check_plot(path: str | Path) -> None:
    """Raise, before any long work, unless a figure can be drawn and saved there."""
    _require_matplotlib()
    for place in _places(path):
        check_writable(place)


def save_figure(figure: Any, path: str | Path) -> tuple[Path, ...]:
    """Write a figure, whole or not at all; the same figure gives the same bytes.

    The name ends in ``.png`` or ``.svg``; without a suffix both are written.
    """
    places = _places(path)
    for place in places:
        data = _written(figure, place.suffix.lower()[1:])
        if place.suffix.lower() == ".svg":
            data = data.replace(b"<defs>", b"<defs>" + _dark_form().encode(), 1)
        write_atomically(place, data)
    return places


def _dark_form() -> str:
    """Return a style sheet that gives a file's colours their dark form on a dark screen.

    The file itself has plain colours: programs that convert it know no custom properties.
    """
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{COLOURS["dark"][name]} !important}}'
        for name, light in _LIGHT.items()
        for what in ("fill", "stroke")
    )
    return f"<style>@media screen and (prefers-color-scheme:dark){{{rules}}}</style>"


def _written(figure: Any, kind: str, salt: str = "featcache", **options: Any) -> bytes:
    buffer = io.BytesIO()
    keys = ("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",)
    with our_settings(**{"svg.hashsalt": salt}):
        options |= {"dpi": _DPI, "metadata": dict.fromkeys(keys)}
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _places(path: str | Path) -> tuple[Path, ...]:
    path = user_path(path)
    if path.is_dir():
        raise OutputError(
            f"{path}: expected the name of a file, found a folder; name a file in it, such as "
            f"{path / 'figure.png'}"
        )
    if path.suffix.lower() in (".png", ".svg"):
        return (path,)
    if path.suffix and not path.suffix[1:].isdigit():
        raise OutputError(
            f"{path}: expected a name that ends in .png or .svg, or in neither for both, found "
            f"{path.suffix!r}; rename it"
        )
    return tuple(path.with_name(path.name + suffix) for suffix in (".png", ".svg"))
