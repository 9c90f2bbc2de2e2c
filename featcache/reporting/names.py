"""Names of classes and data sets as labels: data, of any length and in any script.

A name is never interpreted: no mathematics between dollar signs, no markup. It has
three forms, and a label carries them all: what fits (`Name.short`), which an SVG
holds as text; the whole, which an SVG shows on hovering; and what can be drawn with
the fonts at hand, for PNG, where a character without a glyph becomes a square and,
with matplotlib before 3.11, right-to-left text is put into visual order here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np

from .style import FONT, MUTED, TEXT, size_of, text_width

_MISSING = "□"
_NAMELESS = "(no name)"
_LONGEST = 24  # characters that make one sign: a family with skin tones has 11
_ACCENTS = 4  # on a letter; a heap of them would cover the figure
_JOINER = "\u200d"
_INVISIBLE = (_JOINER, "\u200c")  # shape their neighbours, and show nothing themselves
_ISOLATED = ("\u2068", "\u2069")  # around a name, so that its direction ends with it

# Where DejaVu Sans has no glyph, the first of these that is installed and has one is taken.
_FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic"),
    *("Malgun Gothic", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Thai", "Nirmala UI", "Lohit"),
    *("Noto Emoji", "Segoe UI Emoji", "Symbola", "Noto Sans Symbols2", "Apple Symbols"),
)


@dataclass(frozen=True)
class Name:
    """A name, ready to be shown.

    Parameters
    ----------
    whole : str
        All of it, on one line, unprintable characters spelt out.
    short : str
        What fits: with an ellipsis in its middle where something is left out.
    drawn : str
        The same in characters that the fonts have.
    """

    whole: str
    short: str
    drawn: str

    def __add__(self, more: str | Name) -> Name:
        """Return the name with words of ours, or another name, after it."""
        other = more if isinstance(more, Name) else Name(more, more, more)
        short = _isolated(self.short) + _isolated(other.short)
        return Name(self.whole + other.whole, short, self.drawn + other.drawn)

    def __radd__(self, more: str) -> Name:
        """Return the name with words of ours before it."""
        return Name(more, more, more) + self


def as_name(text: str, columns: int = 24) -> Name:
    """Return a name that takes at most so many columns.

    Parameters
    ----------
    text : str
        Anything.
    columns : int
        Of a terminal: a Latin letter takes one, a Chinese one two.
    """
    whole = "".join(c if c.isprintable() or c in _INVISIBLE else ascii(c)[1:-1] for c in text)
    short = _shortened(whole, columns)
    if not short.strip(" " + "".join(_INVISIBLE)):
        short = _NAMELESS
    return Name(whole, short, _drawable(short))


def put(artist: Any, name: Name) -> Any:
    """Have a text of matplotlib's show a name, and return it."""
    artist.set_parse_math(False)
    artist.set_text(name.drawn)
    artist.set_fontfamily(list(_families()))
    artist.featcache_name = name
    return artist


def set_ticks(axis: Any, places: Sequence[float], names: Sequence[Name], **looks: Any) -> None:
    """Label an axis with names."""
    axis.set_ticks(list(places), [name.drawn for name in names], **looks)
    for label, name in zip(axis.get_ticklabels(), names, strict=True):
        put(label, name)


def _isolated(text: str) -> str:
    """Keep the direction of a text to itself, where it is not that of what stands around it."""
    turned = any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
    return text.join(_ISOLATED) if turned else text


def _clusters(text: str) -> Iterator[str]:
    """Split a text where one may cut it: not before an accent, not within a joined emoji."""
    cluster = ""
    for character in text:
        joined = cluster.endswith(_JOINER) or character in _INVISIBLE
        skin = 0x1F3FB <= ord(character) <= 0x1F3FF
        if cluster and not joined and not skin and unicodedata.category(character)[0] != "M":
            yield cluster
            cluster = ""
        cluster += character
    if cluster:
        yield cluster


