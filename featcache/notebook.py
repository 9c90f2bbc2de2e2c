"""Results as plain HTML tables in a notebook, through ``_repr_html_``; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any, TypeVar

T = TypeVar("T")

_MOST_ROWS = 60
_MOST_VALUES = 8
_MOST_CHARACTERS = 400


class ShownAsTable:
    """A dataclass that a notebook shows as a table, one row per field."""

    def _repr_html_(self) -> str:
        return facts_table(type(self).__name__, _fields_of(self))


class Rows(list[T]):
    """A list of results that a notebook shows as a table, one row per result.

    Parameters
    ----------
    items : iterable
        Dataclasses or mappings, all with the same fields.
    columns : sequence of str, optional
        The fields to show; by default all.
    """

    def __init__(self, items: Iterable[T] = (), columns: Sequence[str] = ()) -> None:
        super().__init__(items)
        self._columns = tuple(columns)

    def _repr_html_(self) -> str:
        return rows_table([_fields_of(item) for item in self], self._columns)


def facts_table(title: str, facts: Mapping[str, Any]) -> str:
    """Return an HTML table with a caption and one row per name and value."""
    lines = "".join(
        f'<tr><th scope="row">{_escaped(name)}</th><td>{_cell(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table><caption>{_escaped(title)}</caption><tbody>{lines}</tbody></table>"


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return an HTML table with a header; after 60 rows, a count of the rest."""
    columns = tuple(columns) or tuple(rows[0] if rows else ())
    head = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in columns)}</tr>"
        for row in rows[:_MOST_ROWS]
    )
    left = len(rows) - _MOST_ROWS
    more = f"<p>and {left:,} more</p>" if left > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _fields_of(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping):
        return dict(item)
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _cell(value: Any) -> str:
    """Return the HTML of a value: a nested table for several results, else text."""
    if isinstance(value, (list, tuple)) and value and all(map(_is_result, value)):
        return rows_table([_fields_of(item) for item in value])
    return _escaped(_text(value))


def _is_result(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _text(value: Any) -> str:
    """Return a short text for a value."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if _is_result(value):
        value = {name: it for name, it in _fields_of(value).items() if not _is_long(it)}
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(it)}" for name, it in value.items())
    if isinstance(value, (list, tuple)):
        if _is_long(value):
            return f"{len(value):,} values"
        return ", ".join(map(_text, value))
    return str(value)


def _is_long(value: Any) -> bool:
    """Return whether a value is too long for one line: many values, or nested ones."""
    return isinstance(value, (list, tuple)) and (
        len(value) > _MOST_VALUES
        or any(isinstance(it, (list, tuple)) or _is_result(it) for it in value)
    )


def _escaped(text: str) -> str:
    """Return escaped, shortened text, with characters that cannot be encoded as backslashes."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}…"
    return escape(text.encode("utf-8", "backslashreplace").decode())
