"""The options of a verb, as one frozen dataclass; checks of a value that is one of a few names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from functools import wraps
from typing import Any, TypeVar

from .errors import RecipeError, one_line, visible_line

R = TypeVar("R")

# A quarter of a gigabyte as RGB. It is where Pillow starts to warn, so that below it there
# is no warning to silence: filters for warnings are the whole process's, and no thread's.
MAX_PIXELS = 89_478_485


def nearest(found: object, known: Iterable[str]) -> str | None:
    """Return the known name that somebody meant who typed ``found``, or None."""
    names = {str(name).lower(): str(name) for name in known}
    near = difflib.get_close_matches(str(found)[:200].lower(), names, 1)
    return names[near[0]] if near else None


def did_you_mean(
    found: object, known: Iterable[str], otherwise: str = "", *, prefix: str = ""
) -> str:
    """Return the end of a message about an unknown name: the nearest one, or other advice."""
    name = nearest(found, known)
    advice = f"did you mean {prefix}{visible_line(name):.200}?" if name else otherwise
    return f"; {advice}" if advice else ""


def check_choice(name: str, found: object, choices: Iterable[Any]) -> None:
    """Raise RecipeError unless a value is one of the choices."""
    choices = tuple(choices)
    if found not in choices:
        known = [str(choice) for choice in choices if choice is not None]
        raise RecipeError(
            f"{name}: expected one of {', '.join(known)}, found "
            f"'{one_line(found)}'{did_you_mean(found, known)}"
        )


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
