"""From what was gathered to one HTML file that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from typing import Any

from ..errors import EngineUnavailableError
from ..version import __version__
from .figure_files import Card
from .judged import Health, Judged, Probe
from .map import Points, encode
from .pictures import Place
from .style import stylesheet

_SCRIPTS = ("points.js", "filters.js", "words.js", "map.js")
_LEVEL = 2  # of headings; one more where there are several data sets


@dataclass(frozen=True)
class Tile:
    """A number at the top."""

    name: str
    value: str
    more: str


@dataclass(frozen=True)
class Row:
    """A run in the table, as text."""

    label: str
    run: str
    top1: str
    interval: str
    images: str
    epochs: str
    wall: str
    features: str
    price: str


@dataclass(frozen=True)
class Map:
    """What the page's script needs of a map.

    Parameters
    ----------
    payload : dict
        `encode`'s, with names of classes and Bokeh's empty plot.
    sheets : list of str
        Thumbnails; empty where there are none.
    axes : tuple of 2 str
        What the directions are.
    said : str
        How the map was made.
    predicted : bool
        Whether the points have predictions.
    """

    payload: dict[str, Any]
    sheets: list[str]
    axes: tuple[str, str]
    said: str
    predicted: bool


@dataclass
class View:
    """Everything that the page says of one data set."""

    key: str
    title: str
    lede: str
    classes: Sequence[str] = ()
    tiles: list[Tile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    cards: dict[str, Card] = field(default_factory=dict)
    probe: Probe | None = None
    probe_said: str = ""
    probe_notes: list[str] = field(default_factory=list)
    judged: Judged | None = None
    map: Map | None = None
    health: Health | None = None
    duplicates_said: str = ""
    mislabelled_said: str = ""
    outliers_said: str = ""
    facts: list[tuple[str, list[str]]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    thumbs: dict[Place, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Return the sections that there are: the ends of their ids, and their names."""
        curves = self.cards.keys() & {"few-shot", "training-set-size"}
        there = {
            ("comparison", "Comparison"): self.rows,
            ("probe", "Probe"): self.probe or curves,
            ("features", "Features"): self.map,
            ("health", "Health"): self.health,
            ("provenance", "Provenance"): True,
        }
        return [part for part, wanted in there.items() if wanted]


def make_map(key: str, points: Points, classes: Sequence[str], sheets: list[str]) -> Map:
    """Return what the page's script needs of these points."""
    payload = {
        **encode(points),
        "key": key,
        "classes": [str(name) for name in classes],
        "sheets": len(sheets),
        "plot": canvas(),
    }
    n = len(points.ids)
    said = points.projection.said
    if n < points.n_all:
        said += f" A draw of {n:,} of the {points.n_all:,} images."
    return Map(payload, sheets, points.projection.axes, said, points.predicted is not None)


def render(views: Sequence[View]) -> bytes:
    """Return the page.

    Names of files, classes and data sets are data: jinja2 escapes them in HTML, JSON has no
    ``<`` in it, and the script makes text of them. Should one slip through all the same, the
    page's policy lets no script run whose hash it does not name, and nothing be fetched.
    Bokeh's WebGL puts its shaders' code together at run time, hence ``unsafe-eval``.
    """
    from jinja2 import Environment

    level = _LEVEL + (len(views) > 1)
    for view in views:
        if view.map is not None:
            view.map.payload["level"] = level
    mapped = any(view.map for view in views)
    needed = (*scripts(), *map(_file, _SCRIPTS)) if mapped else ()
    style = stylesheet() + _file("page.css")
    environment = Environment(
        autoescape=True, trim_blocks=False, keep_trailing_newline=True, auto_reload=False
    )
    environment.filters.update(percent=percent, count=lambda n: f"{n:,}")
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    single = views[0] if len(views) == 1 else None
    page = environment.from_string(_file("page.html.j2")).render(
        views=views,
        level=level,
        title=single.title if single else f"{len(views)} data sets",
        lede=single.lede if single else "Runs on different data are never side by side.",
        made=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        version=__version__,
        policy=_policy(needed),
        style=style,
        scripts=needed,
    )
    # A file name need not be text: what cannot be shown is spelt out.
    return page.encode("utf-8", "backslashreplace")


def percent(fraction: float, digits: int = 1) -> str:
    """Return ``76.9 %``, with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, whichever one thinks in."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f}\u00a0ms"
    if seconds < 100:
        return f"{seconds:.1f}\u00a0s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}\u00a0min"
    return f"{seconds / 3600:.1f}\u00a0h"


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(needed: Sequence[str]) -> str:
    allowed = [f"'sha256-{_hash(script)}'" for script in needed]
    allowed += ["'unsafe-eval'"] if needed else ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(script: str) -> str:
    # What a browser hashes has its line ends normalised, as the parser does.
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def require_page() -> None:
    """Find out before the long work that there is something to make a page with.

    Raises
    ------
    EngineUnavailableError
        bokeh or jinja2 is not installed.
    """
    try:
        import bokeh.embed  # noqa: F401
        import jinja2  # noqa: F401
    except ImportError as error:
        raise EngineUnavailableError(
            f"report: expected the packages bokeh and jinja2, found: {error}; type: pip install "
            "'featcache[report]'"
        ) from None


@cache
def scripts() -> tuple[str, ...]:
    """Return Bokeh's own scripts whole, so that the page asks nobody for them."""
    from bokeh.resources import Resources

    raw = Resources(mode="inline", components=["bokeh", "bokeh-gl"]).js_raw
    return tuple(raw[:2])  # what follows sets a level of logging, and logs that


def canvas() -> dict[str, Any]:
    """Return, as JSON types, a square plot without axes whose points are yet to come.

    Its source has x and y from 0 to 1, c (RGBA in one number), m (a marker) and s (pixels).
    Where WebGL is not to be had, Bokeh draws a tenth of the points while they move.
    """
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, PanTool, Range1d, WheelZoomTool
    from bokeh.plotting import figure

    def whole() -> Range1d:
        return Range1d(start=-0.02, end=1.02, bounds=(-1.0, 2.0), min_interval=0.002)

    plot = figure(
        width=600,
        height=600,
        sizing_mode="stretch_both",
        output_backend="webgl",
        tools=[PanTool(), WheelZoomTool()],
        toolbar_location=None,
        x_range=whole(),
        y_range=whole(),
        x_axis_type=None,
        y_axis_type=None,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border=0,
        lod_timeout=150,
        name="map",
    )
    plot.grid.visible = False
    source = ColumnDataSource({"x": [], "y": [], "c": [], "m": [], "s": []}, name="points")
    plot.scatter(
        "x",
        "y",
        color="c",
        marker="m",
        size="s",
        line_color=None,
        fill_alpha=0.7,
        source=source,
        name="dots",
    )
    return dict(json_item(plot))
