"""The look that every figure has, and the sheet that it is drawn on.

Colours are Okabe and Ito's eight, which people with any colour blindness can tell
apart; their yellow, too faint on white, comes last. A mark that matters differs in
shape or in its label too, never in colour alone. Each colour stands for a CSS custom
property (`COLOURS`), so that an SVG within a page follows the page's scheme.

Nothing here touches pyplot or leaves a setting changed: what a user has set for
figures of their own neither shows in these nor is lost.

References
----------
Okabe and Ito, "Color universal design" (2008), https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError, FeatcacheError, ShapeMismatchError

WIDTH = 5.2  # inches: as wide as a phone shows without shrinking letters below 10 pixels

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
        "--fc-8": "#f0e442",
    },
    # The same hues, lighter where they would drown.
    "dark": {
        "--fc-text": "#e6e8eb",
        "--fc-muted": "#9aa4af",
        "--fc-grid": "#30363d",
        "--fc-surface": "#15181c",
        "--fc-1": "#4ba7e0",
        "--fc-2": "#f0834a",
        "--fc-3": "#2fbf95",
        "--fc-4": "#e3a3c7",
        "--fc-5": "#f0b53c",
        "--fc-6": "#9bd3f5",
        "--fc-7": "#ffffff",
        "--fc-8": "#f0e442",
    },
}
_LIGHT = COLOURS["light"]
TEXT, MUTED, GRID, SURFACE = (
    _LIGHT[f"--fc-{name}"] for name in ("text", "muted", "grid", "surface")
)
SERIES = tuple(_LIGHT[f"--fc-{number}"] for number in range(1, 9))

FONT = "DejaVu Sans"  # comes with matplotlib, so that a figure is the same everywhere
_POINTS = 72.0  # to the inch
_DPI = 144.0

_SETTINGS: Mapping[str, Any] = {
    "font.family": [FONT],
    "font.size": 9.0,
    "text.color": TEXT,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.visible": False,
    "figure.facecolor": SURFACE,
    "axes.facecolor": "none",
    "figure.constrained_layout.w_pad": 5 / _POINTS,
    "figure.constrained_layout.h_pad": 5 / _POINTS,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def stylesheet() -> str:
    """Return the CSS that gives the figures in a page their colours, in both schemes.

    The dark ones hold where the reader asks for dark, and on paper never.
    """

    def rule(scheme: str) -> str:
        values = "".join(f"{name}:{value};" for name, value in COLOURS[scheme].items())
        return f":root{{{values}}}"

    return f"{rule('light')}\n@media screen and (prefers-color-scheme:dark){{{rule('dark')}}}\n"


def require_matplotlib() -> None:
    """Find out that there is something to draw with.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EngineUnavailableError(
            f"figures: expected the package matplotlib, found: {error}; type: pip install "
            "'featcache[report]'"
        ) from None


@contextmanager
def our_settings() -> Iterator[None]:
    """Draw as this room does, whatever the user has set; put that back afterwards."""
    from matplotlib import style

    with style.context(["default", dict(_SETTINGS)]):
        yield


@contextmanager
def sheet(width: float, height: float) -> Iterator[Any]:
    """Give an empty figure to draw on, and lay it out afterwards.

    Parameters
    ----------
    width, height : float
        Inches.

    Yields
    ------
    matplotlib.figure.Figure

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with our_settings():
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        settle(figure)


def settle(figure: Any) -> None:
    """Lay a figure out, once: laid out again, everything would move by a hair.

    Ticks come into being when they are first drawn, so that they too have our settings.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def size_of(panel: Any) -> tuple[float, float]:
    """Return width and height of a figure, a part of one or its axes, in points."""
    scale = _POINTS / panel.figure.dpi
    return float(panel.bbox.width * scale), float(panel.bbox.height * scale)


def text_width(text: str, size: float, families: tuple[str, ...] = (FONT,)) -> float:
    """Return how many points a line of text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=list(families), size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width)


_SIZE = 8.5
_ENOUGH = 3  # ticks, to read a scale by
_APART = 6.0  # points between the words of two ticks

_UNITS = ((1, "s"), (60, "min"), (3600, "h"), (86400, "d"))
# The most telling first: a unit, ten of it, and fractions of a second.
_TIMES = (
    *((seconds, f"1 {unit}") for seconds, unit in _UNITS),
    *((10 * seconds, f"10 {unit}") for seconds, unit in _UNITS),
    *((seconds, f"{seconds:g} s") for seconds in (0.1, 0.01, 0.001)),
    (100 * 86400, "100 d"),
)
_BETWEEN = (
    *((n * seconds, f"{n} {unit}") for n in (30, 2, 5, 20) for seconds, unit in _UNITS),
    *((seconds, f"{seconds:g} s") for seconds in (0.2, 0.5, 0.02, 0.05)),
)


def percent_axis(axis: Any, label: str) -> None:
    """Show fractions as percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
    axis.set_label_text(f"{label} (%)", parse_math=False)


