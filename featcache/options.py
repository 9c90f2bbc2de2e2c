"""The options of a verb, as one frozen dataclass that its function takes as keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from typing import Any, TypeVar

R = TypeVar("R")


def with_options(kind: type[Any]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Let callers of a function pass the fields of its ``options`` dataclass as keywords.

    ``verb(subject, size=64)`` then calls the function with ``options=Options(size=64)``, and
    ``verb(subject, options=Options(size=64))`` is the same. The dataclass checks its own values
    when it is made; `inspect.signature` and `help` show its fields among the parameters.

    Raises
    ------
    TypeError
        On a call with a name that is no option, or with options in both forms.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        own = inspect.signature(function)
        # What the function takes itself, such as a positional method, is not listed again.
        names = {
            field.name: field
            for field in fields(kind)
            if field.init and field.name not in own.parameters
        }

        @wraps(function)
        def verb(*args: Any, options: Any = None, **keywords: Any) -> R:
            given = {name: keywords.pop(name) for name in list(keywords) if name in names}
            if options is not None and given:
                raise TypeError(
                    f"{function.__name__}(): expected options or {', '.join(given)}, found both"
                )
            options = kind(**given) if options is None else options
            return function(*args, options=options, **keywords)

        parameters = [one for one in own.parameters.values() if one.name != "options"]
        listed = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty
                if field.default is field.default_factory is MISSING
                else field.default,
                annotation=field.type,
            )
            for name, field in names.items()
        ]
        keyword = [one for one in parameters if one.kind in (one.KEYWORD_ONLY, one.VAR_KEYWORD)]
        positional = [one for one in parameters if one not in keyword]
        verb.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*positional, *listed, *keyword]
        )
        return verb

    return decorate
