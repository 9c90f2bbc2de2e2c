"""What a message may repeat of a file that nobody trusts."""

from __future__ import annotations

__all__ = ["quote"]

_MAX_CHARACTERS = 120


def quote(words: object) -> str:
    """Return text on one line, short, and without codes that a terminal obeys.

    Names in a file, and messages of libraries that repeat parts of it, can be
    megabytes long and can hold anything.
    """
    text = str(words)
    shown = text[:_MAX_CHARACTERS].encode("unicode_escape").decode("ascii")
    whole = max(len(text), len(shown)) <= _MAX_CHARACTERS
    return shown if whole else f"{shown[:_MAX_CHARACTERS]}..."
