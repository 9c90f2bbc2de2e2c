"""Axes in the words of whoever reads them: percent, seconds to days, whole numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ._style import text_width

__all__ = ["count_axis", "log_ticks", "log_x", "percent_axis", "spaced_ticks", "time_ticks"]

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
