"""Conditions on the columns of a table, in a small language with Python's syntax."""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..errors import QuestionError, TableError, one_line
from .table import Column, Table

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_WORDS = {"and", "or", "not", "in", "True", "False"}
# Texts are left alone; `a name` and Python's other keywords, such as class, are columns.
_NAMED = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`([^`]+)`|\b({})\b""".format(
        "|".join(sorted({*keyword.kwlist} - _WORDS))
    )
)
_EXAMPLES = "site != \"B\", age >= 40 and site in ['A', 'C'], or not missing(age)"


def rows_where(table: Table, expression: str) -> np.ndarray:
    """Return which rows of a table meet a condition: bool (N,).

    Comparisons (``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in``) of columns with
    texts, numbers and lists of them, joined by ``and``, ``or`` and ``not``; ``missing(column)``.
    A name that is no Python name stands in backquotes. Nothing is executed. A comparison with a
    missing value is neither true nor false, so that its row is left out, under ``not`` too.

    Raises
    ------
    TableError
        Not such an expression, no such column, or a column compared with another kind of value.
    """
    return _Condition(table, expression).rows()


@dataclass(frozen=True, eq=False)
class _Answer:
    """For which rows a condition holds, and for which it does not: bool (N,) each."""

    true: np.ndarray
    false: np.ndarray


class _Condition:
    def __init__(self, table: Table, expression: str) -> None:
        self._table = table
        self._expression = expression.strip()
        self._names: dict[str, str] = {}  # what stands for a name that is no Python name

    def rows(self) -> np.ndarray:
        """Return the rows for which it holds."""
        try:
            self._parsed = _NAMED.sub(self._stand_in, self._expression)
            tree = ast.parse(self._parsed, mode="eval")
            return self._answer(tree.body).true
        except SyntaxError as error:
            self._refuse(f"a condition such as {_EXAMPLES}", "an error", None, error.offset or 1)
        except TableError:
            raise
        except (RecursionError, MemoryError, OverflowError, ValueError) as error:
            self._refuse(f"a condition such as {_EXAMPLES}", one_line(error), None)

    def _stand_in(self, match: re.Match[str]) -> str:
        """Return a Python name as long as the one it replaces, so that positions stay."""
        name = match[1] or match[2]
        if name is None:
            return match[0]
        stand_in = f"_{len(self._names)}".ljust(len(match[0]), "_")
        while stand_in in self._names or stand_in in self._table.columns:
            stand_in += "_"
        self._names[stand_in] = name
        return stand_in

    def _answer(self, node: ast.expr) -> _Answer:
        if isinstance(node, ast.BoolOp):
            answers = [self._answer(value) for value in node.values]
            trues, falses = [one.true for one in answers], [one.false for one in answers]
            if isinstance(node.op, ast.And):
                return _Answer(np.logical_and.reduce(trues), np.logical_or.reduce(falses))
            return _Answer(np.logical_or.reduce(trues), np.logical_and.reduce(falses))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            answer = self._answer(node.operand)
            return _Answer(answer.false, answer.true)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "missing" and len(node.args) == 1 and not node.keywords:
                column = self._value(node.args[0])
                if isinstance(column, Column):
                    return _Answer(column.missing, ~column.missing)
            self._refuse("missing(column)", "another call", node)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            answers = [
                self._compare(left, sign, right)
                for left, sign, right in zip(sides, node.ops, sides[1:], strict=False)
            ]
            return _Answer(
                np.logical_and.reduce([one.true for one in answers]),
                np.logical_or.reduce([one.false for one in answers]),
            )
        self._refuse("a comparison", self._shown(node), node)

    def _value(self, node: ast.expr) -> Any:
        """Return a Column, a str, a float, or a list of these two."""
        if isinstance(node, ast.Name):
            return self._table[self._names.get(node.id, node.id)]
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            values = [self._value(item) for item in node.elts]
            if all(isinstance(value, (str, float)) for value in values):
                return values
            self._refuse("a list of texts or numbers", self._shown(node), node)
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        if isinstance(constant, ast.Constant):
            value = constant.value
            if isinstance(value, bool) and not negative:
                return str(value).lower()
            if isinstance(value, str) and not negative:
                return value
            if isinstance(value, (int, float)):
                return -float(value) if negative else float(value)
        self._refuse("a column, a text in quotes or a number", self._shown(node), node)

    def _compare(self, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> _Answer:
        one, other = self._value(left), self._value(right)
        if not isinstance(one, Column) and not isinstance(other, Column):
            self._refuse("a column on one side", self._shown(left), left)
        if isinstance(sign, (ast.In, ast.NotIn)):
            return self._contained(one, sign, other, right)
        if type(sign) not in _COMPARE or isinstance(one, list) or isinstance(other, list):
            self._refuse("==, !=, <, <=, >, >=, in or not in", self._shown(right), right)
        columns = [value for value in (one, other) if isinstance(value, Column)]
        if any(column.kind == "list" for column in columns):
            self._refuse("'text' in a column of lists", self._shown(left), left)
        as_text = all(isinstance(value, str) or _is_text(value) for value in (one, other))
        sides = [
            self._side(value, node, as_text=as_text)
            for value, node in ((one, left), (other, right))
        ]
        known = ~np.logical_or.reduce([_absent(side) for side in sides if np.ndim(side)])
        met = np.zeros(len(self._table), bool)
        taken = [side[known] if np.ndim(side) else side for side in sides]
        met[known] = _COMPARE[type(sign)](*taken)
        return _Answer(met, known & ~met)

    def _contained(self, one: Any, sign: ast.cmpop, other: Any, node: ast.expr) -> _Answer:
        if isinstance(one, str) and isinstance(other, Column) and other.kind == "list":
            known = ~other.missing
            met = np.array([value is not None and one in value for value in other.values], bool)
        elif isinstance(one, Column) and one.kind != "list" and isinstance(other, list):
            as_text = _is_text(one) and all(isinstance(value, str) for value in other)
            side = self._side(one, node, as_text=as_text)
            known = ~_absent(side)
            wanted = {self._side(value, node, as_text=as_text) for value in other}
            met = np.fromiter((value in wanted for value in side), bool, len(side)) & known
        else:
            self._refuse("a column in a list such as ['A', 'C']", self._shown(node), node)
        if isinstance(sign, ast.NotIn):
            return _Answer(known & ~met, met)
        return _Answer(met, known & ~met)

    def _side(self, value: Any, node: ast.expr, *, as_text: bool) -> Any:
        """Return a side of a comparison as texts or as numbers: an array or a single value."""
        if as_text:
            return value.values if isinstance(value, Column) else value
        column = Column("text", np.array([value], object)) if isinstance(value, str) else value
        if isinstance(column, float):
            return column
        numbers = column.numbers()
        if numbers is None:
            self._refuse("numbers on both sides", f"text in {self._shown(node)}", node)
        return float(numbers[0]) if isinstance(value, str) else numbers

    def _at(self, offset: int | None) -> int:
        """Return the position of a character; Python counts bytes of UTF-8."""
        return len(self._parsed.encode()[:offset].decode("utf-8", "replace"))

    def _shown(self, node: ast.expr) -> str:
        text = self._expression[self._at(node.col_offset) : self._at(node.end_col_offset)]
        return one_line(repr(text))

    def _refuse(self, expected: str, found: str, node: ast.expr | None, at: int = 1) -> NoReturn:
        character = at if node is None else self._at(node.col_offset) + 1
        raise QuestionError(
            f"the condition {one_line(repr(self._expression))}: expected {expected}, found {found} "
            f"at character {character}"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, Column) and value.kind == "text"


def _absent(side: np.ndarray) -> np.ndarray:
    absent: np.ndarray = np.isnan(side) if side.dtype == np.float64 else side == None  # noqa: E711
    return absent