def count_axis(axis: Any, most: int = 6) -> None:
    """Show whole numbers alone."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_x(axes: Any, values: Sequence[float]) -> None:
    """Make x logarithmic, with these positive values and a margin in it."""
    low, high = min(values), max(values)
    margin = (high / low) ** 0.05 if high > 2 * low else 3.0
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)


def time_ticks(axes: Any, width: float) -> None:
    """Show seconds along a logarithmic x, in units that one thinks in."""
    spaced_ticks(axes, _TIMES, width, _BETWEEN)


def log_ticks(axes: Any, width: float) -> None:
    """Show powers of ten along a logarithmic x, and what lies between where they are few."""
    powers = [10.0**power for power in range(-15, 16)]
    between = [n * power for n in (2, 5, 3, 7) for power in powers]
    ticks, more = (
        [(place, f"{place:g}") for place in places]
        for places in ([*powers[::2], *powers[1::2]], between)
    )
    spaced_ticks(axes, ticks, width, more)


def spaced_ticks(
    axes: Any,
    ticks: Sequence[tuple[float, str]],
    width: float,
    more: Iterable[tuple[float, str]] = (),
) -> None:
    """Set ticks along x, leaving out those that have no room beside the ones before them.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        With a logarithmic x whose limits are settled.
    ticks : sequence of (float, str)
        Places and what to call them, the most telling first.
    width : float
        Points that the axes have.
    more : iterable of (float, str)
        Ticks to take where fewer than three of the others are left.
    """
    from math import log

    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    low, high = axes.get_xlim()
    kept: list[tuple[float, str]] = []
    taken: list[tuple[float, float]] = []
    for number, (place, said) in enumerate((*ticks, *more)):
        if not low <= place <= high or (number >= len(ticks) and len(kept) >= _ENOUGH):
            continue
        at = width * log(place / low) / log(high / low)
        half = (text_width(said, _SIZE) + _APART) / 2
        if all(abs(at - other) >= half + its for other, its in taken):
            kept.append((place, said))
            taken.append((at, half))
    kept.sort()
    axes.xaxis.set_major_locator(FixedLocator([place for place, _ in kept]))
    axes.xaxis.set_major_formatter(FixedFormatter([said for _, said in kept]))
    axes.xaxis.set_minor_locator(NullLocator())


_MOST_DATASETS = 8
_METRICS = {"top1": "top-1", "balanced": "balanced accuracy", "f1": "macro F1"}


def field(item: Any, name: str, default: Any = None) -> Any:
    """Return what a dataclass, or the mapping that it became in a record, has under a name."""
    if isinstance(item, Mapping):
        return item.get(name, default)
    return getattr(item, name, default)


def percent(fraction: float, digits: int = 1) -> str:
    """Return ``76.9 %``, with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\u00a0%"


def metric_name(metric: str) -> str:
    """Return what a person calls one of `featcache.metrics.METRICS`."""
    return _METRICS.get(metric, metric)


def by_dataset(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the records of each data set: accuracies on different data share no axes.

    Raises
    ------
    FeatcacheError
        More data sets than a figure has room for.
    """

    def key(record: Mapping[str, Any]) -> tuple[str, str]:
        return str(record.get("dataset", "")), str(record.get("dataset_digest", ""))

    groups = [list(group) for _, group in groupby(sorted(records, key=key), key=key)]
    if len(groups) > _MOST_DATASETS:
        raise FeatcacheError(
            f"figure: expected runs of at most {_MOST_DATASETS} data sets, found {len(groups)}; "
            "name one"
        )
    return groups


def as_recalls(recalls: Any, class_names: Sequence[str]) -> np.ndarray:
    """Return accuracies of classes as float64 (K,), NaN for None; or (0,) where there are none.

    Raises
    ------
    ShapeMismatchError
        There is another number of names.
    """
    values = np.array([np.nan if value is None else value for value in recalls], np.float64)
    if values.size:
        check_shape(values.shape, (len(class_names),), "per class")
    return values


def check_shape(found: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    """Refuse an array that has not one place for each class name."""
    if found != expected:
        raise ShapeMismatchError(
            f"{what}: expected an array of shape {expected}, one place for each class name, found "
            f"{found}"
        )
