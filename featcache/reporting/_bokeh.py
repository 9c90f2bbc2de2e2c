"""The canvas of the map: Bokeh's, empty, to be filled by the page's own script."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..errors import EngineUnavailableError

__all__ = ["canvas", "require_page", "scripts"]


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
