"""The lists of an audit as comma-separated values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..files import csv_line, write_atomically
from ._result import AuditResult, Image

__all__ = ["TABLES", "as_csv", "table_paths", "write_tables"]


def as_csv(result: AuditResult, table: str) -> str:
    r"""Return one of `TABLES` as comma-separated values, a header first.

    An image takes four columns: ``split``, ``row``, ``id``, ``label``, the last empty where
    there is none. Text is quoted where it holds a comma, a quote or a line break, and
    otherwise as it is: names that a spreadsheet takes for a formula stay names. Lines end
    in ``\n``.
    """
    return "".join(csv_line(line) for line in TABLES[table](result))


def table_paths(folder: Path) -> dict[str, Path]:
    """Return where `write_tables` writes each of `TABLES`."""
    return {table: folder / f"{table}.csv" for table in TABLES}


def write_tables(result: AuditResult, folder: Path) -> None:
    """Write every table as a file of a folder, which is made where it is not there.

    A name that is not text (a path may be none) is spelt out with backslashes.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    for table, path in table_paths(folder).items():
        write_atomically(path, as_csv(result, table).encode("utf-8", "backslashreplace"))


def _image(image: Image) -> list[str]:
    return [image.split, str(image.row), image.id, image.label or ""]


def _columns(prefix: str = "") -> list[str]:
    return [f"{prefix}{name}" for name in ("split", "row", "id", "label")]


def _truth(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _duplicates(result: AuditResult) -> Iterator[list[str]]:
    yield ["group", "similarity", "same_label", *_columns("first_"), *_columns("second_")]
    for pair in result.duplicates:
        facts = [str(pair.group), f"{pair.similarity:.6f}", _truth(pair.same_label)]
        yield [*facts, *_image(pair.first), *_image(pair.second)]


def _groups(result: AuditResult) -> Iterator[list[str]]:
    yield ["group", *_columns()]
    for group in result.groups:
        for image in group.images:
            yield [str(group.number), *_image(image)]


def _mislabelled(result: AuditResult) -> Iterator[list[str]]:
    yield [*_columns(), "suggested", "self_confidence", "confidence", "score"]
    for suspect in result.mislabelled:
        shares = suspect.self_confidence, suspect.confidence, suspect.score
        yield [*_image(suspect), suspect.suggested, *(f"{share:.6f}" for share in shares)]


def _outliers(result: AuditResult) -> Iterator[list[str]]:
    yield [*_columns(), "score"]
    for outlier in result.outliers:
        yield [*_image(outlier), f"{outlier.score:.6f}"]


TABLES: dict[str, Callable[[AuditResult], Iterator[list[str]]]] = {
    "duplicates": _duplicates,
    "groups": _groups,
    "mislabelled": _mislabelled,
    "outliers": _outliers,
}
