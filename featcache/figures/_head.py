"""What stands above a figure: its title, and what there is to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ._names import Name, as_name, put
from ._style import MUTED, size_of, text_width

__all__ = ["dataset_title", "head", "titled"]

_TITLE, _SAID = 11.0, 8.5  # sizes of letters in points
_LINE = 1.3
_PAD = 5.0  # points around everything
_TITLE_COLUMNS = 40


def head(panel: Any, title: str | Name, said: str = "") -> None:
    """Write a title and, below it, what there is to say, at the top of a figure or a part of one.

    The words are also what a screen reader hears.

    Parameters
    ----------
    panel : matplotlib.figure.Figure or SubFigure
        Whose words these are. Call before `sheet` lays it out.
    title : str or Name
        One line.
    said : str
        In smaller letters, and as many lines as it takes.
    """
    name = title if isinstance(title, Name) else Name(title, title, title)
    width, height = size_of(panel)
    lines = _wrapped(said, width - 3 * _PAD)
    place = {"ha": "left", "va": "top", "parse_math": False}
    # matplotlib leaves room for one title, of one size: blank lines make room for the others.
    room = "\n" * ceil(len(lines) * _SAID / _TITLE)
    top = 1 - _PAD / height  # where matplotlib puts a title that it makes room for
    shown = panel.suptitle("", x=_PAD / width, size=_TITLE, weight="bold", **place)
    put(shown, Name(name.whole, name.short + room, name.drawn + room))
    for number, line in enumerate(lines):
        y = top - _LINE * (_TITLE + number * _SAID) / height
        panel.text(_PAD / width, y, line, size=_SAID, color=MUTED, **place)
    words = getattr(panel.figure, "featcache_words", ())
    panel.figure.featcache_words = (*words, (name.whole, said))


def _wrapped(text: str, width: float) -> list[str]:
    """Break a text into lines of at most so many points, between words."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, _SAID) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def titled(title: str, panels: Sequence[Sequence[Mapping[str, Any]]]) -> Name:
    """Return a figure's title, with the data set where there is one."""
    dataset = panels[0][0].get("dataset")
    if len(panels) > 1 or not dataset:
        return as_name(title, len(title))
    return f"{title}: " + as_name(str(dataset), _TITLE_COLUMNS)


def dataset_title(axes: Any, record: Mapping[str, Any]) -> None:
    """Write above one of several panels which data set it is of."""
    digest = str(record.get("dataset_digest", ""))[:8]
    name = as_name(str(record.get("dataset", "")), _TITLE_COLUMNS) + f" ({digest})"
    put(axes.set_title("", loc="left", size=9), name)
