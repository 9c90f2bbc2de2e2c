"""Names of classes and data sets as labels: data, of any length and in any script.

A name is never interpreted: no mathematics between dollar signs, no markup. It has
three forms, and a label carries them all: what fits (`Name.short`), which an SVG
holds as text; the whole, which an SVG shows on hovering; and what can be drawn with
the fonts at hand, for PNG, where a character without a glyph becomes a square and,
with matplotlib before 3.11, right-to-left text is put into visual order here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ._style import FONT

__all__ = ["Name", "as_name", "put", "set_ticks"]

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
