"""A curve in a line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["shows", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_DIGITS = "0123456789"  # for a terminal that cannot show the bars


def sparkline(values: Sequence[float], encoding: str, most: int = 40) -> str:
    """Return one character per value: the lowest bar for the least, the highest for the most.

    Parameters
    ----------
    values : sequence of float
        In order; one that is not finite is a space.
    encoding : str
        Of what the line is written to; where it has no bars, digits stand in for them.
    most : int
        Characters; of more values some are left out evenly, never the first and the last.
    """
    shown = [values[index] for index in _evenly(len(values), most)]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    steps = _BARS if shows(_BARS, encoding) else _DIGITS
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        steps[int((value - low) / span * (len(steps) - 1)) if span else 0]
        if math.isfinite(value)
        else " "
        for value in shown
    )


def shows(text: str, encoding: str) -> bool:
    """Return whether a text can be written in an encoding."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _evenly(count: int, most: int) -> list[int]:
    """Return at most so many of the first ``count`` numbers, the first and the last included."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
