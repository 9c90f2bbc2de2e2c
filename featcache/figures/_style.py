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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import EngineUnavailableError

__all__ = [
    "COLOURS",
    "GRID",
    "MUTED",
    "SERIES",
    "SURFACE",
    "TEXT",
    "WIDTH",
    "our_settings",
    "require_matplotlib",
    "settle",
    "sheet",
    "size_of",
    "stylesheet",
    "text_width",
]

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