def _columns(text: str) -> int:
    return sum(
        0
        if unicodedata.category(character) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _shortened(text: str, columns: int) -> str:
    """Leave out the middle: the end of a name often tells it from the next."""
    letters = [_bare(cluster) for cluster in _clusters(text)]
    if sum(map(_columns, letters)) <= columns:
        return "".join(letters)
    start = _fitting(letters, (columns - 1) * 2 // 3)
    end = _fitting(letters[::-1], columns - 1 - sum(map(_columns, start)))
    return "".join((*start, "…", *end[::-1]))


def _bare(cluster: str) -> str:
    """Return a letter with as many accents as one can read."""
    marks = [place for place, c in enumerate(cluster) if unicodedata.category(c)[0] == "M"]
    return cluster[: marks[_ACCENTS] if len(marks) > _ACCENTS else _LONGEST]


def _fitting(clusters: Sequence[str], columns: int) -> list[str]:
    """Return as many clusters from the front as fit."""
    taken: list[str] = []
    for cluster in clusters:
        columns -= _columns(cluster)
        if columns < 0:
            break
        taken.append(cluster)
    return taken


@lru_cache(maxsize=1)
def _families() -> tuple[str, ...]:
    """Return the fonts for names: ours, then those of the fallbacks that are installed."""
    from matplotlib.font_manager import fontManager

    installed = {entry.name for entry in fontManager.ttflist}
    return (FONT, *(name for name in _FALLBACKS if name in installed))


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    """Return the code points that the fonts for names have between them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found: set[int] = set()
    for family in _families():
        found |= get_font(findfont(FontProperties(family=[family]))).get_charmap().keys()
    return frozenset(found)


def _drawable(text: str) -> str:
    """Return a text in characters that have glyphs, in the order in which they stand."""
    has = _glyphs()
    drawn = [
        "".join(c for c in cluster if ord(c) in has and c not in _INVISIBLE and not _selects(c))
        or _MISSING
        for cluster in _clusters(text)
    ]
    return "".join(drawn if _shapes_text() else _in_visual_order(drawn))


def _selects(character: str) -> bool:
    """Return whether a character only chooses between looks of the one before."""
    return 0xFE00 <= ord(character) <= 0xFE0F


@lru_cache(maxsize=1)
def _shapes_text() -> bool:
    """Return whether matplotlib orders right-to-left text itself, as it does from 3.11 on."""
    import matplotlib

    return tuple(matplotlib.__version_info__[:2]) >= (3, 11)


def _in_visual_order(clusters: Sequence[str]) -> list[str]:
    """Reverse the runs of right-to-left letters, with what stands between two of them."""
    ordered: list[str] = []
    run: list[str] = []
    between: list[str] = []
    for cluster in clusters:
        direction = unicodedata.bidirectional(cluster[0])
        if direction in ("R", "AL"):
            run += [*between, cluster]
            between = []
        elif run and direction not in ("L", "EN", "AN"):
            between.append(cluster)
        else:
            ordered += [*run[::-1], *between, cluster]
            run, between = [], []
    return [*ordered, *run[::-1], *between]


MOST_LABELS = 40  # of a panel: more would be a tall page of words
LABEL_COLUMNS = 38
SIZE = 8.5
STEP = 1.35 * SIZE  # points from one label to the next
_LEAD = 14.0  # points from the axes to the labels
_GAP = 5.0  # points from a value to the name after it


@dataclass(frozen=True)
class Label:
    """What a point is called.

    Parameters
    ----------
    x, y : float
        The point, in the coordinates of its axes.
    name : Name
        What it is called.
    value : str
        A figure, before the name.
    colour : str
        Of the line from the one to the other.
    """

    x: float
    y: float
    name: Name
    value: str = ""
    colour: str = MUTED


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> np.ndarray:
    """Return places as near to those wanted as they can be that keep their distance.

    The sum of squared displacements is least: with ``step`` times its rank taken off,
    each place must be no lower than the one before, which is isotonic regression.

    Parameters
    ----------
    wanted : sequence of float
        In any order.
    step : float
        The least distance between two places.
    low, high : float
        Between which all lie where there is room; else they begin at ``low``.

    Returns
    -------
    numpy.ndarray
        float64, in the order of ``wanted``.
    """
    from sklearn.isotonic import isotonic_regression

    places = np.array(wanted, np.float64)
    if not len(places):
        return places
    order = np.argsort(places, kind="stable")
    ranks = step * np.arange(len(places))
    fitted = isotonic_regression(places[order] - ranks)
    fitted = np.clip(fitted, low, max(low, high - ranks[-1]))
    places[order] = fitted + ranks
    return places


def column_width(labels: Sequence[Label]) -> float:
    """Return the points that labels take beside the axes."""
    names = (text_width(label.name.drawn, SIZE) for label in labels)
    return _value_width(labels) + max(names, default=0.0) + 2


def label_column(axes: Any, labels: Sequence[Label]) -> None:
    """Write labels beside axes that are laid out, a line from each to its point.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        To the right of which there is room for `column_width`.
    labels : sequence of Label
        Of points within the axes.
    """
    width, height = size_of(axes)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((label.x, label.y))[1]) * height for label in labels]
    places = spread(wanted, STEP, SIZE / 2, height - SIZE / 2) / height
    start = 1 + _value_width(labels) / width
    for label, place in zip(labels, places.tolist(), strict=True):
        values_width = text_width(label.value, SIZE) + _GAP if label.value else 0.0
        axes.annotate(
            "",
            xy=(label.x, label.y),
            xytext=(start - (values_width + 3) / width, place),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkB": 5},
            annotation_clip=False,
            zorder=1,
        ).set_in_layout(False)
        looks = {"va": "center", "size": SIZE, "in_layout": False, "transform": axes.transAxes}
        put(axes.text(start, place, "", color=TEXT, **looks), label.name)
        x = start - _GAP / width
        axes.text(x, place, label.value, color=MUTED, ha="right", parse_math=False, **looks)


def _value_width(labels: Sequence[Label]) -> float:
    """Return the points from the axes to the names."""
    values = (text_width(label.value, SIZE) + _GAP for label in labels if label.value)
    return _LEAD + max(values, default=0.0)


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
