"""Figures of what a command found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import output as out


def checked(plot: Path | None) -> None:
    """Find out before the long work that a figure can be drawn and saved where it was asked for."""
    if plot is not None:
        from ..reporting.svg import check_plot

        check_plot(plot)


def save(plot: Path | None, draw: Callable[[], Any]) -> None:
    """Draw a figure where one was asked for, and say where it is."""
    if plot is not None:
        from ..reporting.svg import save_figure

        for path in save_figure(draw(), plot):
            out.note(f"figure: {path}")
