"""Predictions as comma-separated values, for whatever reads them next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..files import csv_line

if TYPE_CHECKING:
    from . import Prediction

__all__ = ["as_csv"]


def as_csv(predictions: Sequence[Prediction]) -> str:
    r"""Return a table of comma-separated values, one line per image, a header first.

    The columns are ``path,class,probability``; where more classes were asked for, ``class_2``,
    ``probability_2`` and so on follow. Text is quoted where it holds a comma, a quote or a line
    break, and otherwise as it is: names that a spreadsheet takes for a formula stay names.
    Lines end in ``\n``.
    """
    width = max((len(prediction.top) for prediction in predictions), default=1)
    ends = ["", *(f"_{number}" for number in range(2, width + 1))]
    lines = [["path", *(f"{column}{end}" for end in ends for column in ("class", "probability"))]]
    for prediction in predictions:
        pairs = ((name, f"{probability:.6g}") for name, probability in prediction.top)
        lines.append([prediction.path, *(text for pair in pairs for text in pair)])
    return "".join(csv_line(line) for line in lines)
