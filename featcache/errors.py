"""Every error that featcache raises on purpose.

::

    FeatcacheError
    ├── CacheError
    │   ├── CacheMissError       (also FileNotFoundError)  there is no cache at that path
    │   ├── CacheMismatchError   the cache was made from other data, weights or in another format
    │   └── CacheCorruptError    the cache's bytes are not those that were written
    ├── DatasetError             images, labels or classes are missing or unreadable
    │   └── DatasetChangedError  an image changed after it was hashed
    ├── TableError               (also ValueError)         a column or target that does not fit
    │   └── QuestionError        (also RecipeError)        no such column, or no such condition
    ├── WeightsError             a checkpoint is missing, unsafe, or for another architecture
    ├── EngineUnavailableError   (also ImportError)        the engine or device cannot run here
    ├── ShapeMismatchError       (also ValueError)         array shapes that do not fit together
    ├── RecipeError              (also ValueError)         an option's value that it cannot have
    │   └── DivergedError        training ended in infinities, with values within their range
    ├── RankError                another process of a distributed run ended, or differs
    ├── RemoteError              a URL that cannot be reached, or refuses access
    └── OutputError              (also OSError)            a result cannot be written

A message says four things: where (the path or the name), what was expected,
what was found, and what to type next. The command line prints these errors on one
line, and exits with 1; with 2 where an argument is wrong (`RecipeError`). Any other exception is
a bug in featcache and keeps its traceback.
"""

from __future__ import annotations


class FeatcacheError(Exception):
    """Base of every error that featcache raises on purpose."""


class CacheError(FeatcacheError):
    """Something is wrong with a feature cache."""


class CacheMissError(CacheError, FileNotFoundError):
    """There is no cache at the given path."""


class CacheMismatchError(CacheError):
    """A readable cache, but not the one that the options describe."""


class CacheCorruptError(CacheError):
    """A cache whose content is not what featcache wrote, or is unsafe to read."""


class DatasetError(FeatcacheError):
    """Images, labels or classes are missing, unreadable or contradictory."""


class DatasetChangedError(DatasetError):
    """An image changed after it was hashed; unlike a bad image, it is never skipped."""


class TableError(FeatcacheError, ValueError):
    """A table of labels cannot be read, or a column or target does not fit the question."""


class WeightsError(FeatcacheError):
    """A checkpoint is missing, damaged, unsafe, or for another architecture."""


class EngineUnavailableError(FeatcacheError, ImportError):
    """The requested engine or device cannot run on this machine."""


class ShapeMismatchError(FeatcacheError, ValueError):
    """Arrays whose shapes or dtypes do not fit together."""


class RecipeError(FeatcacheError, ValueError):
    """An option's value outside its range, of no known name, or that contradicts another."""


class QuestionError(TableError, RecipeError):
    """A column that the table does not have, or a condition that is none."""


class DivergedError(RecipeError):
    """Training ended in infinities or NaN, with options each within its range."""


class RankError(FeatcacheError):
    """Another process of a distributed run has ended, or does another run."""


class RemoteError(FeatcacheError):
    """A URL that cannot be opened, read or written; its images are never skipped."""


class OutputError(FeatcacheError, OSError):
    """A result cannot be written to the requested place."""


def missing_package(
    where: object, package: str, error: ImportError, extra: str = ""
) -> EngineUnavailableError:
    """Return the error for a package of one of our extras (by default of its name)."""
    return EngineUnavailableError(
        f"{where}: expected the package {package}, found: {error}; type: pip install "
        f"'featcache[{extra or package}]'"
    )


def text_of(value: object) -> str:
    """Return valid text: bytes of a file name that are not UTF-8 are escaped."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def visible(text: str) -> str:
    """Return text for a terminal: control characters of a foreign text are written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def visible_line(text: str) -> str:
    """Return `visible` text on one line: line feeds are written out too."""
    return visible(text).replace("\n", r"\n")


_MAX_PLACE = 600


def shown_place(where: object) -> str:
    """Return a path for a message: visible, of one line, and shortened in its middle."""
    text = visible_line(text_of(where))
    half = _MAX_PLACE // 2
    return text if len(text) <= _MAX_PLACE else f"{text[:half]}…{text[-half:]}"


_MAX_CHARACTERS = 120


def one_line(words: object) -> str:
    """Return text from a stranger's file for a message: one short line without control codes."""
    text = str(words)
    shown = text[:_MAX_CHARACTERS].encode("unicode_escape").decode("ascii")
    is_whole = max(len(text), len(shown)) <= _MAX_CHARACTERS
    return shown if is_whole else f"{shown[:_MAX_CHARACTERS]}..."
