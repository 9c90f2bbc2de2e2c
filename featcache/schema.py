"""Checks of JSON that came from a file: types, ranges and lengths, before anybody uses a field.

A schema is a mapping of names to checks; `wrong_fields` lists the names whose values fail. All
numbers are finite and of a size that formats in a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

_MOST = 1e15  # of any number: exact as a float, and short in a message
_MOST_STORED = 2.0**62  # of a number that an int64 holds
_MOST_TEXT = 100_000
_MOST_WORDS = 4096  # the longest path


def number(least: float = -_MOST, most: float = _MOST) -> Check:
    """Return a check for a finite number in a range; a bool is none."""

    def check(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        # Compared before it is converted: an integer may be too long for a float.
        return least <= value <= most and math.isfinite(value)

    return check


def count(least: int = 0, most: float = _MOST) -> Check:
    """Return a check for an integer in a range; a bool is none."""
    within = number(least, most)
    return lambda value: isinstance(value, int) and within(value)


def text(value: Any) -> bool:
    """Check for text of a sensible length that any file can hold."""
    if not isinstance(value, str) or len(value) > _MOST_TEXT or "\0" in value:
        return False
    return not any(
        "\ud800" <= letter <= "\udc7f" or "\udd00" <= letter <= "\udfff" for letter in value
    )


def words(value: Any) -> bool:
    """Check for text that is no longer than a path."""
    return text(value) and len(value) <= _MOST_WORDS


def flag(value: Any) -> bool:
    """Check for true or false."""
    return isinstance(value, bool)


def optional(check: Check) -> Check:
    """Return a check that also allows null."""
    return lambda value: value is None or check(value)


def list_of(
    check: Check, length: int | None = None, *, least: int = 0, distinct: bool = False
) -> Check:
    """Return a check for a list: of ``length`` items, of ``least`` or more, none of them twice."""

    def checked(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least:
            return False
        if (length is not None and len(value) != length) or not all(map(check, value)):
            return False
        return not distinct or len(set(value)) == len(value)

    return checked


def object_of(required: Mapping[str, Check], maybe: Mapping[str, Check] | None = None) -> Check:
    """Return a check for an object with these fields; it may have others."""
    return lambda value: isinstance(value, dict) and not wrong_fields(value, required, maybe or {})


def plain(levels: int) -> Check:
    """Return a check for text, a number, a flag, null, or so many levels of lists and objects."""
    leaf = optional(lambda one: flag(one) or text(one) or number(-_MOST_STORED, _MOST_STORED)(one))
    if not levels:
        return leaf
    inner = plain(levels - 1)

    def checked(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(text, value)) and all(map(inner, value.values()))
        return all(map(inner, value)) if isinstance(value, list) else leaf(value)

    return checked


def plain_object(value: Any) -> bool:
    """Check for an object of texts, numbers, flags and nulls."""
    return isinstance(value, dict) and plain(1)(value)


def wrong_fields(
    value: Any, required: Mapping[str, Check], maybe: Mapping[str, Check]
) -> list[str]:
    """Return the names of required fields that are missing, and of fields that fail their check."""
    if not isinstance(value, dict):
        return list(required)
    wrong = [
        name for name, check in required.items() if name not in value or not check(value[name])
    ]
    return wrong + [
        name for name, check in maybe.items() if name in value and not check(value[name])
    ]
