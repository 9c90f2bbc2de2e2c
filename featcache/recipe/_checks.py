"""What every recipe refuses: numbers outside the range in which they mean something."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ..errors import RecipeError

__all__ = ["check_common"]

_COUNTS = ("epochs", "batch_size", "max_iterations", "patience")
_RATES = ("lr", "head_lr", "backbone_lr")


def check_common(recipe: Any, *, least_batch: int = 1, may_lack_penalty: bool = False) -> None:
    """Check the fields of a recipe that many recipes have, by their names.

    Parameters
    ----------
    recipe : dataclass
        None in a field that may lack a value is fine.
    least_batch : int
        The smallest batch size.
    may_lack_penalty : bool
        Whether a weight decay of 0 has an optimum too.

    Raises
    ------
    RecipeError
        With the field, what was expected, and what was found.
    """
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if value is None:
            continue
        name = field.name.replace("_", " ")
        least = least_batch if field.name == "batch_size" else 1
        if field.name in _COUNTS and value < least:
            raise RecipeError(f"{name}: expected at least {least}, found {value}")
        if field.name in _RATES and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name}: expected a positive number, found {value}")
        if field.name == "weight_decay" and not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"{name}: expected 0 or a positive number, found {value}")
        if field.name == "weight_decay" and value == 0 and not may_lack_penalty:
            raise RecipeError(
                f"{name}: expected a positive number (without a penalty, classes that can be "
                "separated have no optimum), found 0"
            )
        if field.name == "momentum" and not 0 <= value < 1:
            raise RecipeError(f"{name}: expected a number from 0 to below 1, found {value}")
