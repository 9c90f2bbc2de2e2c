"""The option --plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import output as out


def checked(plot: Path | None) -> None:
    """Raise, before any long work, unless a figure can be drawn and saved there."""
    if plot is not None:
        from ..reporting.style import check_plot

        check_plot(plot)


def save(plot: Path | None, draw: Callable[[], Any]) -> None:
    """Draw and save a figure where one was asked for, and print its path."""
    if plot is not None:
        from ..reporting.style import save_figure

        for path in save_figure(draw(), plot):
            out.note(f"figure: {path}")
