"""Every error that featcache raises on purpose.

::

    FeatcacheError
    ├── CacheError
    │   ├── CacheMissError       (also FileNotFoundError)  no cache where one was asked for
    │   ├── CacheMismatchError   a cache is there, but of other data, weights or format
    │   └── CacheCorruptError    a cache is there, but its bytes are not what was written
    ├── DatasetError             images, labels or classes are missing or unreadable
    │   └── DatasetChangedError  an image is no longer the one that was hashed
    ├── WeightsError             a checkpoint is missing, unsafe, or of another architecture
    ├── EngineUnavailableError   (also ImportError)        the engine or device cannot run here
    ├── ShapeMismatchError       (also ValueError)         arrays of shapes that do not fit
    ├── RecipeError              (also ValueError)         a hyperparameter outside its range
    ├── RankError                another process of a distributed run ended, or differs
    ├── RemoteError              a URL that cannot be reached, or is refused
    └── OutputError              (also OSError)            a result cannot be written

A message says four things: where (the path or the name), what was expected,
what was found, and what to type next. The command line catches this tree alone
and prints the message on one line; any other exception is a bug in featcache
and keeps its traceback.
"""

from __future__ import annotations


class FeatcacheError(Exception):
    """Base of every error that featcache raises on purpose."""


class CacheError(FeatcacheError):
    """Something is wrong with a feature cache."""


class CacheMissError(CacheError, FileNotFoundError):
    """No cache where one was asked for."""


class CacheMismatchError(CacheError):
    """A readable cache, but not the one that was asked for."""


class CacheCorruptError(CacheError):
    """A cache whose content is not what featcache wrote, or not safe to read."""


class DatasetError(FeatcacheError):
    """Images, labels or classes are missing, unreadable or contradictory."""


class DatasetChangedError(DatasetError):
    """An image is no longer the one that was hashed: never skipped, as a bad image may be."""


class WeightsError(FeatcacheError):
    """A checkpoint is missing, damaged, unsafe, or of another architecture."""


class EngineUnavailableError(FeatcacheError, ImportError):
    """The engine or device that was asked for cannot run on this machine."""


class ShapeMismatchError(FeatcacheError, ValueError):
    """Arrays whose shapes or dtypes do not fit together."""


class RecipeError(FeatcacheError, ValueError):
    """A hyperparameter outside the range in which it means something."""


class RankError(FeatcacheError):
    """Another process of a distributed run has ended, or does another run."""


class RemoteError(FeatcacheError):
    """A URL that cannot be opened, reached, read or written; an image behind it is not skipped."""


class OutputError(FeatcacheError, OSError):
    """A result cannot be written where it was asked for."""


_MAX_CHARACTERS = 120


def one_line(words: object) -> str:
    """Return text from a stranger's file for a message: one short line without control codes."""
    text = str(words)
    shown = text[:_MAX_CHARACTERS].encode("unicode_escape").decode("ascii")
    is_whole = max(len(text), len(shown)) <= _MAX_CHARACTERS
    return shown if is_whole else f"{shown[:_MAX_CHARACTERS]}..."
